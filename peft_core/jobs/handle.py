"""`TrainingJob`: a training that runs in the background, to await, follow and cancel from Python."""

from __future__ import annotations

import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator
from typing import Any

from peft_core.errors import TrainingError
from peft_core.schemas.results import Status, TrainingStatus

OnProgress = Callable[[TrainingStatus], Awaitable[None] | None]  # synchronous or asynchronous
Watch = Callable[[float | None], AsyncIterator[TrainingStatus]]


class TrainingJob:
    """A training that was queued. It runs on without this object, and its result is kept: it may be awaited again at any time.

        job = await manager.start_training("web", "/code/web", on_progress=print)
        status = await job

    Args:
        status: The state in which it was queued.
        watch: Yields its state at each change, for at most so many seconds.
        cancel: Stops it.
        on_progress: Called with the state while the job is awaited, when it has changed, and at its end.
        interval_s: Least time between two calls of `on_progress`, except for the last.
    """

    def __init__(
        self,
        status: TrainingStatus,
        *,
        watch: Watch,
        cancel: Callable[[], Awaitable[TrainingStatus]],
        on_progress: OnProgress | None = None,
        interval_s: float = 0.0,
    ) -> None:
        self.status = status  # the newest that was seen
        self._watch = watch
        self._cancel = cancel
        self._on_progress = on_progress
        self._interval_s = interval_s

    @property
    def job_id(self) -> str:
        return self.status.job_id or ""

    @property
    def project_id(self) -> str:
        return self.status.project_id

    def __await__(self) -> Generator[Any, Any, TrainingStatus]:
        return self.result().__await__()

    async def result(self, timeout_s: float | None = None) -> TrainingStatus:
        """Wait for the end of the training, and return its final state.

        What `on_progress` raises ends the waiting, but not the training.

        Raises:
            TrainingError: it failed, was cancelled, or was interrupted; `details` has the job's id and its status.
            TimeoutError: it has not ended within `timeout_s` seconds, and continues.
        """
        next_call = 0.0
        async for status in self._watch(timeout_s):
            self.status = status
            if self._on_progress is not None and (status.status.is_final or time.monotonic() >= next_call):
                next_call = time.monotonic() + self._interval_s
                if inspect.isawaitable(answer := self._on_progress(status)):
                    await answer
        if not self.status.status.is_final:
            raise TimeoutError(f"Training {self.job_id} has not ended within {timeout_s:g} s; it continues.")
        if self.status.status is not Status.COMPLETED:
            raise _error(self.status)
        return self.status

    async def cancel(self) -> TrainingStatus:
        """Stop the training, and return its state; see `PEFTManager.cancel_training`."""
        self.status = await self._cancel()
        return self.status


def _error(status: TrainingStatus) -> TrainingError:
    reason = f": {status.error.message}" if status.error is not None else "."
    return TrainingError(
        f"The training of {status.project_id!r} ({status.job_id}) was not completed, it is {status.status}{reason}",
        code=status.error.code if status.error is not None else status.status.value,
        suggestions=status.error.suggestions if status.error is not None else [status.next],
        details={"job_id": status.job_id, "status": status.status.value},
    )
