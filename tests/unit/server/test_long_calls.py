"""Calls that are answered before they have ended, and found again by an equal call."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest
from mcp.types import CallToolRequestParams, CallToolResult, TextContent

from server.app import TOOLS, read_only_tools
from server.long_calls import LongCall, LongCalls, may_be_long
from server.progress import recipient
from server.tasks import Tasks
from tests.clients import data_of, text_of

PATIENT_S, IMPATIENT_S = 30.0, 0.01


class Session:
    client_capabilities = None  # it does not follow tasks

    def __init__(self) -> None:
        self.sent: list[str] = []

    async def report_progress(self, done: float, total: float | None, message: str) -> None:
        self.sent.append(message)


class Request:
    """What a call knows of the request that waits for it."""

    protocol_version = "2025-11-25"

    def __init__(self) -> None:
        self.session: Any = Session()


class Work:
    """A tool that reports progress, and ends when the test lets it."""

    def __init__(self, outcome: Exception | None = None, data: dict[str, Any] | None = None) -> None:
        self.outcome = outcome
        self.data = data
        self.starts = 0
        self.was_cancelled = False
        self.may_end = anyio.Event()

    async def __call__(self, _ctx: Any) -> CallToolResult:
        self.starts += 1
        call = recipient.get()
        assert call is not None
        await call.record(0, None, "reading the base model")
        try:
            await self.may_end.wait()
        except BaseException:
            self.was_cancelled = True
            raise
        await call.record(1, None, "done")
        if self.outcome is not None:
            raise self.outcome
        return CallToolResult(
            content=[TextContent(type="text", text=f"result {self.starts}")], structured_content=self.data
        )


@pytest.fixture
async def calls() -> AsyncIterator[LongCalls]:
    async with anyio.create_task_group() as group:
        yield LongCalls(group)
        group.cancel_scope.cancel()


def params(**arguments: Any) -> CallToolRequestParams:
    return CallToolRequestParams(name="load_adapter", arguments=arguments)


async def test_the_same_call_again_waits_for_the_result(calls: LongCalls) -> None:
    work, first, second = Work(), Request(), Request()
    given = {"adapter_path": "web", "engine": "torch"}
    answer: Any = await calls.call_again(params(**given), first, work, IMPATIENT_S)  # type: ignore[arg-type]
    assert text_of(answer).startswith("load_adapter is still at work after ")
    assert "reading the base model. The same call again waits" in text_of(answer)
    data = data_of(answer)
    assert (data["status"], data["next_step"]) == ("working", {"tool": "load_adapter", "arguments": given})

    work.may_end.set()
    again = params(engine="torch", adapter_path="web", base_model=None)  # equal: the order and a null mean nothing
    result: Any = await calls.call_again(again, second, work, PATIENT_S)  # type: ignore[arg-type]
    assert text_of(result) == "result 1"
    assert (first.session.sent, second.session.sent) == (["reading the base model"], ["done"])

    result = await calls.call_again(again, second, work, PATIENT_S)  # type: ignore[arg-type]
    assert text_of(result) == "result 2", "a result is fetched once; the next call loads again"


async def test_records_are_not_repeated_in_the_answer_that_their_call_is_still_at_work(calls: LongCalls) -> None:
    given = {"project_id": "web", "records": [{"text": "x" * 2000}]}
    call = CallToolRequestParams(name="train_adapter", arguments=given)
    answer: Any = await calls.call_again(call, Request(), Work(), IMPATIENT_S)  # type: ignore[arg-type]
    assert "Call train_adapter again with the same arguments" in text_of(answer)
    assert "xxx" not in str(answer)


async def test_a_call_with_other_arguments_is_another_call(calls: LongCalls) -> None:
    work = Work()
    await calls.call_again(params(adapter_path="web"), Request(), work, IMPATIENT_S)  # type: ignore[arg-type]
    await calls.call_again(params(adapter_path="api"), Request(), work, IMPATIENT_S)  # type: ignore[arg-type]
    assert work.starts == 2


async def test_an_error_reaches_the_request_that_waits(calls: LongCalls) -> None:
    work = Work(ValueError("it broke"))
    await calls.call_again(params(), Request(), work, IMPATIENT_S)  # type: ignore[arg-type]
    work.may_end.set()
    with pytest.raises(ValueError, match="it broke"):
        await calls.call_again(params(), Request(), work, PATIENT_S)  # type: ignore[arg-type]


async def test_a_cancelled_request_cancels_the_call_and_an_equal_one_starts_anew(calls: LongCalls) -> None:
    work = Work()
    with anyio.move_on_after(IMPATIENT_S):
        await calls.call_again(params(), Request(), work, PATIENT_S)  # type: ignore[arg-type]
    await anyio.lowlevel.checkpoint()
    assert work.was_cancelled
    await calls.call_again(params(), Request(), work, IMPATIENT_S)  # type: ignore[arg-type]
    assert work.starts == 2


async def test_a_call_is_not_cancelled_while_another_request_waits_for_it(calls: LongCalls) -> None:
    work = Work()
    results: list[Any] = []

    async def wait() -> None:
        results.append(await calls.call_again(params(), Request(), work, PATIENT_S))  # type: ignore[arg-type]

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        with anyio.move_on_after(IMPATIENT_S):
            await calls.call_again(params(), Request(), work, PATIENT_S)  # type: ignore[arg-type]
        work.may_end.set()
    assert [text_of(result) for result in results] == ["result 1"]


async def test_a_call_that_ends_soon_is_not_kept(calls: LongCalls) -> None:
    work = Work()
    kept = await calls.call(params(), Request(), work, IMPATIENT_S)  # type: ignore[arg-type]
    assert isinstance(kept, LongCall)
    assert calls.get(kept.call_id) is kept
    work.may_end.set()
    result: Any = await calls.call(params(), Request(), work, PATIENT_S)  # type: ignore[arg-type]
    assert text_of(result) == "result 2"


async def end_unfetched(calls: LongCalls, work: Work, call: CallToolRequestParams) -> None:
    """Make a call that is answered before it ends, and let it end."""
    await calls.call_again(call, Request(), work, IMPATIENT_S)  # type: ignore[arg-type]
    work.may_end.set()
    await anyio.wait_all_tasks_blocked()


async def test_a_load_that_succeeded_is_made_again_and_not_replayed(calls: LongCalls) -> None:
    work = Work(data={"status": "loaded"})
    await end_unfetched(calls, work, params(adapter_path="web"))
    answer: Any = await calls.call_again(params(adapter_path="web"), Request(), work, PATIENT_S)  # type: ignore[arg-type]
    assert text_of(answer) == "result 2"


@pytest.mark.parametrize("tool", ["load_adapter", "refresh_project", "export_adapter"])
async def test_a_result_answers_an_equal_call_only_until_another_call_may_have_changed_it(
    calls: LongCalls, tool: str
) -> None:
    work, call = Work(data={"status": "fallback"}), CallToolRequestParams(name=tool, arguments={"project_id": "web"})
    await end_unfetched(calls, work, call)
    calls.move_on(call)
    answer: Any = await calls.call_again(call, Request(), work, PATIENT_S)  # type: ignore[arg-type]
    assert text_of(answer) == "result 1", "an equal call fetches it"

    work.may_end = anyio.Event()
    await end_unfetched(calls, work, call)
    calls.move_on(params(adapter_path="api"))
    answer = await calls.call_again(call, Request(), work, PATIENT_S)  # type: ignore[arg-type]
    assert text_of(answer) == "result 3"


async def test_a_result_answers_an_equal_call_for_a_few_minutes_only(
    calls: LongCalls, monkeypatch: pytest.MonkeyPatch
) -> None:
    work, call = Work(), CallToolRequestParams(name="refresh_project", arguments={"project_id": "web"})
    await end_unfetched(calls, work, call)
    monkeypatch.setattr("server.long_calls.REPEATED_WITHIN_S", -1.0)
    answer: Any = await calls.call_again(call, Request(), work, PATIENT_S)  # type: ignore[arg-type]
    assert text_of(answer) == "result 2"


@pytest.mark.parametrize(("between", "text"), [("get_training_status", "result 1"), ("generate", "result 2")])
async def test_a_client_that_only_looks_may_still_fetch_a_result_and_one_that_generates_has_moved_on(
    between: str, text: str
) -> None:
    work, tasks = Work(), Tasks(IMPATIENT_S, read_only=read_only_tools(TOOLS))

    async def other(_ctx: Any) -> None:
        return None

    async with anyio.create_task_group() as group:
        tasks.start(group)
        await tasks.intercept_tool_call(params(), Request(), work)  # type: ignore[arg-type]
        work.may_end.set()
        await anyio.wait_all_tasks_blocked()
        await tasks.intercept_tool_call(CallToolRequestParams(name=between), Request(), other)  # type: ignore[arg-type]
        answer: Any = await tasks.intercept_tool_call(params(), Request(), work)  # type: ignore[arg-type]
    assert text_of(answer) == text


async def test_a_call_that_is_still_at_work_is_joined_whatever_was_called_meanwhile(calls: LongCalls) -> None:
    work = Work(data={"status": "loaded"})
    await calls.call_again(params(adapter_path="web"), Request(), work, IMPATIENT_S)  # type: ignore[arg-type]
    calls.move_on(params(adapter_path="api"))
    work.may_end.set()
    answer: Any = await calls.call_again(params(adapter_path="web"), Request(), work, PATIENT_S)  # type: ignore[arg-type]
    assert text_of(answer) == "result 1"


@pytest.mark.parametrize(
    ("tool", "config", "is_long"),
    [
        ("train_adapter", {"run_on": "cluster"}, True),
        ("inspect_training_data", {"run_on": "cluster", "rank": 8}, True),
        ("train_adapter", '{"run_on": "cluster"}', True),
        ("train_adapter", "{", False),
        ("refresh_project", None, True),  # the project may have been trained there
        ("train_adapter", {"run_on": "here"}, False),
        ("train_adapter", None, False),
        ("evaluate_adapter", {"run_on": "cluster"}, False),
        ("load_adapter", None, True),
    ],
)
def test_calls_that_may_ask_a_cluster_are_long(tool: str, config: dict[str, Any] | str | None, is_long: bool) -> None:
    arguments = {"project_id": "web"} | ({} if config is None else {"config": config})
    assert may_be_long(CallToolRequestParams(name=tool, arguments=arguments)) is is_long


async def test_a_training_that_waits_for_a_cluster_is_queued_once_and_says_what_it_waits_for(calls: LongCalls) -> None:
    started, may_end = 0, anyio.Event()

    async def ask_cluster(_ctx: Any) -> CallToolResult:
        nonlocal started
        started += 1
        await may_end.wait()
        return CallToolResult(content=[TextContent(type="text", text="queued")])

    given = {"project_id": "web", "config": {"run_on": "cluster"}}
    call = CallToolRequestParams(name="train_adapter", arguments=given)
    answer: Any = await calls.call_again(call, Request(), ask_cluster, IMPATIENT_S)  # type: ignore[arg-type]
    assert "waiting for the answer of the cluster" in text_of(answer)
    assert data_of(answer)["next_step"] == {"tool": "train_adapter", "arguments": given}
    may_end.set()
    answer = await calls.call_again(call, Request(), ask_cluster, PATIENT_S)  # type: ignore[arg-type]
    assert (text_of(answer), started) == ("queued", 1)
