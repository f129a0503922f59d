"""A job that a runner has started: its process, what that reports, and how the job ends."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import anyio
import structlog
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream

from peft_core.adapters.manifest import read_manifest
from peft_core.adapters.registry import Registry
from peft_core.adapters.verify import verify
from peft_core.config import Settings
from peft_core.errors import TrainingError
from peft_core.jobs.free_machine import FreeMachine
from peft_core.jobs.recovery import completed_by, completed_evaluation, exit_error
from peft_core.jobs.state import IllegalTransition, Job
from peft_core.jobs.store import Store
from peft_core.jobs.sweep import better_run
from peft_core.paths import JobPaths
from peft_core.retrieval.service import earlier_examples
from peft_core.schemas.events import (
    EVENT,
    AdapterWritten,
    Event,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobInterrupted,
    JobPostponed,
    PhaseStarted,
    RunPlanned,
)
from peft_core.schemas.results import ErrorInfo, Phase, Status
from peft_core.schemas.task import TrainingTask
from peft_core.system.cancellation import CANCELLED_EXIT_CODE
from peft_core.system.child_process import LineTooLongError, child_environment, receive_line
from peft_core.system.failures import TaskKind, error_info
from peft_core.system.lock import FileLock
from peft_core.system.machine_use import MachineUse, Measure

WORKER = ["-m", "peft_core.worker"]
POLL_INTERVAL_S = 0.25  # how often a request to end a running job is looked for
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


@dataclass
class RunnerState:
    """What the running jobs of one runner share."""

    store: Store
    registry: Registry
    settings: Settings
    lock: FileLock  # of the queue
    machine: FreeMachine
    measure: Measure
    is_stopping: bool = False  # the runner was asked to stop
    _measured_at: float = float("-inf")

    def measure_at_intervals(self) -> MachineUse | None:
        """Return how much others use this machine; None if it was measured a moment ago."""
        if time.monotonic() - self._measured_at < MEASURE_INTERVAL_S:
            return None
        self._measured_at = time.monotonic()
        return self.measure()


class RunningJob:
    """A job in progress whose worker is a process on this machine."""

    process_name = "process"

    def __init__(self, job: Job, runner: RunnerState) -> None:
        self.job = job
        self._runner = runner
        self._store = runner.store
        self._paths: JobPaths = runner.settings.paths.job(job.job_id)
        self._pause = ""  # why it is paused
        minutes = job.request.config.max_minutes
        self._ends_at = float("inf") if minutes is None else time.monotonic() + 60 * minutes  # by the monotonic clock
        self._log = log.bind(job_id=job.job_id)

    async def run(self) -> None:
        """Run the job's process to its end, and record how the job ended."""
        job_id = self.job.job_id
        self._log.info("started", project_id=self.job.project_id)
        event: Event | None
        try:
            # kill-point: runner: the worker is about to be started
            last_event, code = await self._run_process()
            # kill-point: runner: the worker has ended
            event = self._outcome(last_event, code)
        except Exception as error:  # noqa: BLE001 -- the edge of a job: it must not stay in progress
            self._log.exception("runner failed")
            # If the store fails here too, the job stays in progress, and the next runner recovers it.
            completed = completed_by(self._store.get(job_id), self._runner.registry)
            event = completed or JobFailed(error=error_info(error, RUNNER))
        if event is None:
            self._log.info("detached")
            return
        self._store.append(job_id, event)
        if isinstance(event, JobPostponed) and self._store.cancel_requested(job_id):  # a moment ago
            event = JobCancelled()
            self._store.append(job_id, event)
        if isinstance(event, JobCompleted):
            # kill-point: runner: the job is completed, its checkpoint still exists
            delete_remains(self._paths)
        self._log.info("ended", outcome=event.kind)

    # -- the process ---------------------------------------------------------------------------------------------------

    async def _run_process(self) -> tuple[Event | None, int]:
        """Run the job's process to its end; return its final event and its exit code."""
        self._paths.root.mkdir(parents=True, exist_ok=True)
        settings, paths = self._runner.settings, self._paths
        paths.task.write_text(self._task().model_dump_json(), encoding="utf-8")
        launcher = self._launcher()
        with paths.log.open("ab") as log_file, _launcher_errors(launcher):
            process = await anyio.open_process(
                [*(launcher or [sys.executable]), *self._module(), str(paths.task)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log_file,
                cwd=paths.root,
                env={**child_environment(launched=bool(launcher)), "CODEBASE_GARDENER_LOG_LEVEL": settings.log_level},
                pass_fds=[self._runner.lock.descriptor],  # the queue stays locked until the process is gone as well
            )
        async with process:
            self._started(process)
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._end_on_request, process)
                    assert process.stdout is not None  # noqa: S101 -- it was requested as a pipe
                    # kill-point: runner: the worker is started
                    last_event = await self._follow(process.stdout)
                    code = await process.wait()
                    group.cancel_scope.cancel()
            except BaseException:  # for any reason: nothing reads this process's events any more
                await self._end(process)
                raise
        return last_event, code

    def _task(self) -> TrainingTask:
        """Return what the process is to do."""
        job, settings = self.job, self._runner.settings
        continued, adapters = job.request.continued, settings.paths.adapters(job.project_id)
        earlier = earlier_examples(settings.paths, adapters, continued.adapter_id if continued is not None else None)
        return TrainingTask(
            job_id=job.job_id,
            project_id=job.project_id,
            request=job.request,
            job_dir=self._paths.root,
            base_models_dir=settings.paths.base_models,
            earlier_examples=tuple(file for file in earlier if file.is_file()),
            data_dir=settings.paths.root,
            allowed_roots=settings.allowed_roots,
        )

    def _module(self) -> list[str]:
        """Return the interpreter's arguments that start the module."""
        return WORKER

    def _launcher(self) -> list[str]:
        return shlex.split(self._runner.settings.launcher or "") if self.job.is_training else []

    def _started(self, process: Process) -> None:
        if self.job.only_while_free:
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, process.pid, NICENESS)

    async def _follow(self, stdout: ByteReceiveStream) -> Event | None:
        """Record the process's events until it closes its output; return the final event without recording it.

        Raises:
            TrainingError: A line is too long.
        """
        is_repeated = self._repeats()
        stream = BufferedByteReceiveStream(stdout)
        last_event: Event | None = None
        while True:
            try:
                line = await receive_line(stream, MAX_LINE)
            except LineTooLongError:
                raise TrainingError(
                    f"The job's {self.process_name} wrote an event of more than {MAX_LINE} bytes and was stopped.",
                    code="endless_event",
                    suggestions=["This is a bug: please report it with the log of the job"],
                ) from None
            if line is None:
                return last_event
            try:
                event = EVENT.validate_json(line)
                if isinstance(event, AdapterWritten | JobFailed | JobInterrupted):
                    last_event = event
                elif not is_repeated(event):
                    # kill-point: runner: an event of the worker is about to be recorded (pass 3)
                    self._store.append(self.job.job_id, event)
                    # kill-point: runner: an event of the worker is recorded (pass 8)
            except (ValueError, IllegalTransition) as error:
                self._log.warning("unusable event", line=line[:200], error=str(error))

    def _repeats(self) -> Callable[[Event], bool]:
        """Return a function that says for each event of the process in turn whether it is recorded already.

        A resumed run first repeats what it emitted since its last checkpoint, but passes through its phases again.
        """
        newest = self._store.newest_events(self.job.job_id, MAX_REPLAYED_EVENTS)
        recorded = {event.model_dump_json() for event in newest}

        def is_repeated(event: Event) -> bool:
            if isinstance(event, RunPlanned):
                recorded.clear()
            return not isinstance(event, PhaseStarted) and event.model_dump_json() in recorded

        return is_repeated

    async def _end_on_request(self, process: Process) -> None:
        """Wait until the process is to be ended, and end it."""
        await self._requested_to_end()
        await self._end(process)

    async def _requested_to_end(self) -> None:
        while not self._is_to_end():  # noqa: ASYNC110 -- other processes ask for it
            await anyio.sleep(POLL_INTERVAL_S)

    def _is_to_end(self) -> bool:
        """Return whether the job is to be cancelled or paused, the runner is to stop, or the time limit is reached."""
        if self._runner.is_stopping or self._is_out_of_time or self._store.cancel_requested(self.job.job_id):
            return True
        self._pause = self._why_pause()
        return bool(self._pause)

    async def _end(self, process: Process) -> None:
        """End the process."""
        await end_process(process, signal.SIGTERM, GRACE_S)

    @property
    def _is_out_of_time(self) -> bool:
        return time.monotonic() >= self._ends_at

    def _why_pause(self) -> str:
        """Return why the job must make way; "" if a user asked for it, or nothing else needs the machine."""
        if not self._store.get(self.job.job_id).only_while_free:
            return ""
        if any(not job.only_while_free and not job.on_cluster for job in self._store.in_state(Status.QUEUED)):
            return "a job that was asked for goes first"
        use = self._runner.measure_at_intervals()
        return "" if use is None else self._runner.machine.why_pause(use, time.monotonic())

    # -- the end -------------------------------------------------------------------------------------------------------

    def _outcome(self, last_event: Event | None, code: int) -> Event | None:
        """Return the event that ends a job whose process has exited, or puts it back into the queue; None: it continues.

        A cancellation that was requested takes precedence over a result, a result over a request to pause or stop, and that
        over the process's own error, because a process that is stopped may fail on its way out.
        """
        if self._store.cancel_requested(self.job.job_id):
            return JobCancelled()
        if isinstance(last_event, AdapterWritten) and code == 0:
            return self._publish(last_event)
        if code == 0 and (completed := completed_evaluation(self._store.get(self.job.job_id))) is not None:
            self._write_report()
            return completed
        if self._was_stopped(code):
            return self._stopped()
        if isinstance(last_event, JobFailed | JobInterrupted):
            return last_event
        name = f"{self.job.request.noun} {self.process_name}"
        return JobFailed(error=exit_error(code, self._paths.log, process=name))

    def _was_stopped(self, code: int) -> bool:
        asked = self._runner.is_stopping or self._pause or self._is_out_of_time
        return bool(asked) or code == CANCELLED_EXIT_CODE

    def _stopped(self) -> Event | None:
        """Return the event of a job whose process was asked to stop."""
        if self._pause and not self._runner.is_stopping:
            return JobPostponed(reason=self._pause)
        if self._is_out_of_time and not self._runner.is_stopping:
            limit = f"config.max_minutes = {self.job.request.config.max_minutes:g}"
            return JobInterrupted(reason=f"The time limit was reached: {limit}.")
        noun = self.job.request.noun
        return JobInterrupted(reason=f"The {noun} was asked to stop (SIGTERM), for instance at shutdown.")

    def _publish(self, written: AdapterWritten) -> Event:
        """Verify the adapter in the job's directory and publish it; return the event that ends the job."""
        job, adapter = self.job, self._paths.adapter
        registry, runs = self._runner.registry, self._store.runs_of_sweep(job)
        if better_run([run for run in runs if registry.published(run.project_id, run.job_id)], written.metrics):
            return JobCompleted(adapter_path=None, metrics=written.metrics)
        # kill-point: runner: the adapter is about to be published
        self._store.append(job.job_id, PhaseStarted(phase=Phase.PUBLISHING))
        # kill-point: runner: the phase is publishing, the adapter is unchecked
        errors = [reason for reason in verify(adapter, job.request.base).reasons if reason.severity == "error"]
        if errors:
            return JobFailed(
                error=ErrorInfo(
                    code="adapter_rejected",
                    message="The adapter that training wrote did not pass verification: "
                    + "; ".join(reason.message for reason in errors[:3]),
                    suggestions=(f"This is a bug: please report it with the log {self._paths.log}",),
                )
            )
        self._write_report()
        # kill-point: runner: the adapter is checked
        published = registry.publish(adapter, job.project_id, job.job_id)
        # kill-point: runner: the adapter is published, the job is not completed
        return JobCompleted(adapter_path=str(published), metrics=written.metrics)

    def _write_report(self) -> None:
        """Write the HTML report. A failure is logged only: an adapter without a report is complete."""
        # Deferred, because jinja2 is needed once per job only:
        from peft_core.evaluation.report import write_evaluation_report, write_training_report  # noqa: PLC0415

        job, paths = self.job, self._paths
        try:
            if job.request.evaluated is not None:
                write_evaluation_report(paths.root, job.request, self._store.events(job.job_id))
            elif (manifest := read_manifest(paths.adapter)) is not None:
                write_training_report(paths.adapter, manifest, self._store.events(job.job_id))
        except Exception:
            log.exception("no report", job_id=job.job_id)


