"""When progress is sent, and that a call is never silent for long."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest

import server.progress
from peft_core.jobs.status import status_of
from peft_core.schemas.results import Phase, Status, TrainingStatus
from server.long_calls import LongCall
from server.progress import Report, recipient, stream_progress, with_progress
from tests.factories import make_job

Sent = list[tuple[float, float | None, str]]


class FakeContext:
    """Keeps what would be sent to the client."""

    def __init__(self) -> None:
        self.sent: Sent = []
        self.changed = anyio.Event()

    async def report_progress(self, progress: float, total: float | None, message: str) -> None:
        self.sent.append((progress, total, message))
        self.changed.set()
        self.changed = anyio.Event()

    async def wait_for(self, count: int) -> None:
        with anyio.fail_after(30):
            while len(self.sent) < count:
                await self.changed.wait()


async def test_each_stage_is_sent_at_its_beginning_and_growth_is_not() -> None:
    context: Any = FakeContext()

    async def work(report: Report) -> str:
        await report(0, None, "starting")
        await report(0, None, "loading")
        await report(1, 9, "loading")
        return "done"

    assert await with_progress(context, work) == "done"
    assert [message for _, _, message in context.sent] == ["starting", "loading"]


async def test_a_silent_call_repeats_its_message_with_growing_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.progress, "HEARTBEAT_S", 0.01)
    context: Any = FakeContext()

    async def work(report: Report) -> None:
        await report(0, 5, "loading")
        await context.wait_for(4)

    await with_progress(context, work)
    progress = [done for done, _, _ in context.sent]
    assert progress == sorted(set(progress))
    assert all(message.startswith("loading (0 s)") for _, _, message in context.sent[1:])
    assert {total for _, total, _ in context.sent} == {5}


async def test_an_error_of_the_operation_is_raised_as_it_is() -> None:
    context: Any = FakeContext()

    async def work(_: Report) -> None:
        raise ValueError("it broke")

    with pytest.raises(ValueError, match="it broke"):
        await with_progress(context, work)


async def test_the_progress_of_a_long_call_goes_to_the_call() -> None:
    context: Any = FakeContext()
    call = LongCall("load_adapter")
    token = recipient.set(call)
    try:
        await with_progress(context, lambda report: report(0, None, "loading"))
    finally:
        recipient.reset(token)
    assert call.message == "loading"
    assert context.sent == []


async def test_a_job_is_streamed_with_its_percentage_and_the_last_status_is_returned() -> None:
    context: Any = FakeContext()
    job = make_job(status=Status.IN_PROGRESS, phase=Phase.TRAINING, step=5, total_steps=10)
    statuses = [status_of(job.model_copy(update={"step": step}), None, Path("none"), now=0.0) for step in (5, 6)]

    async def stream() -> AsyncIterator[TrainingStatus]:
        for status in statuses:
            yield status

    assert await stream_progress(context, stream()) == statuses[1]
    assert context.sent == [(52.0, 100.0, "training: step 5/10")]
