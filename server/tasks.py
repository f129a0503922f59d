"""Long calls as tasks (`io.modelcontextprotocol/tasks`, revision 2026-07-28): the client polls, and the model gets the result.

Clients that do not declare the extension get the results that the tools return without it. A training or evaluation is a
task with the id of its job: it outlives this process, and every server answers for it. A load or an export that takes long
is a task of this process (`long_calls.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from anyio.abc import TaskGroup
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.extension import Extension, MethodBinding
from mcp.server.mcpserver import require_client_extension
from mcp.shared.exceptions import MCPError
from mcp.types import INTERNAL_ERROR, INVALID_PARAMS, CallToolRequestParams, CallToolResult, RequestParams
from pydantic import BaseModel, Field

from peft_core.errors import JobNotFound, JobStateError, PeftMcpError
from peft_core.manager import PEFTManager
from peft_core.schemas.results import Status, TrainingStatus
from server.format_results import format_status
from server.long_calls import KEPT_S, LongCall, LongCalls, may_be_long
from server.status_text import headline, subject

EXTENSION_ID = "io.modelcontextprotocol/tasks"
REVISIONS = frozenset({"2026-07-28"})
JOB_TOOLS = frozenset({"train_adapter", "evaluate_adapter", "compare_adapters", "resume_training", "refresh_project"})
WAITING_S = 5.0  # more for a call that may itself wait for its job, for as long as clients wait
PATIENCE_S = 3.0  # a load or an export that ends sooner is answered without a task
MIN_POLL_S, MAX_POLL_S = 2.0, 60.0
POLLS_PER_JOB = 20


class TaskParams(RequestParams):
    task_id: str


class TaskUpdateParams(TaskParams):
    input_responses: dict[str, Any] = Field({})


class Tasks(Extension):
    identifier = EXTENSION_ID

    def __init__(self, answer_within_s: float, *, read_only: frozenset[str] = frozenset()) -> None:
        """`read_only`: the tools that change nothing."""
        self._answer_within_s = answer_within_s
        self._read_only = read_only
        self._calls: LongCalls | None = None

    def start(self, group: TaskGroup) -> None:
        """Run long calls in `group`, which ends with the session."""
        self._calls = LongCalls(group)

    def methods(self) -> Sequence[MethodBinding]:
        return (
            MethodBinding("tasks/get", TaskParams, self._get, REVISIONS),
            MethodBinding("tasks/update", TaskUpdateParams, self._update, REVISIONS),
            MethodBinding("tasks/cancel", TaskParams, self._cancel, REVISIONS),
        )

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: ServerRequestContext[Any, Any], call_next: CallNext
    ) -> HandlerResult:
        """Answer a long call with a task, if the client can follow one, and in time, if it cannot."""
        follows_tasks = _understands_tasks(ctx)
        if self._calls is not None and (params.name not in self._read_only or params.name == "generate"):
            self._calls.move_on(params)
        if may_be_long(params) and self._calls is not None:
            starts_job = params.name in JOB_TOOLS
            in_time_s = self._answer_within_s + (WAITING_S if starts_job else 0)
            if not follows_tasks:
                return await self._calls.call_again(params, ctx, call_next, in_time_s)
            result = await self._calls.call(params, ctx, call_next, in_time_s if starts_job else PATIENCE_S)
            if isinstance(result, LongCall):
                return {"resultType": "task", **call_to_wire(result)}
        else:
            result = await call_next(ctx)
        if follows_tasks and params.name in JOB_TOOLS and isinstance(result, CallToolResult) and not result.is_error:
            job_id = (result.structured_content or {}).get("job_id")  # a refresh may need no job
            if job_id is not None and not (status := await _manager(ctx).get_job(job_id)).status.is_final:
                return {"resultType": "task", **job_to_wire(status)}
        return result

    def _call(self, task_id: str) -> LongCall | None:
        return None if self._calls is None else self._calls.get(task_id)

    async def _get(self, ctx: ServerRequestContext[Any, Any], params: TaskParams) -> HandlerResult:
        require_client_extension(ctx, EXTENSION_ID)
        if (call := self._call(params.task_id)) is not None:
            return call_to_wire(call)
        return job_to_wire(await _job(ctx, params.task_id))

    async def _update(self, ctx: ServerRequestContext[Any, Any], params: TaskUpdateParams) -> HandlerResult:
        """Acknowledge answers, of which no task ever asks for any."""
        require_client_extension(ctx, EXTENSION_ID)
        if self._call(params.task_id) is None:
            await _job(ctx, params.task_id)
        return {}

    async def _cancel(self, ctx: ServerRequestContext[Any, Any], params: TaskParams) -> HandlerResult:
        require_client_extension(ctx, EXTENSION_ID)
        if (call := self._call(params.task_id)) is not None:
            call.cancel()
            return {}
        status = await _job(ctx, params.task_id)
        try:
            await _manager(ctx).cancel_training(status.project_id, params.task_id, wait_s=0)
        except JobStateError:  # it has ended meanwhile, which `tasks/get` tells
            pass
        except PeftMcpError as error:
            raise MCPError(code=INTERNAL_ERROR, message=str(error)) from error
        return {}


def call_to_wire(call: LongCall) -> dict[str, Any]:
    """Return a call of this process as the extension's `Task`."""
    state: dict[str, Any] = {"status": "working"}
    if call.was_cancelled:
        state = {"status": "cancelled"}
    elif call.error is not None:
        state = {"status": "failed", "error": _error_to_wire(call.error)}
    elif call.result is not None:
        state = {"status": "completed", "result": _dump(call.result)}
    message = {"statusMessage": call.message} if call.message else {}
    return {
        "taskId": call.call_id,
        **state,
        **message,
        "createdAt": _timestamp(call.created_at),
        "lastUpdatedAt": _timestamp(call.updated_at),
        "ttlMs": round(KEPT_S * 1000),
        "pollIntervalMs": round(MIN_POLL_S * 1000),
    }


