"""A data directory under test: run jobs in it, kill their processes, and check the invariants afterwards."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from peft_core.adapters.manifest import read_manifest, sha256_of
from peft_core.adapters.registry import Registry
from peft_core.adapters.verify import verify
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import JobNotFound
from peft_core.jobs.service import JobService
from peft_core.jobs.store import Store
from peft_core.schemas.results import Status, TrainingStatus
from peft_core.schemas.training import TrainingConfig
from tests.survival.kill_points import KillPoint

STATUS_DEADLINE_S = 5.0  # after a kill the status must be true within this time
TIMEOUT_S = 90.0  # generous, because the machine may be busy
MEMORY = "memory"


@dataclass(frozen=True)
class Kill:
    """`victim` is killed by `method` ("SIGKILL", "SIGTERM", "memory") when `point` is reached."""

    point: KillPoint
    victim: str
    method: str

    def __str__(self) -> str:
        return f"{self.victim} by {self.method}, at: {self.point}"


@dataclass
class Scenario:
    root: Path
    source: Path
    base: Path
    project: str = "small"
    config: dict[str, object] = field(
        default_factory=lambda: {"device": "cpu", "max_length": 128, "allow_little_data": True}
    )
    settings: Settings | None = None
    job_id: str | None = None
    waiting: str | None = None
    has_earlier: bool = False  # the project "earlier" has an adapter, which must remain
    _marks: int = 0

    def __post_init__(self) -> None:
        self.settings = self.settings or Settings(data_dir=self.root / "data", log_level="WARNING")
        self.paths = self.settings.paths
        self.registry = Registry(self.paths)
        self.jobs = JobService(self.settings, self.registry)

    # -- actions ------------------------------------------------------------------------------------------------------

    def submit(self, project: str) -> str:
        config = TrainingConfig.model_validate({"base_model": str(self.base), **self.config})
        source = str(self.source)
        job_id = self.jobs.queue(project, self.jobs.plan(project, source, config), source).job_id
        assert job_id is not None
        return job_id

    def status(self, job_id: str | None = None) -> TrainingStatus:
        return self.jobs.status_by_id(job_id or self.current)

    def latest(self, project: str) -> str | None:
        """Return the id of a project's latest job, as a server that is asked for it; None if it has none."""
        try:
            return self.jobs.status_and_ensure_runner(project).job_id
        except JobNotFound:
            return None

    @property
    def current(self) -> str:
        assert self.job_id is not None
        return self.job_id

    def start(self) -> None:
        """Resume the current job if it has not completed, else submit a new one."""
        if self.job_id is not None and self.status().status is not Status.COMPLETED:
            self.jobs.resume(self.job_id)
        else:
            self.job_id = self.submit(self.project)
            if self.project != "real":
                self.waiting = self.submit("next")  # queued behind it

    def arm(self, point: KillPoint, action: str) -> Path:
        """Have the first process at `point` take `action`; return the file that will then hold its pid."""
        self._marks += 1
        mark = self.root / f"mark-{self._marks}"
        (self.root / "point.json").write_text(json.dumps({**asdict(point), "action": action, "mark": str(mark)}))
        return mark.with_suffix(".reached")

    def disarm(self) -> None:
        (self.root / "point.json").unlink(missing_ok=True)

    def reach(self, kill: Kill, mark: Path) -> int:
        """Run the job until a process reaches the point; return its pid."""
        for _ in range(2):  # a resumed job may have passed the point; a new one has not
            self.start()
            until(lambda: mark.exists() or self.status().status.is_final, f"the job to get anywhere ({kill})")
            if mark.exists():
                return int(mark.read_text())
        raise AssertionError(f"the point was never reached: {kill}; {self.status()}")

    def kill(self, kill: Kill) -> TrainingStatus:
        """Kill the victim at the point, wait for the true status in time, and check the invariants."""
        if self.job_id is not None:
            until(lambda: self.status().status.is_final, "the job of the last kill to end")
        self.expect_no_processes()  # a runner that is already alive does not know the point
        is_own_point = kill.point.process == kill.victim
        mark = self.arm(kill.point, kill.method if is_own_point else "SIGSTOP")
        pid = self.reach(kill, mark)
        victim = process = pid
        if not is_own_point:
            until(lambda: state(pid) == psutil.STATUS_STOPPED, f"it to stop ({kill})")
            victim = self._other(kill, pid)
            os.kill(victim, signal.Signals[kill.method])
            if kill.method == "SIGKILL":
                until(lambda: gone(victim), f"the victim to die ({kill})")
            os.kill(process, signal.SIGCONT)
        if kill.method != MEMORY:  # a process without memory may still succeed
            until(lambda: gone(victim), f"the victim to end ({kill})")
        self.disarm()
        previous = Store(self.paths.database, time.time).get(self.current).status
        deadline = TIMEOUT_S if kill.method == MEMORY else STATUS_DEADLINE_S
        until(lambda: self._status_is_true(victim, previous), f"the true status ({kill})", deadline)
        self.check()
        return self.status()

    def _other(self, kill: Kill, pid: int) -> int:
        stopped = psutil.Process(pid)
        if kill.victim == "runner":
            return int(stopped.ppid())
        child = [p for p in stopped.children() if p.status() != psutil.STATUS_ZOMBIE]
        assert len(child) == 1, (kill, child)
        return int(child[0].pid)

    def _status_is_true(self, victim: int, previous: Status) -> bool:
        """Whether the job has ended; or it was still queued, and another runner is alive to work on it."""
        if self.status().status.is_final:
            return True
        return previous is Status.QUEUED and any(pid != victim for pid in self.runners())

    def finish(self) -> None:
        """Resume the same job if necessary and expect it to complete."""
        if not self.status().status.is_final or self.status().status is Status.COMPLETED:
            until(lambda: self.status().status.is_final, "the end")
        if self.status().status is not Status.COMPLETED:
            self.jobs.resume(self.current)
        until(lambda: self.status().status.is_final, "the end of the resumed job")
        assert self.status().status is Status.COMPLETED, self.status()
        self.check()

    def expect_queue_continues(self) -> None:
        if (job_id := self.waiting) is not None:
            until(lambda: self.status(job_id).status.is_final, "the next job")
            assert self.status(job_id).status is Status.COMPLETED, self.status(job_id)
            self.waiting = None

    def expect_no_processes(self) -> None:
        until(lambda: not self.processes(), "all processes to end", 15.0)

    # -- invariants ---------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Check that every visible adapter is complete and fits its base, and that it exists exactly for completed jobs."""
        base = resolve(str(self.base), self.settings)
        for project in (self.project, "earlier", "next"):
            directory = self.paths.adapters(project)
            listed = {adapter.adapter_id for adapter in self.registry.adapters(project)}
            entries = directory.iterdir() if directory.exists() else []
            visible = {entry.name for entry in entries if not entry.name.startswith(".")}
            assert visible - {"current"} == listed
            for name in listed:
                self._check_adapter(project, name, base)
            current = self.paths.current(project)
            if project == "earlier" and self.has_earlier:
                assert current.resolve().name in listed
            if current.is_symlink():
                assert current.resolve().name in listed
        if self.job_id is not None:
            status = self.status()
            published = self.registry.published(self.project, self.job_id)
            if status.status is Status.COMPLETED:
                assert published is not None
                assert self.paths.current(self.project).resolve() == published
            elif status.status.is_final:
                assert published is None, status

    def _check_adapter(self, project: str, name: str, base: object) -> None:
        directory = self.paths.adapter(project, name)
        manifest = read_manifest(directory)
        assert manifest is not None
        assert manifest.files == {
            path.name: sha256_of(path) for path in directory.iterdir() if path.name in manifest.files
        }
        assert not [r for r in verify(directory, base).reasons if r.severity == "error"]  # type: ignore[arg-type]

    # -- processes ----------------------------------------------------------------------------------------------------

    def processes(self) -> dict[int, str]:
        """Return the runners and workers of this data directory, whose working directory is below it: pid -> directory."""
        processes = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                directory = (entry / "cwd").readlink()
                if directory.is_relative_to(self.paths.root) and not gone(int(entry.name)):
                    processes[int(entry.name)] = str(directory)
            except OSError:
                continue
        return processes

    def runners(self) -> list[int]:
        return [pid for pid, directory in self.processes().items() if Path(directory) == self.paths.root]


def until(condition: Callable[[], object], what: str, timeout_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def state(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.NoSuchProcess:
        return "gone"


def gone(pid: int) -> bool:
    return state(pid) in ("gone", psutil.STATUS_ZOMBIE)
