"""Jobs on a cluster in the real runner, with bridges that follow a script instead of a remote run."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import psutil
import pytest

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.jobs.cluster_job import MAX_DEATHS
from peft_core.jobs.recovery import recover
from peft_core.jobs.service import JobService
from peft_core.jobs.state import Job
from peft_core.jobs.store import Store
from peft_core.paths import DataPaths
from peft_core.schemas.events import (
    Event,
    HeldOutMeasured,
    JobFailed,
    JobInterrupted,
    JobResumed,
    JobStarted,
    RunPlanned,
    StepCompleted,
)
from peft_core.schemas.results import ErrorInfo, Status
from peft_core.system.lock import FileLock
from peft_core.system.machine_use import MachineUse
from tests.factories import make_cluster_plan, make_job, make_request
from tests.integration.conftest import Spawn
from tests.integration.scripted_bridge import CANCELLED, OUT_OF_REACH, STARTS, extend_remote_run
from tests.integration.scripted_runner import describe_machine
from tests.integration.scripted_worker import step_completed
from tests.integration.test_runner import wait_until

PLANNED = RunPlanned(device="cuda", total_steps=1000)
GONE = JobInterrupted(reason="The cluster is gone.")


def cluster_job(job_id: str, project: str = "", **changes: object) -> Job:
    return make_job(job_id, project or job_id, request=make_request(cluster=make_cluster_plan()), **changes)


def let_run(paths: DataPaths, job_id: str, *events: Event) -> None:
    extend_remote_run(paths.job(job_id).root, *events)


def steps(store: Store, job_id: str) -> list[int]:
    return [event.step for event in store.events(job_id) if isinstance(event, StepCompleted)]


def test_several_jobs_on_the_cluster_run_beside_the_one_on_this_machine(
    store: Store, spawn: Spawn, paths: DataPaths
) -> None:
    for job_id in ("a", "b", "c"):
        store.insert(cluster_job(job_id))
        let_run(paths, job_id, PLANNED, step_completed(1))
    store.insert(make_job("here", "hangs"))
    store.insert(make_job("next", "fails"))
    runner = spawn()
    wait_until(lambda: [store.get(job).step for job in ("a", "b", "c", "here")] == [1] * 4, "the first steps")
    assert (store.get("next").status, store.queue_position("next")) == (Status.QUEUED, 2)
    store.insert(cluster_job("d"))
    wait_until(lambda: store.get("d").status is Status.IN_PROGRESS, "a job that was queued later")
    for job_id in ("a", "b", "c", "d"):
        let_run(paths, job_id, GONE)
    store.request_cancel("here")
    assert runner.wait(timeout=60) == 0
    assert {job: store.get(job).status for job in ("a", "d", "here", "next")} == {
        "a": Status.INTERRUPTED,
        "d": Status.INTERRUPTED,
        "here": Status.CANCELLED,
        "next": Status.FAILED,
    }


def test_a_job_on_the_cluster_does_not_wait_for_this_machine_and_is_not_paused(
    store: Store, spawn: Spawn, paths: DataPaths
) -> None:
    describe_machine(paths.root, MachineUse(load=1.0))
    store.insert(cluster_job("job", only_while_free=True))
    store.insert(make_job("here", "fails"))
    let_run(paths, "job", PLANNED, step_completed(1))
    runner = spawn()
    wait_until(lambda: store.get("job").step == 1 and store.get("here").status is Status.FAILED, "both jobs")
    let_run(paths, "job", GONE)
    assert runner.wait(timeout=60) == 0
    assert [event.kind for event in store.events("job")].count("job_postponed") == 0


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_the_next_runner_catches_up_on_a_job_whose_runner_has_died(
    store: Store, spawn: Spawn, paths: DataPaths, how: str
) -> None:
    store.insert(cluster_job("job"))
    measured = HeldOutMeasured(step=0, loss=2.0, whole_set=True)
    let_run(paths, "job", PLANNED, measured, step_completed(1), step_completed(2))
    runner = spawn()
    wait_until(lambda: store.get("job").step == 2, "the second step")
    getattr(runner, how)()
    runner.wait(timeout=60)
    with FileLock(paths.runner_lock) as lock:
        assert lock.acquire(timeout_s=30)  # the bridge has ended as well
        recover(store, Registry(paths))
    assert store.get("job").status is Status.IN_PROGRESS
    assert not (paths.job("job").root / CANCELLED).exists()
    let_run(paths, "job", step_completed(3))
    second = spawn()
    wait_until(lambda: store.get("job").step == 3, "the third step")
    let_run(paths, "job", GONE)
    assert second.wait(timeout=60) == 0
    kinds = [event.kind for event in store.events("job")]
    assert steps(store, "job") == [1, 2, 3]
    assert [kinds.count(kind) for kind in ("job_started", "run_planned", "held_out_measured")] == [1, 1, 1]
    assert store.get("job").error is not None


def test_a_call_for_the_status_starts_a_runner_for_a_job_on_the_cluster(
    store: Store, paths: DataPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.insert(cluster_job("job", "web"))
    store.append("job", JobStarted())
    jobs = JobService(Settings(data_dir=paths.root), Registry(paths))
    started: list[int] = []
    monkeypatch.setattr(jobs._supervisor, "_spawn_runner", lambda: started.append(1))
    assert jobs.status_and_ensure_runner("web").status is Status.IN_PROGRESS
    assert started == [1]
    assert jobs.running_job() is None  # nothing uses this machine's memory


def test_a_bridge_that_is_killed_is_started_again_and_no_event_is_recorded_twice(
    store: Store, spawn: Spawn, paths: DataPaths
) -> None:
    store.insert(cluster_job("job"))
    twice = HeldOutMeasured(step=5, loss=2.0)
    let_run(paths, "job", PLANNED, step_completed(1), twice)
    runner = spawn()
    for bridge in range(1, MAX_DEATHS + 2):  # each of them records something, so they are not deaths in succession
        wait_until(lambda n=bridge: store.get("job").step == n, "a step")
        (process,) = psutil.Process(runner.pid).children()
        process.kill()
        let_run(paths, "job", step_completed(bridge + 1))
    wait_until(lambda: store.get("job").step == MAX_DEATHS + 2, "the last step")
    let_run(paths, "job", twice, GONE)
    assert runner.wait(timeout=60) == 0
    assert steps(store, "job") == list(range(1, MAX_DEATHS + 3))
    assert [event for event in store.events("job") if isinstance(event, HeldOutMeasured)] == [twice, twice]


def test_a_job_fails_after_several_bridges_have_died_at_their_start(
    store: Store, spawn: Spawn, paths: DataPaths
) -> None:
    store.insert(cluster_job("job", "dies at its start"))
    assert spawn().wait(timeout=60) == 0
    job = store.get("job")
    assert (paths.job("job").root / STARTS).read_text() == "x" * MAX_DEATHS
    assert job.error is not None
    assert (job.status, job.error.code) == (Status.FAILED, "killed")
    assert "bridge to the cluster was killed" in job.error.message


def test_a_cancellation_reaches_the_cluster(store: Store, spawn: Spawn, paths: DataPaths) -> None:
    store.insert(cluster_job("job"))
    let_run(paths, "job", PLANNED, step_completed(1))
    runner = spawn()
    wait_until(lambda: store.get("job").step == 1, "the first step")
    store.request_cancel("job")
    assert runner.wait(timeout=60) == 0
    assert store.get("job").status is Status.CANCELLED
    assert (paths.job("job").root / CANCELLED).exists()


def test_a_cancellation_that_does_not_reach_the_cluster_ends_the_job_and_says_what_may_continue(
    store: Store, spawn: Spawn, paths: DataPaths
) -> None:
    store.insert(cluster_job("job", "out of reach"))
    let_run(paths, "job", PLANNED, step_completed(1))
    runner = spawn()
    wait_until(lambda: store.get("job").step == 1, "the first step")
    store.request_cancel("job")
    assert runner.wait(timeout=60) == 0
    job = store.get("job")
    assert (job.status, job.note) == (Status.CANCELLED, OUT_OF_REACH.removesuffix("."))


def test_a_cancellation_reaches_the_cluster_if_no_runner_was_alive(
    store: Store, spawn: Spawn, paths: DataPaths
) -> None:
    store.insert(cluster_job("job"))
    store.append("job", JobStarted())
    store.request_cancel("job")
    assert spawn().wait(timeout=60) == 0
    assert store.get("job").status is Status.CANCELLED
    assert (paths.job("job").root / CANCELLED).exists()


def test_the_error_of_a_remote_run_is_that_of_the_job_and_a_resumed_job_passes_through_its_phases_again(
    store: Store, spawn: Spawn, paths: DataPaths
) -> None:
    store.insert(cluster_job("job"))
    let_run(paths, "job", PLANNED, step_completed(1), JobFailed(error=ErrorInfo(code="no_luck", message="No luck.")))
    assert spawn().wait(timeout=60) == 0
    job = store.get("job")
    assert job.error is not None
    assert (job.status, job.error.code) == (Status.FAILED, "no_luck")
    (paths.job("job").root / "remote.jsonl").unlink()
    store.requeue("job", JobResumed())
    let_run(paths, "job", PLANNED, step_completed(1), step_completed(2))
    runner = spawn()
    wait_until(lambda: store.get("job").step == 2, "the second step")
    assert store.get("job").detail == "connecting"
    runner.send_signal(signal.SIGTERM)
    assert runner.wait(timeout=60) == 0
    assert store.get("job").status is Status.IN_PROGRESS


def test_jobs_here_and_on_the_cluster_have_queues_of_their_own(tmp_path: Path) -> None:
    store = Store(Settings(data_dir=tmp_path).paths.database, time.time)
    store.create()
    for job in (make_job("here", "here"), cluster_job("there"), make_job("later", "later"), cluster_job("last")):
        store.insert(job)
    store.append("here", JobStarted())
    assert [store.queue_position(job_id) for job_id in ("later", "there", "last")] == [2, 1, 2]
