"""The runner: a detached process without torch that drains the queue.

    python -m peft_core.jobs.runner SETTINGS_AS_JSON

The runner holds the queue's lock. It gives each job to a process of its own, and turns the events that the process writes
(JSON lines) and its exit code into events of the job. No other process changes the state of a job in progress.
One job at a time trains on this machine. A job that started by itself waits until the machine is free, and is paused when it no
longer is. Jobs that train on a cluster are followed beside it, by a bridge process each.
The runner exits when the queue is empty, or when another runner holds the lock: that one looks at the queue once more after
releasing it, so that a job inserted meanwhile is not forgotten.
"""

from __future__ import annotations

import signal
import sys
import time
from contextlib import suppress

import anyio
from anyio.abc import TaskGroup

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import StorageError
from peft_core.gardener.registry import ProjectRegistry
from peft_core.jobs.cluster_job import ClusterJob
from peft_core.jobs.free_machine import FreeMachine, Limits
from peft_core.jobs.pruning import prune
from peft_core.jobs.recovery import recover, without_process
from peft_core.jobs.running_job import RunnerState, RunningJob
from peft_core.jobs.state import IllegalTransition, Job, in_turn
from peft_core.jobs.store import Store
from peft_core.schemas.events import JobPostponed, JobStarted
from peft_core.schemas.results import Status
from peft_core.system import logs
from peft_core.system.child_process import make_files_private
from peft_core.system.lock import FileLock
from peft_core.system.machine_use import MachineMeter, Measure

LOCK_TIMEOUT_S = 5.0  # longer than any process that only probes the lock holds it
POLL_INTERVAL_S = 0.25  # how often the runner looks at the queue
MAX_BRIDGES = 8  # jobs on the cluster that are followed at a time: each takes a process here


def run(settings: Settings, measure: Measure | None = None) -> None:
    """Run jobs until the queue is empty, or until another runner has taken over.

    `measure`: how much others use the machine; None: as psutil measures it.
    """
    paths = settings.paths
    measure = measure or MachineMeter(paths.model_activity)
    store = Store(paths.database, time.time, ProjectRegistry(paths).show)
    registry = Registry(paths)
    lock = FileLock(paths.runner_lock)
    while lock.acquire(LOCK_TIMEOUT_S):
        with lock:
            # kill-point: runner: the lock is taken, a job is queued
            recover(store, registry)
            machine = FreeMachine(Limits.of(settings))
            stopped = anyio.run(Runner(RunnerState(store, registry, settings, lock, machine, measure)).drain)
        if stopped or not without_process(store):
            return


class Runner:
    """Runs queued jobs while its caller holds the queue's lock."""

    def __init__(self, state: RunnerState) -> None:
        self._state = state
        self._store = state.store
        self._running: dict[str, RunningJob] = {}  # by job id
        self._job_ended = anyio.Event()

    async def drain(self) -> bool:
        """Run the queued jobs, and those that an earlier runner left on the cluster; return True if a signal ended this early.

        Raises:
            StorageError: The data directory was removed; another runner may work in a new one of the same name.
        """
        # Plain signal handlers set the flag immediately. A task would notice the signal only when the event loop runs it, and
        # the next job could have started by then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self._stop())
        async with anyio.create_task_group() as group:
            for job in self._store.in_state(Status.IN_PROGRESS):
                self._start(ClusterJob(job, self._state), group)
            # kill-point: runner: the queue is about to be read
            while not self._state.is_stopping:
                queued = in_turn(self._store.in_state(Status.QUEUED))
                if not queued and not self._running:
                    break
                self._start_what_may(queued, group)
                with anyio.move_on_after(POLL_INTERVAL_S):
                    await self._job_ended.wait()
                self._require_directory()
        return self._state.is_stopping

    def _stop(self) -> None:
        self._state.is_stopping = True

    def _start_what_may(self, queued: list[Job], group: TaskGroup) -> None:
        """Start the jobs for which there is a place, on this machine and on the cluster."""
        bridges = sum(isinstance(job, ClusterJob) for job in self._running.values())
        places_here = 1 - (len(self._running) - bridges)
        here = [job for job in queued if not job.on_cluster][:places_here]
        there = [job for job in queued if job.on_cluster][: MAX_BRIDGES - bridges]
        for job in [*there, *here]:
            if job.only_while_free and not job.on_cluster and not self._is_machine_free(job):
                continue
            try:
                started = self._store.append(job.job_id, JobStarted())
            except IllegalTransition:
                continue  # it was cancelled in between
            # kill-point: runner: the job is marked as started, nothing is done
            if started.on_cluster:
                self._start(ClusterJob(started, self._state), group)
            else:
                self._start(RunningJob(started, self._state), group)

    def _start(self, job: RunningJob, group: TaskGroup) -> None:
        self._running[job.job.job_id] = job
        group.start_soon(self._run, job)

    async def _run(self, job: RunningJob) -> None:
        await job.run()
        del self._running[job.job.job_id]
        settings = self._state.settings
        prune(self._store, self._state.registry, settings.paths, keep=settings.keep_runs)
        self._job_ended.set()
        self._job_ended = anyio.Event()

    def _is_machine_free(self, job: Job) -> bool:
        """Return whether the machine is free for a job that started by itself; if not, record why."""
        if (use := self._state.measure_at_intervals()) is None:
            return False
        machine = self._state.machine
        reason = machine.why_wait(use, time.monotonic(), needed_bytes=job.request.estimate.memory_bytes)
        if not reason:
            return True
        is_known = reason == job.waits_for or (job.waits_for and reason == machine.settling)
        if not is_known:
            with suppress(IllegalTransition):  # it was cancelled, or asked for
                self._store.append(job.job_id, JobPostponed(reason=reason))
        return False

    def _require_directory(self) -> None:
        if not self._state.lock.is_current:
            root = self._state.settings.data_dir
            raise StorageError(f"The data directory {root} was removed.", code="data_directory_gone")


def main(arguments: list[str]) -> None:
    make_files_private()
    settings = Settings.model_validate_json(arguments[0])
    logs.configure(settings.log_level)
    run(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
