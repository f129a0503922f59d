"""Make sure that a runner works on the queue: recover jobs whose processes died, and start a runner for queued jobs."""

from __future__ import annotations

import logging
import subprocess
import threading
from contextlib import suppress

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import StorageError
from peft_core.jobs.recovery import exit_error, recover, without_process
from peft_core.jobs.state import IllegalTransition, Job
from peft_core.jobs.store import Store
from peft_core.schemas.events import JobFailed
from peft_core.system.child_process import open_log, python_module
from peft_core.system.lock import FileLock

RUNNER = python_module("peft_core.jobs.runner")
NO_RUNNER = "runner_start"  # error code
MAX_KILLED = 3  # consecutive runners that were killed before they started any job

log = logging.getLogger(__name__)  # structlog would slow the server's start down by 0.1 s


class RunnerSupervisor:
    """Starts runners, which outlive this process. Safe to use from several threads."""

    def __init__(self, settings: Settings, store: Store, registry: Registry) -> None:
        self._settings = settings
        self._paths = settings.paths
        self._store = store
        self._registry = registry
        self._runner: subprocess.Popen[bytes] | None = None  # the newest one, until its exit is noticed
        self._queued_at_start: set[tuple[str, float]] = set()  # (job id, updated at), when it was started
        self._killed = 0  # consecutive runners that were killed before they started any job
        self._mutex = threading.Lock()

    def require_locks(self) -> None:
        """Check that a runner could lock the queue.

        Raises:
            StorageError: Files cannot be locked, or the directory cannot be written.
        """
        # A server that wants to start a runner at this moment takes this lock for a runner's; its next check, within seconds,
        # starts one.
        with FileLock(self._paths.runner_lock) as lock:
            lock.acquire()

    def ensure_runner(self) -> None:
        """Recover jobs whose processes died, and start a runner if jobs need one and none is alive.

        Raises:
            StorageError: The data directory cannot be used, or no runner can be started (`NO_RUNNER`).
        """
        with self._mutex:
            lock = FileLock(self._paths.runner_lock)
            if not lock.acquire():
                return  # a runner works, and looks at the queue again after releasing the lock
            with lock:
                recover(self._store, self._registry)
            jobs = without_process(self._store)
            waiting = {(job.job_id, job.updated_at) for job in jobs}
            if not waiting:
                return
            if self._runner is not None:
                code = self._runner.poll()
                if code is None and waiting <= self._queued_at_start:
                    return  # it is starting, and will find these jobs
                if code is not None and self._is_hopeless(code, started_nothing=waiting >= self._queued_at_start):
                    self._fail(jobs[0], code)
                    return
            # kill-point: server: a runner is about to be started
            self._runner = self._spawn_runner()
            # kill-point: server: a runner is started
            self._queued_at_start = waiting

    def ensure_runner_if_possible(self) -> None:
        """Like `ensure_runner`, for requests that do not need a runner: errors that may pass are logged, not raised."""
        try:
            self.ensure_runner()
        except StorageError as error:
            if error.code not in (NO_RUNNER, "adapters_busy"):
                raise
            log.warning("%s", error.message)

    def _is_hopeless(self, code: int, *, started_nothing: bool) -> bool:
        """Return whether the next runner would fail like the one that exited with `code`."""
        self._runner = None
        if not (code and started_nothing):
            self._killed = 0
            return False
        if code > 0:  # it could not work at all
            return True
        self._killed += 1
        return self._killed >= MAX_KILLED

    def _fail(self, job: Job, code: int) -> None:
        """Record that a job failed because no runner survives: further attempts would fail silently."""
        self._killed = 0
        error = exit_error(code, self._paths.logs / "runner.log", process="runner")
        with suppress(IllegalTransition):  # it was cancelled in between
            self._store.append(job.job_id, JobFailed(error=error))

    def _spawn_runner(self) -> subprocess.Popen[bytes]:
        """Start a runner in a session of its own: it outlives this process and signals to this process's group.

        Raises:
            StorageError: The log cannot be opened or the process cannot be started.
        """
        try:
            with open_log(self._paths.logs / "runner.log") as output:
                runner = subprocess.Popen(  # noqa: S603 -- a module of ours, with an absolute interpreter path
                    [*RUNNER, self._settings.model_dump_json()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=self._paths.root,
                    start_new_session=True,
                )
        except OSError as error:
            raise StorageError(
                f"The training process cannot be started: {error}. Queued jobs stay queued.",
                code=NO_RUNNER,
                suggestions=[
                    "Close other programs, free disk space or raise the process limit, then ask for the status again"
                ],
            ) from error
        # This thread reaps the runner. If no thread can be started either, the next `poll` reaps it.
        with suppress(RuntimeError):
            threading.Thread(target=runner.wait, daemon=True).start()
        return runner
