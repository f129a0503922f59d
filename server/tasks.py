"""Long calls as tasks (`io.modelcontextprotocol/tasks`, revision 2026-07-28): the client polls, and the model gets the result.

Clients that do not declare the extension get the results that the tools return without it. A training or evaluation is a
task with the id of its job: it outlives this process, and every server answers for it. A load or an export that takes long
is a task of this process.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import anyio
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
from server.progress import recipient
from server.status_text import headline, subject

EXTENSION_ID = "io.modelcontextprotocol/tasks"
REVISIONS = frozenset({"2026-07-28"})
JOB_TOOLS = frozenset({"train_adapter", "evaluate_adapter", "resume_training"})
PROCESS_TOOLS = frozenset({"load_adapter", "export_adapter"})
PATIENCE_S = 3.0  # a load or an export that ends sooner is answered without a task
PROCESS_TASK_TTL_S = 3600.0  # how long the result of a task of this process is kept
MIN_POLL_S, MAX_POLL_S = 2.0, 60.0
POLLS_PER_JOB = 20


class TaskParams(RequestParams):
    task_id: str


class TaskUpdateParams(TaskParams):
    input_responses: dict[str, Any] = Field({})


@dataclass
class _ProcessTask:
    """A call that continues in this process after its request was answered."""

    task_id: str
    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    done: anyio.Event = field(default_factory=anyio.Event)
    message: str = ""
    result: HandlerResult | None = None
    error: MCPError | None = None
    created_at: float = field(default_factory=time.time)
    updated_at: float = field(default_factory=time.time)

    def record(self, message: str) -> None:
        self.message, self.updated_at = message, time.time()

    def to_wire(self) -> dict[str, Any]:
        state: dict[str, Any] = {"status": "working"}
        if self.result is not None:
            state = {"status": "completed", "result": _dump(self.result)}
        elif self.error is not None:
            error = {"code": self.error.error.code, "message": self.error.error.message}
            state = {"status": "failed", "error": error}
        elif self.done.is_set():
            state = {"status": "cancelled"}
        message = {"statusMessage": self.message} if self.message else {}
        return {
            "taskId": self.task_id,
            **state,
            **message,
            "createdAt": _timestamp(self.created_at),
            "lastUpdatedAt": _timestamp(self.updated_at),
            "ttlMs": round(PROCESS_TASK_TTL_S * 1000),
            "pollIntervalMs": round(MIN_POLL_S * 1000),
        }


class Tasks(Extension):
    identifier = EXTENSION_ID

    def __init__(self) -> None:
        self._group: TaskGroup | None = None
        self._process_tasks: dict[str, _ProcessTask] = {}

    def start(self, group: TaskGroup) -> None:
        """Run the tasks of this process in `group`, which ends with the session."""
        self._group = group

    def methods(self) -> Sequence[MethodBinding]:
        return (
            MethodBinding("tasks/get", TaskParams, self._get, REVISIONS),
            MethodBinding("tasks/update", TaskUpdateParams, self._update, REVISIONS),
            MethodBinding("tasks/cancel", TaskParams, self._cancel, REVISIONS),
        )

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: ServerRequestContext[Any, Any], call_next: CallNext
    ) -> HandlerResult:
        """Answer a long call with a task, if the client can follow one."""
        if not _understands_tasks(ctx):
            return await call_next(ctx)
        if params.name in PROCESS_TOOLS and self._group is not None:
            return await self._in_process(self._group, ctx, call_next)
        result = await call_next(ctx)
        if params.name in JOB_TOOLS and isinstance(result, CallToolResult) and not result.is_error:
            status = await _manager(ctx).get_job((result.structured_content or {})["job_id"])
            if not status.status.is_final:
                return {"resultType": "task", **job_to_wire(status)}
        return result

    async def _in_process(
        self, group: TaskGroup, ctx: ServerRequestContext[Any, Any], call_next: CallNext
    ) -> HandlerResult:
        self._forget_old()
        task = _ProcessTask(secrets.token_hex(16))
        group.start_soon(_run, task, ctx, call_next)
        try:
            with anyio.move_on_after(PATIENCE_S):
                await task.done.wait()
        except BaseException:  # the request was cancelled before the client knows of a task
            task.scope.cancel()
            raise
        if task.error is not None:
            raise task.error
        if task.result is not None:
            return task.result
        self._process_tasks[task.task_id] = task
        return {"resultType": "task", **task.to_wire()}

    def _forget_old(self) -> None:
        oldest = time.time() - PROCESS_TASK_TTL_S
        for task in list(self._process_tasks.values()):
            if task.done.is_set() and task.updated_at < oldest:
                del self._process_tasks[task.task_id]

    async def _get(self, ctx: ServerRequestContext[Any, Any], params: TaskParams) -> HandlerResult:
        require_client_extension(ctx, EXTENSION_ID)
        if (task := self._process_tasks.get(params.task_id)) is not None:
            return task.to_wire()
        return job_to_wire(await _job(ctx, params.task_id))

    async def _update(self, ctx: ServerRequestContext[Any, Any], params: TaskUpdateParams) -> HandlerResult:
        """Acknowledge answers, of which no task ever asks for any."""
        require_client_extension(ctx, EXTENSION_ID)
        if params.task_id not in self._process_tasks:
            await _job(ctx, params.task_id)
        return {}

    async def _cancel(self, ctx: ServerRequestContext[Any, Any], params: TaskParams) -> HandlerResult:
        require_client_extension(ctx, EXTENSION_ID)
        if (task := self._process_tasks.get(params.task_id)) is not None:
            task.scope.cancel()
            return {}
        status = await _job(ctx, params.task_id)
        try:
            await _manager(ctx).cancel_training(status.project_id, params.task_id, wait_s=0)
        except JobStateError:  # it has ended meanwhile, which `tasks/get` tells
            pass
        except PeftMcpError as error:
            raise MCPError(code=INTERNAL_ERROR, message=str(error)) from error
        return {}


async def _run(task: _ProcessTask, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> None:
    """Complete a call, whatever becomes of its request, and keep what comes out."""
    recipient.set(task.record)
    try:
        with task.scope:
            task.result = await call_next(ctx)
    except MCPError as error:
        task.error = error
    except Exception as error:  # noqa: BLE001 -- it must not end the session
        task.error = MCPError(code=INTERNAL_ERROR, message=f"The call failed: {type(error).__name__}.")
    finally:
        task.updated_at = time.time()
        task.done.set()


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
