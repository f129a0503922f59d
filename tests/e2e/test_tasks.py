"""Long calls as tasks, through the real stdio server, with a client that speaks the extension."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import anyio
import pytest
from mcp.client import Client, ClientSession
from mcp.client.extension import ClaimContext, ClientExtension, ResultClaim, advertise
from mcp.shared.exceptions import MCPError
from mcp.types import CallToolResult, Request, Result
from pydantic import ConfigDict
from pydantic.alias_generators import to_camel

import server.tasks
from peft_core.config import Settings
from server.app import build_server
from tests.clients import data_of, stdio_server, text_of
from tests.e2e.main_job import SHORT
from tests.tiny_models import write_tiny_adapter

pytestmark = pytest.mark.model
MODERN = "2026-07-28"
TASKS = server.tasks.EXTENSION_ID
INVALID_PARAMS, METHOD_NOT_FOUND, MISSING_CAPABILITY = -32602, -32601, -32021
DEADLINE_S = 300


class Task(Result):
    """A task as the specification has it: these fields and no others."""

    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, populate_by_name=True)
    task_id: str
    status: Literal["working", "completed", "failed", "cancelled"]
    status_message: str | None = None
    created_at: str
    last_updated_at: str
    ttl_ms: int | None
    poll_interval_ms: int
    result: dict[str, Any] | None = None
    error: dict[str, Any] | None = None
    result_type: Literal["complete"] = "complete"


class NewTask(Task):
    result_type: Literal["task"] = "task"  # type: ignore[assignment]


class Acknowledgement(Result):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel)
    result_type: Literal["complete"]


class PollingClient(ClientExtension):
    """Polls each task to its end, as clients with the extension do, and keeps what it saw."""

    identifier = TASKS

    def __init__(self, seen: list[Task]) -> None:
        self.seen = seen

    def claims(self) -> Sequence[ResultClaim[Any]]:
        return [ResultClaim(result_type="task", model=NewTask, resolve=self.resolve)]

    async def resolve(self, created: NewTask, context: ClaimContext) -> CallToolResult:
        self.seen.append(created)
        with anyio.fail_after(DEADLINE_S):
            while True:
                task = await context.session.send_request(request("tasks/get", created.task_id), Task)
                self.seen.append(task)
                await self.react(task, context.session)
                if task.status == "completed":
                    return CallToolResult.model_validate(task.result)
                if task.status != "working":
                    raise MCPError(code=0, message=task.status)
                await anyio.sleep(0.25)

    async def react(self, task: Task, session: ClientSession) -> None:
        """Do something after a poll."""


class CancellingClient(PollingClient):
    """Cancels the task as soon as it trains."""

    async def react(self, task: Task, session: ClientSession) -> None:
        if "training: step" in (task.status_message or ""):
            await session.send_request(request("tasks/cancel", task.task_id), Acknowledgement)


def request(method: str, task_id: str) -> Request[server.tasks.TaskParams, str]:
    params = server.tasks.TaskParams(task_id=task_id)
    return Request[server.tasks.TaskParams, str](method=method, params=params)


async def code_of(client: Client, method: str, task_id: str) -> int:
    with pytest.raises(MCPError) as caught:
        await client.session.send_request(request(method, task_id), Task)
    return caught.value.error.code


async def test_a_training_is_one_call_and_a_new_server_answers_for_its_task(
    data_dir: Path, stdlib_repository: Path, tiny_base: str
) -> None:
    seen: list[Task] = []
    arguments = {
        "project_id": "std",
        "training_data": str(stdlib_repository),
        "config": {**SHORT, "base_model": tiny_base},
    }
    async with Client(stdio_server(data_dir), mode=MODERN, extensions=[PollingClient(seen)]) as client:
        result = await client.call_tool("train_adapter", arguments)
        assert not result.is_error, text_of(result)
        status = data_of(result)
        assert status["status"] == "completed"
        assert status["evaluation"]["verdict"] in ("helps", "no_difference", "harms")
        assert seen[0].status == "working"
        assert seen[0].task_id == status["job_id"]
        assert (seen[0].status_message or "").startswith("std: ")
        assert all(2000 <= task.poll_interval_ms <= 60_000 for task in seen)
        assert seen[0].created_at == seen[-1].created_at

    async with Client(stdio_server(data_dir), mode=MODERN, extensions=[advertise(TASKS)]) as client:
        task = await client.session.send_request(request("tasks/get", status["job_id"]), Task)
        assert (task.status, task.ttl_ms) == ("completed", None)
        assert data_of(CallToolResult.model_validate(task.result)) == status
        for method in ("tasks/cancel", "tasks/update"):  # of a task that has ended: acknowledged, without effect
            await client.session.send_request(request(method, status["job_id"]), Acknowledgement)
            assert await code_of(client, method, "20200101-000000-abcdef") == INVALID_PARAMS
        assert await code_of(client, "tasks/get", "20200101-000000-abcdef") == INVALID_PARAMS

    async with Client(stdio_server(data_dir), mode=MODERN) as client:
        assert await code_of(client, "tasks/get", status["job_id"]) == MISSING_CAPABILITY
        again = {**arguments, "config": {**SHORT, "base_model": tiny_base, "continue_from": "none"}}
        assert data_of(await client.call_tool("train_adapter", again))["status"] == "queued", "no task"
        await client.call_tool("cancel_training", {"project_id": "std"})
    async with Client(stdio_server(data_dir), mode="legacy", extensions=[advertise(TASKS)]) as client:
        assert await code_of(client, "tasks/get", status["job_id"]) == METHOD_NOT_FOUND


async def test_a_cancelled_task_ends_as_cancelled(data_dir: Path, stdlib_repository: Path, tiny_base: str) -> None:
    seen: list[Task] = []
    config = {**SHORT, "max_steps": 10_000, "base_model": tiny_base}
    arguments = {"project_id": "std", "training_data": str(stdlib_repository), "config": config}
    async with Client(stdio_server(data_dir), mode=MODERN, extensions=[CancellingClient(seen)]) as client:
        with pytest.raises(MCPError, match="cancelled"):
            await client.call_tool("train_adapter", arguments)
    assert seen[-1].status == "cancelled"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every load and every export a task."""
    monkeypatch.setattr(server.tasks, "PATIENCE_S", 0.0)


