"""Data directories that are full, read-only, removed, without locks or of another version; and clocks that jump."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from peft_core.config import Settings
from peft_core.errors import StorageError
from peft_core.jobs.pruning import LEFT_BEHIND_S, prune
from peft_core.jobs.service import JobService
from peft_core.jobs.store import SCHEMA_VERSION, Store
from peft_core.manager import PEFTManager
from peft_core.planning import planner
from peft_core.schemas.events import JobCancelled, JobResumed, JobStarted
from peft_core.schemas.results import Status
from tests.factories import make_job
from tests.survival.kill_points import SMALL_WORKER, point_named
from tests.survival.scenario import Kill, Scenario, gone, until

pytestmark = pytest.mark.survival

CHECKPOINTED = point_named(SMALL_WORKER, "a checkpoint is in its place")
FIRST_STEP = point_named(SMALL_WORKER, "the first step is about to start")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", str(disk)], check=False).returncode:
        pytest.skip("only root can mount")
    yield disk
    until(lambda: not subprocess.run(["umount", str(disk)], check=False).returncode, "the disk to be unused")


def stopped_job(scenario: Scenario) -> int:
    """Start a job that is stopped in its first step; return the pid of its worker."""
    mark = scenario.arm(FIRST_STEP, "SIGSTOP")
    return scenario.reach(Kill(FIRST_STEP, "worker", "SIGSTOP"), mark)


def continue_job(scenario: Scenario, pid: int) -> None:
    scenario.disarm()
    os.kill(pid, signal.SIGCONT)


def fill(ballast: Path) -> None:
    """Use up all free space."""
    with ballast.open("wb", buffering=0) as file:
        while True:
            try:
                file.write(bytes(1 << 10))
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    return
                raise


def test_a_full_disk_is_reported_and_the_job_can_be_resumed_once_there_is_space(
    small_disk: Path, source: Path, small_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "_check_disk", lambda *_: None)  # the disk fills up after the plan
    scenario = Scenario(small_disk, source, small_base)
    pid = stopped_job(scenario)
    ballast = small_disk / "ballast"
    fill(ballast)
    continue_job(scenario, pid)
    until(lambda: not scenario.processes(), "runner and worker to end")
    with pytest.raises(StorageError, match="cannot be used") as caught:
        scenario.status()
    assert "free space" in str(caught.value)
    ballast.unlink()
    assert scenario.status().status in (Status.INTERRUPTED, Status.FAILED)
    scenario.finish()


async def test_a_full_disk_can_be_freed(small_disk: Path) -> None:
    settings = Settings(data_dir=small_disk)
    base = settings.paths.base_models / "0123"
    base.mkdir(parents=True)
    (base / "model.safetensors").write_bytes(bytes(1 << 20))
    fill(small_disk / "ballast")
    async with PEFTManager(settings) as manager:
        usage = await manager.disk_usage(["base_models/0123"])
    assert [freed.bytes for freed in usage.freed] == [1 << 20]
    assert usage.free_bytes >= 1 << 20


async def test_a_job_whose_checkpoint_was_freed_begins_again(tmp_path: Path, source: Path, small_base: Path) -> None:
    scenario = Scenario(tmp_path, source, small_base)
    scenario.kill(Kill(CHECKPOINTED, "worker", "SIGKILL"))
    scenario.expect_queue_continues()
    assert scenario.paths.job(scenario.current).checkpoint.is_dir()
    assert scenario.settings is not None
    async with PEFTManager(scenario.settings) as manager:
        (item,) = [item for item in (await manager.disk_usage()).items if item.name == f"jobs/{scenario.current}"]
        assert item.lost.startswith("Its checkpoint is lost: resume_training then begins again at step 0, not ")
        await manager.disk_usage([item.name])
    assert not scenario.paths.job(scenario.current).root.exists()
    scenario.finish()


def test_training_on_a_full_disk_is_refused_with_the_free_space(
    small_disk: Path, source: Path, small_base: Path
) -> None:
    with pytest.raises(StorageError, match="MB are free") as caught:
        Scenario(small_disk, source, small_base).submit("web")
    assert caught.value.code == "disk_full"


def test_a_read_only_data_directory_is_reported(small_disk: Path, source: Path, small_base: Path) -> None:
    scenario = Scenario(small_disk, source, small_base)
    Store(scenario.paths.database, time.time).create()
    Store(scenario.paths.database, time.time).insert(make_job("waits"))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        for ask in (
            lambda: scenario.jobs.status_by_id("waits"),
            lambda: scenario.jobs.cancel("web", None),
            scenario.jobs.ensure_runner,
        ):
            with pytest.raises(StorageError, match="cannot be used"):
                ask()
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


def test_a_job_whose_data_directory_is_removed_ends(scenario: Scenario) -> None:
    pid = stopped_job(scenario)
    working = set(scenario.processes())
    assert pid in working
    while scenario.paths.root.exists():  # repeated, because the server may recreate its database meanwhile
        shutil.rmtree(scenario.paths.root, ignore_errors=True)
    continue_job(scenario, pid)
    until(lambda: not any(not gone(number) for number in working), "runner and worker to end")
    assert scenario.jobs.status_and_ensure_runner("small").status is Status.NOT_STARTED
    assert not scenario.paths.root.exists()  # it was not recreated
    scenario.job_id, scenario.has_earlier = None, False
    scenario.start()
    scenario.finish()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused_with_the_reason(
    scenario: Scenario, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(StorageError, match="cannot lock files") as caught:
        scenario.submit("web")
    assert caught.value.code == "no_file_locks"
    assert "local disk" in str(caught.value)


@pytest.mark.parametrize("jump_s", [-86_400 * 365, 86_400 * 365])
def test_the_order_of_jobs_does_not_depend_on_the_clock(tmp_path: Path, jump_s: float) -> None:
    now = 1_800_000_000.0
    store = Store(tmp_path / "peft.db", lambda: now)
    store.create()
    store.insert(make_job("first", created_at=now))
    store.append("first", JobCancelled())
    now += jump_s
    store.insert(make_job("second", created_at=now))
    latest = store.latest("web")
    assert latest is not None
    assert latest.job_id == "second"
    store.requeue("first", JobResumed())
    assert [job.job_id for job in store.in_state(Status.QUEUED)] == ["second", "first"]


# -- versions ---------------------------------------------------------------------------------------------------------


def test_an_older_server_refuses_every_operation_on_a_newer_database(scenario: Scenario) -> None:
    with closing(sqlite3.connect(scenario.paths.database)) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    jobs = JobService(scenario.settings, scenario.registry)
    for ask in (
        lambda: jobs.status_and_ensure_runner("earlier"),
        lambda: jobs.status_by_id("x"),
        lambda: jobs.cancel("earlier", None),
        lambda: jobs.resume("x"),
        jobs.ensure_runner,
        jobs.running_job,
        lambda: scenario.submit("web"),
    ):
        with pytest.raises(StorageError, match="newer peft-mcp") as caught:
            ask()
        assert caught.value.code == "newer_database"
        assert "pip install --upgrade" in str(caught.value)
    assert scenario.registry.adapters("earlier")  # listing adapters needs no database


# -- pruning ----------------------------------------------------------------------------------------------------------


def test_old_runs_are_pruned_and_adapters_remain(scenario: Scenario) -> None:
    scenario.expect_no_processes()  # otherwise the runner of the fixture's jobs starts the ones that are inserted here
    first = scenario.registry.adapters("earlier")[0]
    store = Store(scenario.paths.database, time.time)
    for number in range(5):
        name = f"failed-{number}"
        store.insert(make_job(name))
        store.append(name, JobStarted())
        store.append(name, JobCancelled())
        scenario.paths.job(name).root.mkdir()
    store.insert(make_job("waits"))
    scenario.paths.job("waits").root.mkdir()
    stray = scenario.paths.job("never-queued").root
    stray.mkdir()

    prune(store, scenario.registry, scenario.paths, keep=2)
    remaining = {path.name for path in scenario.paths.root.glob("jobs/*")}
    assert remaining == {"failed-3", "failed-4", "waits", "never-queued"}
    assert store.job_ids() == {"failed-3", "failed-4", "waits", first.adapter_id, *next_jobs(store)}
    assert store.events(first.adapter_id) == []
    adapter = Path(scenario.jobs.status_by_id(first.adapter_id).adapter_path or "")
    assert adapter.name == first.adapter_id  # the directory is a copy, and the job has the path of the original
    assert scenario.jobs.base_of(first.adapter_id) == str(scenario.base)  # the path of its base is still known
    scenario.check()

    os.utime(stray, (0, time.time() - LEFT_BEHIND_S - 60))
    scenario.registry.delete("earlier", first.adapter_id)
    prune(store, scenario.registry, scenario.paths, keep=2)
    assert not stray.exists()
    assert first.adapter_id not in store.job_ids()  # the record is removed with its adapter


def next_jobs(store: Store) -> set[str]:
    """Return the jobs that the fixture ran after the first one; their adapters exist too."""
    return {job.job_id for job in store.in_state(Status.COMPLETED) if job.project_id == "next"}


def test_the_runner_retains_as_many_runs_as_keep_runs_allows(tmp_path: Path, source: Path, small_base: Path) -> None:
    scenario = Scenario(tmp_path, source, small_base, settings=Settings(data_dir=tmp_path / "data", keep_runs=2))
    for number in range(4):
        scenario.submit(f"p{number}")
    until(
        lambda: all(scenario.jobs.status_and_ensure_runner(f"p{n}").status is Status.COMPLETED for n in range(4)),
        "all four",
    )
    scenario.expect_no_processes()
    assert len(list(scenario.paths.root.glob("jobs/*"))) == 2
    assert len(scenario.registry.adapters()) == 4
