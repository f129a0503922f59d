"""Jobs that started by themselves in the real runner: they wait for a free machine, make way, and continue.

The machine's state is described by the tests (`describe_machine`), not measured.
"""

from __future__ import annotations

import time
from pathlib import Path

import psutil

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.jobs.recovery import recover
from peft_core.jobs.running_job import NICENESS
from peft_core.jobs.store import Store
from peft_core.paths import DataPaths
from peft_core.schemas.events import JobAskedFor, JobPostponed, JobResumed, JobStarted
from peft_core.schemas.results import Status
from peft_core.system.lock import FileLock
from peft_core.system.machine_use import MachineUse
from tests.factories import make_job
from tests.integration.conftest import Spawn
from tests.integration.scripted_runner import describe_machine
from tests.integration.test_runner import wait_until

BUSY = MachineUse(load=1.0)
FREE = MachineUse(load=0.0)


def kinds(store: Store, job_id: str) -> list[str]:
    return [event.kind for event in store.events(job_id)]


def test_a_job_waits_until_the_machine_is_free_and_says_why(store: Store, spawn: Spawn, paths: DataPaths) -> None:
    describe_machine(paths.root, BUSY)
    store.insert(make_job("job", "fails", only_while_free=True))
    runner = spawn()
    wait_until(lambda: store.get("job").waits_for, "the reason")
    assert store.get("job").waits_for == "other programs use more than 15 % of the processors"
    describe_machine(paths.root, MachineUse(load=0.0, on_battery=True))
    wait_until(lambda: "battery" in store.get("job").waits_for, "the next reason")
    describe_machine(paths.root, FREE)
    assert runner.wait(timeout=60) == 0
    assert store.get("job").status is Status.FAILED  # as its script says
    assert kinds(store, "job") == ["job_postponed", "job_postponed", "job_started", "job_failed"]


def test_a_running_job_is_paused_with_a_checkpoint_and_continues_from_it(
    store: Store, spawn: Spawn, paths: DataPaths
) -> None:
    store.insert(make_job("job", "saves a checkpoint when stopped", only_while_free=True))
    runner = spawn()
    wait_until(lambda: store.get("job").step == 3, "the third step")
    (worker,) = psutil.Process(runner.pid).children()
    assert worker.nice() == NICENESS
    describe_machine(paths.root, BUSY)
    wait_until(lambda: store.get("job").status is Status.QUEUED, "the pause")
    paused = next(event for event in store.events("job") if isinstance(event, JobPostponed))
    assert paused.reason == "other programs use more than 30 % of the processors"
    assert (store.get("job").checkpoint_step, store.get("job").step) == (3, 3)
    describe_machine(paths.root, FREE)
    wait_until(lambda: store.get("job").step == 6, "the steps after the checkpoint")
    assert store.get("job").status is Status.IN_PROGRESS
    store.request_cancel("job")
    assert runner.wait(timeout=60) == 0


def test_a_job_that_was_asked_for_goes_first_and_pauses_one_that_was_not(store: Store, spawn: Spawn) -> None:
    store.insert(make_job("background", "saves a checkpoint when stopped", only_while_free=True))
    runner = spawn()
    wait_until(lambda: store.get("background").step == 3, "the third step")
    store.insert(make_job("asked", "fails"))
    wait_until(lambda: store.get("asked").status is Status.FAILED, "the job that was asked for")
    postponed = [event for event in store.events("background") if isinstance(event, JobPostponed)]
    assert postponed[0].reason == "a job that was asked for goes first"
    wait_until(lambda: store.get("background").step == 6, "the first job again")
    store.request_cancel("background")
    assert runner.wait(timeout=60) == 0
    assert store.get("background").status is Status.CANCELLED


def test_a_waiting_job_runs_now_if_a_user_asks_for_it(store: Store, spawn: Spawn, paths: DataPaths) -> None:
    describe_machine(paths.root, BUSY)
    store.insert(make_job("job", "fails", only_while_free=True))
    runner = spawn()
    wait_until(lambda: store.get("job").waits_for, "the reason")
    store.append("job", JobAskedFor())
    assert runner.wait(timeout=60) == 0
    assert kinds(store, "job") == ["job_postponed", "job_asked_for", "job_started", "job_failed"]


def test_a_running_job_that_a_user_asks_for_is_not_paused(store: Store, spawn: Spawn, paths: DataPaths) -> None:
    store.insert(make_job("job", "hangs", only_while_free=True))
    runner = spawn()
    wait_until(lambda: store.get("job").step == 1, "the first step")
    store.append("job", JobAskedFor())
    describe_machine(paths.root, BUSY)
    store.insert(make_job("other", "fails"))
    time.sleep(0.5)  # ten looks at the machine: there is no event to wait for
    assert store.get("job").status is Status.IN_PROGRESS
    store.request_cancel("job")
    assert runner.wait(timeout=60) == 0


def test_a_waiting_job_can_be_cancelled_and_the_runner_then_ends(store: Store, spawn: Spawn, paths: DataPaths) -> None:
    describe_machine(paths.root, BUSY)
    store.insert(make_job("job", "fails", only_while_free=True))
    runner = spawn()
    wait_until(lambda: store.get("job").waits_for, "the reason")
    store.request_cancel("job")
    assert runner.wait(timeout=60) == 0
    assert store.get("job").status is Status.CANCELLED


def test_a_runner_that_is_killed_while_a_job_waits_leaves_it_to_the_next_one(
    store: Store, spawn: Spawn, paths: DataPaths
) -> None:
    describe_machine(paths.root, BUSY)
    store.insert(make_job("job", "fails", only_while_free=True))
    runner = spawn()
    wait_until(lambda: store.get("job").waits_for, "the reason")
    runner.kill()
    runner.wait()
    assert store.get("job").status is Status.QUEUED
    describe_machine(paths.root, FREE)
    assert spawn().wait(timeout=60) == 0
    assert store.get("job").status is Status.FAILED


def test_kill_9_in_the_middle_leaves_the_old_adapter_current_and_a_job_that_can_be_continued(
    store: Store, spawn: Spawn, paths: DataPaths
) -> None:
    registry = Registry(paths)
    paths.adapter("hangs", "old").mkdir(parents=True)
    registry.set_current("hangs", "old")
    store.insert(make_job("job", "hangs", only_while_free=True))
    runner = spawn()
    wait_until(lambda: store.get("job").step == 1, "the first step")
    runner.kill()
    runner.wait()
    lock = FileLock(paths.runner_lock)
    assert lock.acquire(timeout_s=60)  # the worker is gone as well
    with lock:
        recover(store, registry)
    job = store.get("job")
    assert (job.status, job.only_while_free) == (Status.INTERRUPTED, True)
    assert paths.current("hangs").resolve().name == "old"
    assert store.requeue("job", JobResumed()).only_while_free


def test_the_position_in_the_queue_is_that_in_which_jobs_run(tmp_path: Path) -> None:
    store = Store(Settings(data_dir=tmp_path).paths.database, time.time)
    store.create()
    for job_id, free in (("background", True), ("first", False), ("second", False)):
        store.insert(make_job(job_id, job_id, only_while_free=free))
    assert [store.queue_position(job_id) for job_id in ("first", "second", "background")] == [1, 2, 3]
    store.append("first", JobStarted())
    assert [store.queue_position(job_id) for job_id in ("second", "background")] == [2, 3]
