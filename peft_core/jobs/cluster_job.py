"""A job that trains on a cluster: its process here is a bridge, which starts or finds the remote run and follows it.

The remote run depends neither on the bridge nor on the runner. So a bridge that dies is started again, and a runner that stops
leaves the job in progress for the next one. `cluster/bridge.py` has the contract of the bridge.
"""

from __future__ import annotations

import signal
from collections import Counter

import anyio
from anyio.abc import Process

from peft_core.jobs.running_job import RunnerState, RunningJob, end_process
from peft_core.jobs.state import Job
from peft_core.schemas.events import AdapterWritten, Event, JobFailed, JobInterrupted, PhaseStarted
from peft_core.system.cancellation import CANCELLED_EXIT_CODE, DETACHED_EXIT_CODE

BRIDGE = ["-m", "peft_core.cluster.bridge"]
GRACE_S = 90.0  # between SIGTERM and SIGKILL: the remote run writes a checkpoint, which is fetched
MAX_DEATHS = 3  # of bridges in succession that recorded nothing
MAX_FOLLOWED_EVENTS = 100_000


class ClusterJob(RunningJob):
    """A job in progress that trains on a cluster.

    `attached`: an earlier runner has started it.
    """

    process_name = "bridge to the cluster"

    def __init__(self, job: Job, runner: RunnerState, *, attached: bool) -> None:
        super().__init__(job, runner)
        self._ends_at = float("inf")  # the remote run keeps the time limit: it counts while this machine is off
        self._attached = attached
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
            self._attached = True

    def _module(self) -> list[str]:
        return BRIDGE

    def _launcher(self) -> list[str]:
        return []

    def _started(self, process: Process) -> None:
        """Leave the bridge its priority: it computes nothing."""

    def _recorded(self) -> Counter[str]:
        events = self._store.newest_events(self.job.job_id, MAX_FOLLOWED_EVENTS)
        return Counter(event.model_dump_json() for event in events)

    def _is_repeated(self, event: Event, recorded: Counter[str]) -> bool:
        """Return whether this event of the remote run is recorded. Each bridge emits all events from the first.

        An event that happens twice is recorded twice, so each record is matched once. A job that was resumed passes through
        its phases again.
        """
        self._can_be_signalled.set()
        is_phase_of_resumed = isinstance(event, PhaseStarted) and not self._attached
        text = event.model_dump_json()
        if not is_phase_of_resumed and recorded[text] > 0:
            recorded[text] -= 1
            return True
        self._news += 1
        return False

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
        return super()._outcome(last_event, code)

    def _was_stopped(self, code: int) -> bool:
        return code == CANCELLED_EXIT_CODE
