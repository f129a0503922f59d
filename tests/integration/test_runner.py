"""The real runner in a process of its own, with workers that follow a script."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import StorageError
from peft_core.jobs import supervisor
from peft_core.jobs.recovery import recover
from peft_core.jobs.running_job import RUNNER
from peft_core.jobs.service import JobService
from peft_core.jobs.state import Job
from peft_core.jobs.store import Store
from peft_core.paths import DataPaths
from peft_core.schemas.events import JobInterrupted, JobResumed, JobStarted, RunPlanned, StepCompleted
from peft_core.schemas.results import Status
from peft_core.schemas.task import TrainingTask
from peft_core.schemas.training import EvaluatedAdapter, TrainingConfig
from peft_core.system.failures import error_info
from peft_core.system.lock import FileLock
from tests.factories import make_comparison, make_evaluation, make_job, make_request
from tests.integration.conftest import Spawn
from tests.integration.scripted_worker import step_completed
from tests.model_files import write_model


def wait_until(condition: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.02)


def run_one(store: Store, spawn: Spawn, project: str) -> Job:
    store.insert(make_job("job", project))
    assert spawn().wait(timeout=60) == 0
    return store.get("job")


def test_the_task_names_the_data_directory_and_the_allowed_roots(store: Store, spawn: Spawn, paths: DataPaths) -> None:
    run_one(store, spawn, "resumes")
    task = TrainingTask.model_validate_json(paths.job("job").task.read_text())
    assert task.data_dir == paths.root
    assert task.allowed_roots is None


def test_a_resumed_run_replays_unrecorded_events_and_no_event_is_recorded_twice(store: Store, spawn: Spawn) -> None:
    store.insert(make_job("job", "resumes"))
    recorded = (step_completed(1), step_completed(2))
    for event in (JobStarted(), RunPlanned(device="cpu", total_steps=1000), *recorded, JobInterrupted(reason="killed")):
        store.append("job", event)
    store.requeue("job", JobResumed())
    assert spawn().wait(timeout=60) == 0
    steps = [event.step for event in store.events("job") if isinstance(event, StepCompleted)]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert store.get("job").step == 6


def test_the_error_that_a_worker_reports_is_recorded(store: Store, spawn: Spawn) -> None:
    job = run_one(store, spawn, "fails")
    assert job.status is Status.FAILED
    assert job.error is not None
    assert (job.error.code, job.error.message, job.error.suggestions) == (
        "no_luck",
        "No luck today.",
        ("Try tomorrow",),
    )


def test_a_crashed_worker_is_reported_with_its_signal_and_the_end_of_its_log(store: Store, spawn: Spawn) -> None:
    job = run_one(store, spawn, "crashes")
    assert job.status is Status.FAILED
    assert job.error is not None
    assert "SIGSEGV" in job.error.message
    assert "something odd on stderr" in job.error.message


def test_a_worker_with_an_endless_line_is_ended_and_the_next_job_runs(store: Store, spawn: Spawn) -> None:
    store.insert(make_job("job", "never ends a line"))
    store.insert(make_job("next", "fails"))
    assert spawn().wait(timeout=60) == 0
    error = store.get("job").error
    assert error is not None
    assert (error.code, store.get("next").status) == ("endless_event", Status.FAILED)
    assert error.suggestions


def test_a_killed_worker_is_reported_as_probably_out_of_memory(store: Store, spawn: Spawn) -> None:
    job = run_one(store, spawn, "killed")
    assert (job.status, job.step) == (Status.FAILED, 3)
    assert job.error is not None
    assert "SIGKILL" in job.error.message
    assert "out of memory" in job.error.suggestions[0]


def test_a_worker_that_exits_with_0_but_wrote_no_adapter_has_failed(store: Store, spawn: Spawn) -> None:
    job = run_one(store, spawn, "silent")
    assert (job.status, job.adapter_path) == (Status.FAILED, None)


def test_a_worker_that_reports_a_missing_adapter_has_failed(store: Store, spawn: Spawn) -> None:
    job = run_one(store, spawn, "reports a missing adapter")
    assert (job.status, job.adapter_path) == (Status.FAILED, None)


def test_a_worker_that_received_sigterm_is_interrupted(store: Store, spawn: Spawn) -> None:
    assert run_one(store, spawn, "asked to stop").status is Status.INTERRUPTED


def test_a_worker_is_ended_at_its_time_limit_and_can_be_resumed(store: Store, spawn: Spawn) -> None:
    request = make_request(config=TrainingConfig(max_minutes=0.01))
    store.insert(make_job("job", "hangs", request=request))
    assert spawn().wait(timeout=60) == 0
    job = store.get("job")
    assert job.error is not None
    assert (job.status, job.error.message) == (
        Status.INTERRUPTED,
        "The time limit was reached: config.max_minutes = 0.01.",
    )
    assert store.requeue("job", JobResumed()).status is Status.QUEUED


def test_an_error_in_a_task_group_keeps_its_code_text_and_advice() -> None:
    error = ExceptionGroup(
        "unhandled", [StorageError("The disk is full.", code="disk_full", suggestions=["Free some"])]
    )
    problem = error_info(error, RUNNER)
    assert (problem.code, problem.message, problem.suggestions) == ("disk_full", "The disk is full.", ("Free some",))


def test_a_runner_that_cannot_work_fails_its_job_with_the_reason(
    paths: DataPaths, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RUNNER", [sys.executable, "-c", "raise SystemExit('no runner today')"])
    store.insert(make_job("job"))
    jobs = JobService(Settings(data_dir=paths.root), Registry(paths))
    wait_until(lambda: jobs.status_and_ensure_runner("web").status is Status.FAILED, "the failure")
    error = jobs.status_and_ensure_runner("web").error
    assert error is not None
    assert "no runner today" in error.message


def test_a_job_fails_after_several_runners_were_killed_at_their_start(
    paths: DataPaths, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    starts = tmp_path / "starts"
    script = f"import os; open({str(starts)!r}, 'a').write('x'); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(supervisor, "RUNNER", [sys.executable, "-c", script])
    store.insert(make_job("job"))
    jobs = JobService(Settings(data_dir=paths.root), Registry(paths))
    wait_until(lambda: jobs.status_and_ensure_runner("web").status is Status.FAILED, "the failure")
    error = jobs.status_and_ensure_runner("web").error
    assert error is not None
    assert "runner was killed by SIGKILL" in error.message
    assert starts.read_text() == "x" * supervisor.MAX_KILLED


def test_a_job_stays_queued_and_can_be_cancelled_if_no_process_can_be_started(
    paths: DataPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "RUNNER", [str(tmp_path / "no such program")])
    base = write_model(tmp_path / "base")
    records = [{"text": f"def add_{n}(a, b):\n    return a + {n} * b\n"} for n in range(60)]
    jobs = JobService(Settings(data_dir=paths.root), Registry(paths))
    draft = jobs.plan("web", records, TrainingConfig(base_model=str(base), max_length=128))
    queued = jobs.queue("web", draft, records)
    assert queued.status is Status.QUEUED
    with pytest.raises(StorageError, match="Queued jobs stay queued") as caught:
        jobs.status_and_ensure_runner("web")
    assert caught.value.code == "runner_start"
    assert jobs.cancel("web", None).status is Status.CANCELLED
    assert queued.job_id is not None
    assert jobs.resume(queued.job_id).status is Status.QUEUED


def test_a_runner_is_started_and_reaped_even_if_no_thread_can_be_started(
    paths: DataPaths, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(supervisor, "RUNNER", [sys.executable, "-c", "raise SystemExit('no runner today')"])
    store.insert(make_job("job"))
    jobs = JobService(Settings(data_dir=paths.root), Registry(paths))
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", no_thread)
        assert jobs.status_and_ensure_runner("web").status is Status.QUEUED
    runner = jobs._supervisor._runner
    assert runner is not None
    wait_until(lambda: jobs.status_and_ensure_runner("web").status is Status.FAILED, "the failure")
    with pytest.raises(ProcessLookupError):
        os.kill(runner.pid, 0)  # it was reaped


def test_unusable_lines_of_a_worker_are_skipped(store: Store, spawn: Spawn) -> None:
    job = run_one(store, spawn, "prints noise")
    assert job.error is not None
    assert job.error.code == "after_babble"


def test_the_next_job_runs_after_every_kind_of_failure(store: Store, spawn: Spawn) -> None:
    projects = ["crashes", "fails", "silent", "killed", "reports a missing adapter"]
    for number, project in enumerate(projects):
        store.insert(make_job(project, project, created_at=float(number)))
    assert spawn().wait(timeout=60) == 0
    assert [job.status for job in store.in_state(Status.FAILED)] == [Status.FAILED] * len(projects)


@pytest.mark.parametrize("project", ["hangs", "stubborn"])
def test_a_running_job_is_cancelled_even_if_its_worker_ignores_sigterm(
    store: Store, spawn: Spawn, project: str
) -> None:
    store.insert(make_job("job", project))
    runner = spawn()
    wait_until(lambda: store.get("job").step == 1, "the first step")
    store.request_cancel("job")
    assert runner.wait(timeout=30) == 0
    assert store.get("job").status is Status.CANCELLED


def test_an_evaluation_job_completes_with_its_evaluation_and_a_report(
    store: Store, spawn: Spawn, paths: DataPaths, tmp_path: Path
) -> None:
    job = make_job("job", "evaluates")
    evaluated = EvaluatedAdapter(adapter_path=tmp_path / "adapter")
    request = job.request.model_copy(update={"evaluated": evaluated})
    store.insert(job.model_copy(update={"request": request}))
    assert spawn().wait(timeout=60) == 0
    job = store.get("job")
    assert (job.status, job.adapter_path) == (Status.COMPLETED, str(tmp_path / "adapter"))
    assert job.evaluation == make_evaluation().without_texts
    assert "return a + b" in (paths.job("job").root / "report.html").read_text()


def test_a_comparison_job_completes_with_the_adapter_to_keep_and_a_report(
    store: Store, spawn: Spawn, paths: DataPaths, tmp_path: Path
) -> None:
    job = make_job("job", "compares")
    evaluated = EvaluatedAdapter(adapter_path=tmp_path / "a", compared_with=tmp_path / "b")
    store.insert(job.model_copy(update={"request": job.request.model_copy(update={"evaluated": evaluated})}))
    assert spawn().wait(timeout=60) == 0
    job = store.get("job")
    comparison = make_comparison()
    assert (job.status, job.adapter_path) == (Status.COMPLETED, comparison.adapter_b.adapter_path)
    assert job.comparison == comparison.without_texts
    page = (paths.job("job").root / "report.html").read_text()
    assert "Keep adapter B" in page
    assert "return a + b" in page


def test_a_training_job_with_an_evaluation_but_no_adapter_has_failed(store: Store, spawn: Spawn) -> None:
    assert run_one(store, spawn, "evaluates").status is Status.FAILED


def test_only_one_of_several_runners_trains_at_a_time(store: Store, spawn: Spawn) -> None:
    store.insert(make_job("first", "hangs", created_at=0.0))
    store.insert(make_job("second", "fails", created_at=1.0))
    spawn(), spawn(), spawn()
    wait_until(lambda: store.get("first").step == 1, "the first step")
    assert store.get("second").status is Status.QUEUED
    store.request_cancel("first")
    wait_until(lambda: store.get("second").status is Status.FAILED, "the second job")
    assert [event.kind for event in store.events("first")].count("job_started") == 1


def test_a_killed_runner_leaves_an_interrupted_job_and_no_worker(store: Store, spawn: Spawn, paths: DataPaths) -> None:
    store.insert(make_job("job", "hangs"))
    runner = spawn()
    wait_until(lambda: store.get("job").step == 1, "the first step")
    runner.kill()
    runner.wait()
    lock = FileLock(paths.runner_lock)
    # The worker shares the lock: acquiring it means that the worker is gone as well.
    assert lock.acquire(timeout_s=20)
    with lock:
        recover(store, Registry(paths))
    job = store.get("job")
    assert job.status is Status.INTERRUPTED
    assert job.error is not None
    assert "gone" in job.error.message


def test_a_job_with_a_pending_cancel_request_is_cancelled_when_the_runner_dies(
    store: Store, spawn: Spawn, paths: DataPaths
) -> None:
    store.insert(make_job("job", "stubborn"))
    runner = spawn()
    wait_until(lambda: store.get("job").step == 1, "the first step")
    os.kill(runner.pid, signal.SIGSTOP)
    store.request_cancel("job")
    runner.kill()
    runner.wait()
    lock = FileLock(paths.runner_lock)
    assert lock.acquire(timeout_s=20)
    with lock:
        recover(store, Registry(paths))
    assert store.get("job").status is Status.CANCELLED


def test_a_runner_that_receives_sigterm_interrupts_its_job_and_ends_its_worker(
    store: Store, spawn: Spawn, paths: DataPaths
) -> None:
    store.insert(make_job("job", "hangs", created_at=0.0))
    store.insert(make_job("waiting", "fails", created_at=1.0))
    runner = spawn()
    wait_until(lambda: store.get("job").step == 1, "the first step")
    runner.terminate()
    assert runner.wait(timeout=30) == 0
    assert store.get("job").status is Status.INTERRUPTED
    assert store.get("waiting").status is Status.QUEUED
    with FileLock(paths.runner_lock) as lock:
        assert lock.acquire()


def test_a_job_inserted_while_the_runner_exits_is_not_forgotten(store: Store, spawn: Spawn) -> None:
    for round_number in range(3):
        store.insert(make_job(f"a{round_number}", "fails"))
        runner = spawn()
        wait_until(lambda n=round_number: store.get(f"a{n}").status.is_final, "the first job")
        store.insert(make_job(f"b{round_number}", "fails"))
        late = spawn()  # as a server would start one, whether or not the lock was held
        assert runner.wait(timeout=30) == 0
        assert late.wait(timeout=30) == 0
        assert store.get(f"b{round_number}").status is Status.FAILED
