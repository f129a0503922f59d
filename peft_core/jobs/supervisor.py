"""Who looks at the queue sees that somebody works on it: finds out dead jobs, and starts a runner for waiting ones."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from contextlib import suppress
from typing import BinaryIO

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import StorageError
from peft_core.jobs.recovery import problem_of_exit, recover
from peft_core.jobs.state import IllegalTransition, Job
from peft_core.jobs.store import Store
from peft_core.schemas.events import JobFailed
from peft_core.schemas.results import Status
from peft_core.system.lock import FileLock

RUNNER = [sys.executable, "-P", "-m", "peft_core.jobs.runner"]
NO_RUNNER = "runner_start"  # code of the error
MOST_KILLED = 3  # runners in a row that were killed before they began anything
MAX_LOG_BYTES = 4 << 20

log = logging.getLogger(__name__)  # structlog would cost the server 0.1 s at its start


class RunnerSupervisor:
    """For any number of threads. What it starts outlives it."""

    def __init__(self, settings: Settings, store: Store, registry: Registry) -> None:
        self._settings = settings
        self._paths = settings.paths
        self._store = store
        self._registry = registry
        self._runner: subprocess.Popen[bytes] | None = None  # the last one, until its end was noticed
        self._seen_by_runner: set[tuple[str, float]] = set()  # what waited, and since when, when it was started
        self._killed = 0  # runners in a row that were, before they began anything
        self._one_at_a_time = threading.Lock()

    def require_locks(self) -> None:
        """That somebody could work here.

        Raises:
            StorageError: files cannot be locked, or the directory cannot be written.
        """
        # Who finds it taken at this moment leaves a job in the queue without a runner: until the next look, within seconds.
        with FileLock(self._paths.runner_lock) as lock:
            lock.acquire()

    def ensure_runner(self) -> None:
        """Find out jobs that nobody works on any more, and have a runner for those that wait.

        Raises:
            StorageError: the data directory cannot be used; or no runner can be started (`NO_RUNNER`).
        """
        with self._one_at_a_time:
            lock = FileLock(self._paths.runner_lock)
            if not lock.acquire():
                return  # somebody works, and looks at the queue again after giving the lock up
            with lock:
                recover(self._store, self._registry)
            queued = self._store.in_state(Status.QUEUED)
            waiting = {(job.job_id, job.updated_at) for job in queued}
            if not waiting:
                return
            if self._runner is not None:
                code = self._runner.poll()
                if code is None and waiting <= self._seen_by_runner:
                    return  # it is starting, and will see them
                if code is not None and self._is_hopeless(code, began_nothing=waiting >= self._seen_by_runner):
                    self._give_up(queued[0], code)
                    return
            self._runner = self._spawn_runner()
            self._seen_by_runner = waiting

    def ensure_runner_if_possible(self) -> None:
        """For who asks for something else than work: where no runner can be had, the next look tries again, and tells why."""
        try:
            self.ensure_runner()
        except StorageError as error:
            if error.code not in (NO_RUNNER, "adapters_busy"):  # both pass by themselves
                raise
            log.warning("%s", error.message)

    def _is_hopeless(self, code: int, *, began_nothing: bool) -> bool:
        """Whether the runner that ended says that the next one would fare no better."""
        self._runner = None
        if not (code and began_nothing):
            self._killed = 0
            return False
        if code > 0:  # it could not work at all
            return True
        self._killed += 1
        return self._killed >= MOST_KILLED

    def _give_up(self, job: Job, code: int) -> None:
        """On a job: trying again would fail again, in silence."""
        self._killed = 0
        problem = problem_of_exit(code, self._paths.logs / "runner.log", what="runner")
        with suppress(IllegalTransition):  # cancelled a moment ago
            self._store.append(job.job_id, JobFailed(error=problem))

    def _spawn_runner(self) -> subprocess.Popen[bytes]:
        """A process of its own session: it outlives this one, and whatever kills this one's process group.

        Raises:
            StorageError: neither log nor process can be had.
        """
        try:
            with self._runner_log() as output:
                runner = subprocess.Popen(  # noqa: S603 -- our own module, by absolute interpreter
                    [*RUNNER, self._settings.model_dump_json()],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    cwd=self._paths.root,
                    start_new_session=True,
                )
        except OSError as error:
            raise StorageError(
                f"The process that trains cannot be started: {error}. What waits stays queued.",
                code=NO_RUNNER,
                suggestions=[
                    "Close other programs, free disk space or raise the limit on processes, then ask for the status again",
                ],
            ) from error
        # Reaps it, should we live longer; where no thread can be had either, the next look at the queue does.
        with suppress(RuntimeError):
            threading.Thread(target=runner.wait, daemon=True).start()
        return runner

    def _runner_log(self) -> BinaryIO:
        path = self._paths.logs / "runner.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
            path.replace(path.with_suffix(".old.log"))
        return path.open("ab")