@contextmanager
def _launcher_errors(launcher: Sequence[str]) -> Iterator[None]:
    """Say of a launcher that cannot be started that it is the setting which has to be changed."""
    try:
        yield
    except (FileNotFoundError, PermissionError) as error:
        if not launcher or error.filename != launcher[0]:  # it may be the job's directory that is gone
            raise
        raise TrainingError(
            f"The launcher {launcher[0]} cannot be started: {error.strerror}.",
            code="launcher_not_started",
            suggestions=[
                "Set CODEBASE_GARDENER_LAUNCHER to the absolute path of a command, or unset it, and restart the server"
            ],
        ) from error


async def end_process(process: Process, number: signal.Signals, grace_s: float) -> None:
    """End a process with a signal, and with SIGKILL if it is still alive after the grace period, in seconds."""
    with anyio.CancelScope(shield=True):
        with suppress(ProcessLookupError):
            process.send_signal(number)
        with anyio.move_on_after(grace_s):
            await process.wait()
            return
        log.warning("process did not end in time", grace_s=grace_s)
        with suppress(ProcessLookupError):
            process.kill()


def delete_remains(paths: JobPaths) -> None:
    """Delete the checkpoint of a completed job, which is never resumed, and an adapter that was not published."""
    for directory in (paths.checkpoint, paths.adapter):
        shutil.rmtree(directory, ignore_errors=True)
