"""A job handle waits for the end of a job, reports its progress, and raises why it did not complete."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from peft_core.errors import TrainingError
from peft_core.jobs.handle import TrainingJob
from peft_core.schemas.results import ErrorInfo, Status, TrainingStatus


def status(state: Status, **changes: Any) -> TrainingStatus:
    return TrainingStatus(job_id="j", project_id="web", status=state, **changes)


RUNNING = [status(Status.IN_PROGRESS, step=step) for step in range(1, 4)]
COMPLETED = status(Status.COMPLETED, adapter_path="/a")


def job(states: Sequence[TrainingStatus], **options: Any) -> TrainingJob:
    async def watch(_timeout_s: float | None) -> AsyncIterator[TrainingStatus]:
        for state in states:
            yield state

    async def cancel() -> TrainingStatus:
        return status(Status.CANCELLED)

    return TrainingJob(status(Status.QUEUED), watch=watch, cancel=cancel, **options)


async def test_awaiting_a_job_returns_its_final_status_every_time() -> None:
    handle = job([*RUNNING, COMPLETED])
    assert (handle.job_id, handle.project_id, handle.status.status) == ("j", "web", Status.QUEUED)
    assert await handle == COMPLETED
    assert await handle.result() == COMPLETED
    assert handle.status == COMPLETED


@pytest.mark.parametrize("is_async", [True, False])
async def test_progress_is_reported_to_functions_and_coroutine_functions(is_async: bool) -> None:
    seen: list[TrainingStatus] = []

    async def on_progress(state: TrainingStatus) -> None:
        seen.append(state)

    await job([*RUNNING, COMPLETED], on_progress=on_progress if is_async else seen.append)
    assert seen == [*RUNNING, COMPLETED]


async def test_the_interval_leaves_out_states_between_but_never_the_last() -> None:
    seen: list[TrainingStatus] = []
    await job([*RUNNING, COMPLETED], on_progress=seen.append, interval_s=3600)
    assert seen == [RUNNING[0], COMPLETED]


@pytest.mark.parametrize("state", [Status.FAILED, Status.CANCELLED, Status.INTERRUPTED])
async def test_a_job_that_did_not_complete_raises_why(state: Status) -> None:
    error = ErrorInfo(code="killed", message="Out of memory.", suggestions=("Close other programs",))
    ended = status(state, error=None if state is Status.CANCELLED else error, next="Call resume_training.")
    with pytest.raises(TrainingError, match=f"'web' \\(j\\) was not completed, it is {state}") as caught:
        await job([*RUNNING, ended])
    expected = ("cancelled", "Call resume_training.") if ended.error is None else ("killed", "Close other programs")
    assert (caught.value.code, caught.value.suggestions[0]) == expected
    assert caught.value.details == {"job_id": "j", "status": state.value}


async def test_what_on_progress_raises_ends_the_waiting_only() -> None:
    def refuse(_status: TrainingStatus) -> None:
        raise ValueError("enough")

    handle = job([*RUNNING, COMPLETED], on_progress=refuse)
    with pytest.raises(ValueError, match="enough"):
        await handle
    assert handle.status == RUNNING[0]


async def test_a_job_that_has_not_ended_in_time_continues() -> None:
    handle = job(RUNNING)
    with pytest.raises(TimeoutError, match="has not ended within 2 s; it continues"):
        await handle.result(timeout_s=2)
    assert (await handle.cancel()).status is Status.CANCELLED
    assert handle.status.status is Status.CANCELLED
