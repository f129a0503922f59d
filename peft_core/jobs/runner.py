"""The runner: a detached process without torch that drains the queue, one job at a time.

    python -m peft_core.jobs.runner SETTINGS_AS_JSON

The runner holds the queue's lock. It gives each job to a worker process of its own, and turns the events that the worker
writes (JSON lines) and its exit code into events of the job. No other process changes the state of a job in progress.
A job that started by itself waits until the machine is free, and is paused when it no longer is.
The runner exits when the queue is empty, or when another runner holds the lock: that one looks at the queue once more after
releasing it, so that a job inserted meanwhile is not forgotten.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import anyio
import structlog
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream

from peft_core.adapters.manifest import read_manifest
from peft_core.adapters.registry import Registry
from peft_core.adapters.verify import verify
from peft_core.config import Settings
from peft_core.errors import StorageError, TrainingError
from peft_core.gardener.registry import ProjectRegistry
from peft_core.jobs.free_machine import FreeMachine, Limits
from peft_core.jobs.pruning import prune
from peft_core.jobs.recovery import completed_by, completed_evaluation, exit_error, recover
from peft_core.jobs.state import IllegalTransition, Job, in_turn
from peft_core.jobs.store import Store
from peft_core.paths import JobPaths
from peft_core.schemas.events import (
    EVENT,
    AdapterWritten,
    Event,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobInterrupted,
    JobPostponed,
    JobStarted,
    PhaseStarted,
    RunPlanned,
)
from peft_core.schemas.results import ErrorInfo, Phase, Status
from peft_core.schemas.task import TrainingTask
from peft_core.system import logs
from peft_core.system.cancellation import CANCELLED_EXIT_CODE
from peft_core.system.child_process import LineTooLongError, child_environment, make_files_private, receive_line
from peft_core.system.failures import TaskKind, error_info
from peft_core.system.lock import FileLock
from peft_core.system.machine_use import MachineMeter, Measure

WORKER = ["-m", "peft_core.worker"]
LOCK_TIMEOUT_S = 5.0  # longer than any process that only probes the lock holds it
POLL_INTERVAL_S = 0.25  # how often the runner checks whether the running job is to be cancelled
NICENESS = 15  # of a worker whose job started by itself: others get the processors first
MEASURE_INTERVAL_S = 2.0  # between two looks at how much others use the machine
GRACE_S = 20.0  # between SIGTERM and SIGKILL: enough time for a micro-batch and a checkpoint
MAX_LINE = 1 << 20
MAX_REPLAYED_EVENTS = 2000  # events that a resumed run may emit again
RUNNER = TaskKind(
    name="runner",
    crash_code="runner_failed",
    log="logs/runner.log in the data directory",
    memory_advice=("Close other programs, then resume the training.",),
    memory_code="runner_failed",  # the job itself is not too large: an unchanged run may succeed
)

log = structlog.get_logger(__name__)


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
            stopped = anyio.run(Runner(store, registry, lock, settings, measure).drain)
        if stopped or not store.in_state(Status.QUEUED):
            return


class Runner:
    """Runs queued jobs while its caller holds the queue's lock."""

    def __init__(self, store: Store, registry: Registry, lock: FileLock, settings: Settings, measure: Measure) -> None:
        self._store = store
        self._registry = registry
        self._paths = settings.paths
        self._lock = lock
        self._log_level = settings.log_level
        self._keep_runs = settings.keep_runs
        self._allowed_roots = settings.allowed_roots
        self._launcher = shlex.split(settings.launcher or "")
        self._stopping = False
        self._measure = measure
        self._machine = FreeMachine(Limits.of(settings))
        self._pause = ""  # why the running job is paused
        self._ends_at = float("inf")  # when the time limit of the running job is reached, by the monotonic clock

    async def drain(self) -> bool:
        """Run the queued jobs one after the other; return True if a signal ended this early."""
        # Plain signal handlers set the flag immediately. A task would notice the signal only when the event loop runs it, and
        # the next job could have started by then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self._stop())
        # kill-point: runner: the queue is about to be read
        while not self._stopping and (queued := in_turn(self._store.in_state(Status.QUEUED))):
            if queued[0].only_while_free and not await self._may_start(queued[0]):
                continue  # it still waits, or another job goes first
            try:
                job = self._store.append(queued[0].job_id, JobStarted())
            except IllegalTransition:
                continue  # it was cancelled in between
            # kill-point: runner: the job is marked as started, nothing is done
            await self._run(job)
            prune(self._store, self._registry, self._paths, keep=self._keep_runs)
        return self._stopping

    def _stop(self) -> None:
        self._stopping = True

    async def _may_start(self, job: Job) -> bool:
        """Return whether the machine is free for a job that started by itself; if not, record why and wait for some time.

        Returns False early if the queue has changed.

        Raises:
            StorageError: The data directory was removed.
        """
        reason = self._machine.why_wait(
            self._measure(), time.monotonic(), needed_bytes=job.request.estimate.memory_bytes
        )
        if not reason:
            return True
        is_known = reason == job.waits_for or (job.waits_for and reason == self._machine.settling)
        if not is_known:
            with suppress(IllegalTransition):  # it was cancelled, or asked for
                self._store.append(job.job_id, JobPostponed(reason=reason))
        deadline = time.monotonic() + MEASURE_INTERVAL_S
        while not self._stopping and time.monotonic() < deadline:
            await anyio.sleep(POLL_INTERVAL_S)
            self._require_directory()
            queued = in_turn(self._store.in_state(Status.QUEUED))
            if not queued or queued[0].job_id != job.job_id or not queued[0].only_while_free:
                break
        return False

    async def _run(self, job: Job) -> None:
        bound = log.bind(job_id=job.job_id)
        bound.info("started", project_id=job.project_id)
        paths = self._paths.job(job.job_id)
        self._pause = ""
        minutes = job.request.config.max_minutes
        self._ends_at = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        try:
            # kill-point: runner: the worker is about to be started
            last_event, code = await self._run_worker(job, paths)
            # kill-point: runner: the worker has ended
            event = self._outcome(job, paths, last_event, code)
        except Exception as error:  # noqa: BLE001 -- the edge of a job: it must not stay in progress
            bound.exception("runner failed")
            # If the store fails here too, the job stays in progress, and the next runner recovers it.
            event = completed_by(self._store.get(job.job_id), self._registry) or JobFailed(
                error=error_info(error, RUNNER)
            )
        self._store.append(job.job_id, event)
        if isinstance(event, JobPostponed) and self._store.cancel_requested(job.job_id):  # a moment ago
            event = JobCancelled()
            self._store.append(job.job_id, event)
        if isinstance(event, JobCompleted):
            # kill-point: runner: the job is completed, its checkpoint still exists
            delete_checkpoint(paths)
        bound.info("ended", outcome=event.kind)

    async def _run_worker(self, job: Job, paths: JobPaths) -> tuple[Event | None, int]:
        """Run the job's worker to its end; return its final event and its exit code."""
        paths.root.mkdir(parents=True, exist_ok=True)
        task = TrainingTask(
            job_id=job.job_id,
            project_id=job.project_id,
            request=job.request,
            job_dir=paths.root,
            base_models_dir=self._paths.base_models,
            data_dir=self._paths.root,
            allowed_roots=self._allowed_roots,
        )
        paths.task.write_text(task.model_dump_json(), encoding="utf-8")
        launcher = self._launcher if task.kind == "train" else []
        with paths.log.open("ab") as log_file:
            process = await anyio.open_process(
                [*(launcher or [sys.executable]), *WORKER, str(paths.task)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log_file,
                cwd=paths.root,
                env={**child_environment(launched=bool(launcher)), "CODEBASE_GARDENER_LOG_LEVEL": self._log_level},
                pass_fds=[self._lock.descriptor],  # the queue stays locked until the worker is gone as well
            )
        async with process:
            if job.only_while_free:
                with suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._end_on_request, job.job_id, process)
                    assert process.stdout is not None  # noqa: S101 -- it was requested as a pipe
                    # kill-point: runner: the worker is started
                    last_event = await self._follow(job.job_id, process.stdout)
                    code = await process.wait()
                    group.cancel_scope.cancel()
            except BaseException:  # for any reason: nothing reads this worker's events any more
                await _end(process)
                raise
        return last_event, code

    async def _follow(self, job_id: str, stdout: ByteReceiveStream) -> Event | None:
        """Record the worker's events until it closes its output; return the final event without recording it.

        A resumed run first emits again what it emitted since its last checkpoint; events that are recorded already are skipped.

        Raises:
            TrainingError: A line is too long.
        """
        recorded: set[str] | None = {
            event.model_dump_json() for event in self._store.newest_events(job_id, MAX_REPLAYED_EVENTS)
        }
        stream = BufferedByteReceiveStream(stdout)
        last_event: Event | None = None
        while True:
            try:
                line = await receive_line(stream, MAX_LINE)
            except LineTooLongError:
                raise TrainingError(
                    f"The worker process wrote an event of more than {MAX_LINE} bytes and was stopped.",
                    code="endless_event",
                    suggestions=["This is a bug: please report it with the log of the job"],
                ) from None
            if line is None:
                return last_event
            try:
                event = EVENT.validate_json(line)
                if isinstance(event, RunPlanned):
                    recorded = None
                if isinstance(event, AdapterWritten | JobFailed):
                    last_event = event
                elif recorded is None or isinstance(event, PhaseStarted) or event.model_dump_json() not in recorded:
                    # kill-point: runner: an event of the worker is about to be recorded (pass 3)
                    self._store.append(job_id, event)
                    # kill-point: runner: an event of the worker is recorded (pass 8)
            except (ValueError, IllegalTransition) as error:
                log.warning("unusable event", job_id=job_id, line=line[:200], error=str(error))

    def _outcome(self, job: Job, paths: JobPaths, last_event: Event | None, code: int) -> Event:
        """Return the event that ends a job whose worker has exited, or puts it back into the queue.

        A cancellation that was requested takes precedence over a result, a result over a request to pause or stop, and that
        over the worker's own error, because a worker that is stopped may fail on its way out.
        """
        if self._store.cancel_requested(job.job_id):
            return JobCancelled()
        if isinstance(last_event, AdapterWritten) and code == 0:
            return self._publish(job, paths, last_event)
        if code == 0 and (completed := completed_evaluation(self._store.get(job.job_id))) is not None:
            self._write_report(job, paths)
            return completed
        if self._stopping or self._pause or self._is_out_of_time or code == CANCELLED_EXIT_CODE:
            return self._stopped(job)
        if isinstance(last_event, JobFailed):
            return last_event
        return JobFailed(error=exit_error(code, paths.log, process=f"{job.request.noun} process"))

    def _stopped(self, job: Job) -> Event:
        """Return the event of a job whose worker was asked to stop."""
        if self._pause and not self._stopping:
            return JobPostponed(reason=self._pause)
        if self._is_out_of_time and not self._stopping:
            limit = f"config.max_minutes = {job.request.config.max_minutes:g}"
            return JobInterrupted(reason=f"The time limit was reached: {limit}.")
        return JobInterrupted(reason=f"The {job.request.noun} was asked to stop (SIGTERM), for instance at shutdown.")

    def _publish(self, job: Job, paths: JobPaths, written: AdapterWritten) -> Event:
        """Verify the adapter that the worker wrote and publish it; return the event that ends the job."""
        # kill-point: runner: the adapter is about to be published
        self._store.append(job.job_id, PhaseStarted(phase=Phase.PUBLISHING))
        # kill-point: runner: the phase is publishing, the adapter is unchecked
        errors = [reason for reason in verify(paths.adapter, job.request.base).reasons if reason.severity == "error"]
        if errors:
            return JobFailed(
                error=ErrorInfo(
                    code="adapter_rejected",
                    message="The adapter that training wrote did not pass verification: "
                    + "; ".join(reason.message for reason in errors[:3]),
                    suggestions=(f"This is a bug: please report it with the log {paths.log}",),
                )
            )
        self._write_report(job, paths)
        # kill-point: runner: the adapter is checked
        published = self._registry.publish(paths.adapter, job.project_id, job.job_id)
        # kill-point: runner: the adapter is published, the job is not completed
        return JobCompleted(adapter_path=str(published), metrics=written.metrics)

    def _write_report(self, job: Job, paths: JobPaths) -> None:
        """Write the HTML report. A failure is logged only: an adapter without a report is complete."""
        # Deferred, because jinja2 is needed once per job only:
        from peft_core.evaluation.report import write_evaluation_report, write_training_report  # noqa: PLC0415

        try:
            if job.request.evaluated is not None:
                write_evaluation_report(paths.root, job.request, self._store.events(job.job_id))
            elif (manifest := read_manifest(paths.adapter)) is not None:
                write_training_report(paths.adapter, manifest, self._store.events(job.job_id))
        except Exception:
            log.exception("no report", job_id=job.job_id)

    async def _end_on_request(self, job_id: str, process: Process) -> None:
        """Wait for a request to cancel or pause the job or to stop the runner, or for its time limit; then end the worker.

        Raises:
            StorageError: The data directory was removed; another runner may work in a new one of the same name.
        """
        measured_at = float("-inf")
        while not (self._stopping or self._is_out_of_time or self._store.cancel_requested(job_id)):
            await anyio.sleep(POLL_INTERVAL_S)
            self._require_directory()
            if time.monotonic() - measured_at >= MEASURE_INTERVAL_S:
                measured_at = time.monotonic()
                if reason := self._why_pause(job_id):
                    self._pause = reason
                    break
        await _end(process)

    @property
    def _is_out_of_time(self) -> bool:
        return time.monotonic() >= self._ends_at

    def _why_pause(self, job_id: str) -> str:
        """Return why the running job must make way; "" if a user asked for it, or nothing else needs the machine."""
        if not self._store.get(job_id).only_while_free:
            return ""
        if any(not job.only_while_free for job in self._store.in_state(Status.QUEUED)):
            return "a job that was asked for goes first"
        return self._machine.why_pause(self._measure(), time.monotonic())

    def _require_directory(self) -> None:
        if not self._lock.is_current:
            raise StorageError(f"The data directory {self._paths.root} was removed.", code="data_directory_gone")


async def _end(process: Process) -> None:
    """End a worker with SIGTERM, and with SIGKILL if it is still alive after the grace period."""
    with anyio.CancelScope(shield=True):
        with suppress(ProcessLookupError):
            process.terminate()
        with anyio.move_on_after(GRACE_S):
            await process.wait()
            return
        log.warning("worker did not end in time", grace_s=GRACE_S)
        with suppress(ProcessLookupError):
            process.kill()


def delete_checkpoint(paths: JobPaths) -> None:
    """Delete the checkpoint of a completed job, which is never resumed."""
    shutil.rmtree(paths.checkpoint, ignore_errors=True)


def main(arguments: list[str]) -> None:
    make_files_private()
    settings = Settings.model_validate_json(arguments[0])
    logs.configure(settings.log_level)
    run(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