def _error_to_wire(error: Exception) -> dict[str, Any]:
    if isinstance(error, MCPError):
        return {"code": error.error.code, "message": error.error.message}
    return {"code": INTERNAL_ERROR, "message": f"The call failed: {type(error).__name__}."}


def job_to_wire(status: TrainingStatus) -> dict[str, Any]:
    """Return a job as the extension's `Task`, with the tool's result if the job has ended."""
    state: dict[str, Any] = {"status": "working"}
    if status.status is Status.CANCELLED:
        state = {"status": "cancelled"}
    elif status.status.is_final:
        result = format_status(status)
        result.is_error = (
            status.status is not Status.COMPLETED
        )  # the extension's `failed` is for errors of the protocol
        state = {"status": "completed", "result": _dump(result)}
    return {
        "taskId": status.job_id,
        **state,
        "statusMessage": f"{subject(status)}: {headline(status)}",
        "createdAt": status.created_at,
        "lastUpdatedAt": status.updated_at,
        "ttlMs": None,
        "pollIntervalMs": round(1000 * _poll_interval_s(status.eta_s)),
    }


def _dump(result: HandlerResult) -> dict[str, Any]:
    if isinstance(result, BaseModel):
        return result.model_dump(mode="json", by_alias=True, exclude_none=True)
    return dict(result or {})


def _poll_interval_s(eta_s: float | None) -> float:
    return min(MAX_POLL_S, max(MIN_POLL_S, (eta_s or 0.0) / POLLS_PER_JOB))


def _understands_tasks(ctx: ServerRequestContext[Any, Any]) -> bool:
    capabilities = ctx.session.client_capabilities
    declared = capabilities.extensions if capabilities is not None else None
    return ctx.protocol_version in REVISIONS and EXTENSION_ID in (declared or {})


def _manager(ctx: ServerRequestContext[Any, Any]) -> PEFTManager:
    manager: PEFTManager = ctx.lifespan_context
    return manager


async def _job(ctx: ServerRequestContext[Any, Any], task_id: str) -> TrainingStatus:
    """Return the job with this id.

    Raises:
        MCPError: there is no such job.
    """
    try:
        return await _manager(ctx).get_job(task_id)
    except JobNotFound as error:
        raise MCPError(code=INVALID_PARAMS, message=f"There is no task {task_id!r}.") from error
    except PeftMcpError as error:
        raise MCPError(code=INTERNAL_ERROR, message=str(error)) from error


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