@pytest.mark.usefixtures("impatient")
async def test_a_slow_load_is_a_task_with_its_progress_as_message(
    data_dir: Path, tiny_base: str, tmp_path: Path
) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapter", Path(tiny_base), seed=1)
    seen: list[Task] = []
    polling = PollingClient(seen)
    async with Client(build_server(Settings(data_dir=data_dir)), mode=MODERN, extensions=[polling]) as client:
        load = functools.partial(client.call_tool, "load_adapter")
        loaded = data_of(await load({"adapter_path": str(adapter), "base_model": tiny_base, "engine": "torch"}))
        assert (loaded["status"], loaded["how"]) == ("loaded", "cold")
        assert seen[0].status == "working"
        assert any(task.status_message for task in seen)
        refused = await load({"adapter_path": str(tmp_path / "nothing")})
        assert refused.is_error
        assert "No adapter at" in text_of(refused)


async def test_a_client_without_tasks_makes_a_slow_call_again_for_its_result(
    data_dir: Path, tiny_base: str, tmp_path: Path, era: str
) -> None:
    adapter = write_tiny_adapter(tmp_path / "adapter", Path(tiny_base), seed=1)
    arguments = {"adapter_path": str(adapter), "base_model": tiny_base, "engine": "torch"}
    answers: list[CallToolResult] = []
    messages: set[str | None] = set()

    async def note(_done: float, _total: float | None, message: str | None) -> None:
        messages.add(message)

    settings = Settings(data_dir=data_dir, answer_within_s=0.2)
    async with Client(build_server(settings), mode=era) as client:
        with anyio.fail_after(DEADLINE_S):
            while not answers or data_of(answers[-1])["status"] == "working":
                answers.append(await client.call_tool("load_adapter", arguments, progress_callback=note))
    assert data_of(answers[0])["status"] == "working"
    assert "still at work after" in text_of(answers[0])
    loaded = data_of(answers[-1])
    assert (loaded["status"], loaded["how"]) == ("loaded", "cold"), "one load, although there were several calls"
    assert len(messages) > 1
