"""A job that trains on a cluster: its process here is a bridge, which starts or finds the remote run and follows it.

The remote run depends neither on the bridge nor on the runner. So a bridge that dies is started again, and a runner that stops
leaves the job in progress for the next one. `cluster/bridge.py` has the contract of the bridge.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

import anyio
from anyio.abc import Process

from peft_core.jobs.running_job import RunnerState, RunningJob, end_process
from peft_core.jobs.state import Job
from peft_core.schemas.events import (
    AdapterWritten,
    Event,
    JobCancelled,
    JobFailed,
    JobInterrupted,
    JobStarted,
    PhaseStarted,
)
from peft_core.system.cancellation import CANCELLED_EXIT_CODE, DETACHED_EXIT_CODE

BRIDGE = ["-m", "peft_core.cluster.bridge"]
GRACE_S = 120.0  # between SIGTERM and SIGKILL: the remote run writes a checkpoint, which is fetched
MAX_DEATHS = 3  # of bridges in succession that recorded nothing
MAX_REPEATED = 1_000_000  # events of a remote run, which keeps 256 MiB of them


class RecordedEvents:
    """The recorded events of a job. A bridge repeats those of the remote run, in the order in which they are recorded.

    So each of them is matched once: a new event is not taken for an equal one before those that were matched.
    """

    def __init__(self, events: Sequence[Event]) -> None:
        self._texts = [event.model_dump_json() for event in events]
        starts = [place for place, event in enumerate(events) if isinstance(event, JobStarted)]
        self._started_at = starts[-1] if starts else 0
        self._place = 0  # behind the one that was matched last

    def has(self, event: Event) -> bool:
        """Return whether this event is recorded. A job that was resumed passes through its phases again."""
        try:
            found = self._texts.index(event.model_dump_json(), self._place)
        except ValueError:
            return False
        self._place = found + 1
        return not isinstance(event, PhaseStarted) or found > self._started_at


class ClusterJob(RunningJob):
    """A job in progress that trains on a cluster."""

    process_name = "bridge to the cluster"

    def __init__(self, job: Job, runner: RunnerState) -> None:
        super().__init__(job, runner)
        self._ends_at = float("inf")  # the remote run keeps the time limit: it counts while this machine is off
        self._news = 0  # events that this bridge has recorded
        self._can_be_signalled = anyio.Event()

    async def _run_process(self) -> tuple[Event | None, int]:
        deaths = 0
        while True:
            self._news, self._can_be_signalled = 0, anyio.Event()
            last_event, code = await super()._run_process()
            died = last_event is None and (code < 0 or code == DETACHED_EXIT_CODE)
            if not died or self._is_to_end():
                return last_event, code
            deaths = 1 if self._news else deaths + 1
            if deaths >= MAX_DEATHS:
                return last_event, code
            self._log.warning("the bridge died and is started again", code=code)

    def _module(self) -> list[str]:
        return BRIDGE

    def _launcher(self) -> list[str]:
        return []

    def _started(self, process: Process) -> None:
        """Leave the bridge its priority: it computes nothing."""

    def _repeats(self) -> Callable[[Event], bool]:
        recorded = RecordedEvents(self._store.newest_events(self.job.job_id, MAX_REPEATED)[::-1])

        def is_repeated(event: Event) -> bool:
            self._can_be_signalled.set()
            if recorded.has(event):
                return True
            self._news += 1
            return False

        return is_repeated

    def _why_pause(self) -> str:
        return ""  # this machine may be in use

    async def _end_on_request(self, process: Process) -> None:
        """Have the bridge cancel the remote run if that is requested, or detach from it if the runner is to stop."""
        await self._requested_to_end()
        if not self._store.cancel_requested(self.job.job_id):
            await self._end(process)
            return
        with anyio.move_on_after(GRACE_S):  # earlier, the signal would end the bridge but not the remote run
            await self._can_be_signalled.wait()
        await end_process(process, signal.SIGTERM, GRACE_S)

    async def _end(self, process: Process) -> None:
        """End the bridge, but not the remote run."""
        await end_process(process, signal.SIGHUP, GRACE_S)

    def _outcome(self, last_event: Event | None, code: int) -> Event | None:
        is_result = isinstance(last_event, AdapterWritten) and code == 0
        is_cancelled = self._store.cancel_requested(self.job.job_id)
        if self._runner.is_stopping and not is_result and not is_cancelled:
            return None
        if isinstance(last_event, JobFailed | JobInterrupted) and not is_cancelled:
            return last_event
        if is_cancelled and isinstance(last_event, JobInterrupted):
            return JobCancelled(note=last_event.reason.removesuffix("."))
        return super()._outcome(last_event, code)

    def _was_stopped(self, code: int) -> bool:
        return code == CANCELLED_EXIT_CODE
