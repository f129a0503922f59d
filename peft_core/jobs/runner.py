"""The runner: a detached process without torch that works the queue off, one training at a time.

    python -m peft_core.jobs.runner SETTINGS_AS_JSON

It holds the work lock, gives each job to a training child of its own, and turns what the child says (JSON lines), how it
ended (exit code, signal) and what it did not say into events. It is the only writer of running jobs. When the queue is
empty it ends. A runner that finds the lock taken ends too: whoever holds it looks at the queue once more after giving
the lock up, so a job that was inserted meanwhile is not forgotten.
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
from peft_core.errors import PeftMcpError, StorageError, TrainingError
from peft_core.jobs.pruning import prune
from peft_core.jobs.recovery import completed_by, completed_evaluation, problem_of_exit, recover
from peft_core.jobs.state import IllegalTransition, Job
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
    JobStarted,
    PhaseStarted,
    RunPlanned,
)
from peft_core.schemas.results import ErrorInfo, Phase, Status
from peft_core.schemas.task import TrainingTask
from peft_core.system import logs
from peft_core.system.lock import FileLock

CHILD = ["-m", "peft_core.training"]
EVALUATION_CHILD = ["-m", "peft_core.evaluation"]
LOCK_PATIENCE_S = 5.0  # longer than anybody who only probes holds the lock
POLL_INTERVAL_S = 0.25  # how often a running job is looked up for a request to cancel
GRACE_S = 20.0  # between SIGTERM and SIGKILL: time for a micro-step and a checkpoint
MAX_LINE = 1 << 20
MAX_REPLAYED_EVENTS = 2000  # events that a run which goes on may tell again, at most
ASKED_TO_STOP = 143  # exit code of a child that left on SIGTERM, its checkpoint written

log = structlog.get_logger(__name__)


def child_environment(parent: str) -> dict[str, str]:
    """What a training child is started with. `parent`: whose end is its own, a pid or "launcher"."""
    return {
        **os.environ,
        "PEFT_MCP_PARENT": parent,
        "PYTHONSAFEPATH": "1",  # the working directory is no place for modules
        "HF_HUB_OFFLINE": "1",
    }


def run(settings: Settings) -> None:
    """Work until the queue is empty, or somebody else does."""
    paths = settings.paths
    store = Store(paths.database, time.time)
    registry = Registry(paths)
    lock = FileLock(paths.runner_lock)
    while lock.acquire(LOCK_PATIENCE_S):
        with lock:
            recover(store, registry)
            stopped = anyio.run(Runner(store, registry, lock, settings).drain)
        if stopped or not store.in_state(Status.QUEUED):
            return


class Runner:
    def __init__(self, store: Store, registry: Registry, lock: FileLock, settings: Settings) -> None:
        self._store = store
        self._registry = registry
        self._paths = settings.paths
        self._lock = lock
        self._log_level = settings.log_level
        self._keep_runs = settings.keep_runs
        self._allowed_roots = settings.allowed_roots
        self._launcher = shlex.split(settings.launcher or "")
        self._stopping = False

    async def drain(self) -> bool:
        """Run the queued jobs one after the other; True when a signal ended it early."""
        # Plain handlers: they set the flag at once, where a task would hear of the signal only when the loop turns, and the
        # next job would have been started by then.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda _number, _frame: self._stop())
        while not self._stopping and (queued := self._store.in_state(Status.QUEUED)):
            try:
                job = self._store.append(queued[0].job_id, JobStarted())
            except IllegalTransition:
                continue  # cancelled between the look and the start
            await self._run(job)
            prune(self._store, self._registry, self._paths, keep=self._keep_runs)
        return self._stopping

    def _stop(self) -> None:
        self._stopping = True

    async def _run(self, job: Job) -> None:
        bound = log.bind(job_id=job.job_id)
        bound.info("started", project_id=job.project_id)
        paths = self._paths.job(job.job_id)
        try:
            last_word, code = await self._train(job, paths)
            event = self._outcome(job, paths, last_word, code)
        except Exception as error:  # noqa: BLE001 -- the edge of a job, which must not stay "in progress" whatever happens
            bound.exception("runner failed")
            # Raising here leaves the job to whoever looks next: what cannot be recorded cannot be told.
            event = completed_by(self._store.get(job.job_id), self._registry) or JobFailed(error=problem_of(error))
        self._store.append(job.job_id, event)
        if isinstance(event, JobCompleted):
            clean_up(paths)
        bound.info("ended", outcome=event.kind)

    async def _train(self, job: Job, paths: JobPaths) -> tuple[Event | None, int]:
        """Run the training child to its end: (its last word, its exit code)."""
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
        launcher, child = (self._launcher, CHILD) if task.kind == "train" else ([], EVALUATION_CHILD)
        with paths.log.open("ab") as log_file:
            process = await anyio.open_process(
                [*(launcher or [sys.executable]), *child, str(paths.task)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log_file,
                cwd=paths.root,
                env={
                    **child_environment("launcher" if launcher else str(os.getpid())),
                    "CODEBASE_GARDENER_LOG_LEVEL": self._log_level,
                },
                pass_fds=[self._lock.descriptor],
            )
        async with process:
            try:
                async with anyio.create_task_group() as group:
                    group.start_soon(self._end_when_asked, job.job_id, process)
                    assert process.stdout is not None  # noqa: S101 -- it was asked for as a pipe
                    last_word = await self._follow(job.job_id, process.stdout)
                    code = await process.wait()
                    group.cancel_scope.cancel()
            except BaseException:  # whatever it was, nobody follows this child any more
                await _end(process)
                raise
        return last_word, code

    async def _follow(self, job_id: str, stream: ByteReceiveStream) -> Event | None:
        """Record the child's events until it closes its output; the final one is returned, not recorded.

        A run that goes on begins by telling again what it told last: what is known of that is not recorded twice.

        Raises:
            TrainingError: an event without an end. Where the next one begins cannot be known.
        """
        known: set[str] | None = {
            event.model_dump_json() for event in self._store.newest_events(job_id, MAX_REPLAYED_EVENTS)
        }
        lines = BufferedByteReceiveStream(stream)
        last_word: Event | None = None
        while True:
            try:
                line = await lines.receive_until(b"\n", MAX_LINE)
            except (anyio.IncompleteRead, anyio.EndOfStream):
                return last_word
            except anyio.DelimiterNotFound:
                raise TrainingError(
                    f"The training process told of something in more than {MAX_LINE} bytes, and was ended.",
                    code="endless_event",
                    suggestions=["This is a bug: please report it with the log of the job"],
                ) from None
            try:
                event = EVENT.validate_json(line)
                if isinstance(event, RunPlanned):
                    known = None
                if isinstance(event, AdapterWritten | JobFailed):
                    last_word = event
                elif known is None or isinstance(event, PhaseStarted) or event.model_dump_json() not in known:
                    self._store.append(job_id, event)
            except (ValueError, IllegalTransition) as error:
                log.warning("unusable event", job_id=job_id, line=line[:200], error=str(error))

    def _outcome(self, job: Job, paths: JobPaths, last_word: Event | None, code: int) -> Event:
        """What became of a job whose child has ended."""
        if self._store.cancel_requested(job.job_id):
            return JobCancelled()
        if isinstance(last_word, AdapterWritten) and code == 0:
            return self._publish(job, paths, last_word)
        if code == 0 and (completed := completed_evaluation(self._store.get(job.job_id))) is not None:
            self._report(job, paths)
            return completed
        if self._stopping or code == ASKED_TO_STOP:
            return JobInterrupted(reason="The training was asked to stop (SIGTERM), for instance at shutdown.")
        if isinstance(last_word, JobFailed):
            return last_word
        return JobFailed(error=problem_of_exit(code, paths.log))

    def _publish(self, job: Job, paths: JobPaths, written: AdapterWritten) -> Event:
        self._store.append(job.job_id, PhaseStarted(phase=Phase.PUBLISHING))
        reasons = [r for r in verify(paths.adapter, job.request.base).reasons if r.severity == "error"]
        if reasons:
            return JobFailed(
                error=ErrorInfo(
                    code="adapter_rejected",
                    message="The adapter that training wrote did not pass the check: "
                    + "; ".join(reason.message for reason in reasons[:3]),
                    suggestions=(f"This is a bug: please report it with the log {paths.log}",),
                ),
            )
        self._report(job, paths)
        published = self._registry.publish(paths.adapter, job.project_id, job.job_id)
        return JobCompleted(adapter_path=str(published), metrics=written.metrics)

    def _report(self, job: Job, paths: JobPaths) -> None:
        """The page beside the manifest. An adapter without it is an adapter."""
        # jinja2, once in a runner's life:
        from peft_core.evaluation.report import (  # noqa: PLC0415
            write_evaluation_report,
            write_report,
        )

        try:
            if job.request.evaluated is not None:
                write_evaluation_report(paths.root, job.request, self._store.events(job.job_id))
            elif (manifest := read_manifest(paths.adapter)) is not None:
                write_report(paths.adapter, manifest, self._store.events(job.job_id))
        except Exception:
            log.exception("no report", job_id=job.job_id)

    async def _end_when_asked(self, job_id: str, process: Process) -> None:
        """Wait for a request to cancel, or to stop; then end the child.

        Raises:
            StorageError: the data directory was removed; others may be working in a new one of that name.
        """
        while not (self._stopping or self._store.cancel_requested(job_id)):
            await anyio.sleep(POLL_INTERVAL_S)
            if not self._lock.still_there:
                raise StorageError(f"The data directory {self._paths.root} was removed.", code="data_directory_gone")
        await _end(process)


async def _end(process: Process) -> None:
    """SIGTERM, and SIGKILL when it does not help."""
    with anyio.CancelScope(shield=True):
        with suppress(ProcessLookupError):
            process.terminate()
        with anyio.move_on_after(GRACE_S):
            await process.wait()
            return
        log.warning("child did not end in time", grace_s=GRACE_S)
        with suppress(ProcessLookupError):
            process.kill()


def clean_up(paths: JobPaths) -> None:
    """Of a completed job, which is never resumed."""
    shutil.rmtree(paths.checkpoint, ignore_errors=True)


def problem_of(error: Exception) -> ErrorInfo:
    while isinstance(error, ExceptionGroup) and len(error.exceptions) == 1:  # a task group's wrapping
        error = error.exceptions[0]
    if isinstance(error, PeftMcpError):
        return ErrorInfo.from_error(error)
    return ErrorInfo(
        code="runner_failed",
        message=f"The runner failed: {type(error).__name__}: {error}",
        suggestions=("Look at logs/runner.log in the data directory, and report it",),
    )


def main(arguments: list[str]) -> None:
    os.umask(0o077)  # its children inherit it: what they write is private code, or made from it
    settings = Settings.model_validate_json(arguments[0])
    logs.configure(settings.log_level)
    run(settings)


if __name__ == "__main__":
    main(sys.argv[1:])
