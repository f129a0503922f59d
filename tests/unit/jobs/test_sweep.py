"""Sweeps: several trainings that differ in one setting, of which the best is published."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.jobs.free_machine import FreeMachine, Limits
from peft_core.jobs.running_job import RunnerState, RunningJob
from peft_core.jobs.service import JobService
from peft_core.jobs.state import Job
from peft_core.jobs.store import Store
from peft_core.jobs.sweep import best, of_all_runs, shown, status_of_sweep
from peft_core.schemas.cluster import ClusterPlan
from peft_core.schemas.events import AdapterWritten, JobCompleted, JobFailed, JobStarted
from peft_core.schemas.results import Estimate, Metrics, Status
from peft_core.schemas.task import JobRequest
from peft_core.schemas.training import Sweep, SweepRun, TrainingConfig
from peft_core.system.lock import FileLock
from peft_core.system.machine_use import MachineUse
from server.status_text import sweep_text
from tests.factories import make_cluster_plan, make_job, make_request
from tests.model_files import write_model
from tests.unit.adapters.test_registry import write_draft


def run(number: int, rank: int, **changes: object) -> Job:
    sweep = SweepRun(sweep_id="s", number=number, setting="rank")
    return make_job(f"run-{number}", request=make_request(config=TrainingConfig(rank=rank), sweep=sweep), **changes)


def completed(number: int, rank: int, loss: float | None, *, published: bool = False) -> Job:
    path = f"/adapters/run-{number}" if published else None
    metrics = Metrics(adapter_loss=loss)
    return run(number, rank, status=Status.COMPLETED, metrics=metrics, adapter_path=path)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ({}, "one setting"),
        ({"rank": [4, 8], "learning_rate": [1e-4, 2e-4]}, "one setting"),
        ({"rank": [8]}, "2 to 8 values"),
        ({"rank": [8, 8]}, "all different"),
        ({"learning_rate": [n / 1000 for n in range(1, 10)]}, "2 to 8 values"),
        ({"learning_rate": [0.0, 0.1]}, "greater than 0"),
        ({"alpha": [1, 2]}, "Extra inputs"),
    ],
)
def test_a_sweep_has_two_to_eight_different_values_of_one_setting(sweep: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TrainingConfig.model_validate({"sweep": sweep})


def test_a_swept_setting_is_not_given_as_well_and_each_run_has_one_value() -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        TrainingConfig(rank=8, sweep=Sweep(rank=[4, 8]))
    config = TrainingConfig(seed=7, sweep=Sweep(learning_rate=[1e-4, 2e-4]))
    assert config.runs == [TrainingConfig(seed=7, learning_rate=1e-4), TrainingConfig(seed=7, learning_rate=2e-4)]
    assert TrainingConfig(seed=7).runs == [TrainingConfig(seed=7)]


def test_the_best_run_has_the_lowest_held_out_loss_and_a_loss_that_is_no_number_never_wins() -> None:
    runs = [completed(1, 4, None), completed(2, 8, float("nan")), completed(3, 16, 1.3), completed(4, 32, 1.3)]
    assert best(runs) == runs[2]
    assert best([run(5, 64)]) is None


def test_a_sweep_is_shown_by_the_run_in_progress_then_the_next_and_at_last_the_best() -> None:
    ended, last = completed(1, 4, 1.5), completed(3, 16, 1.7)
    running, queued = run(2, 8, status=Status.IN_PROGRESS), run(2, 8)
    assert shown([ended, running, last], last) == running
    assert shown([ended, queued, last], last) == queued
    assert shown([ended, last], last) == ended
    assert shown([], last) == last


def test_the_status_of_a_sweep_names_every_run_and_the_best() -> None:
    status = status_of_sweep([completed(1, 4, 1.5, published=True), completed(2, 8, 1.25, published=True), run(3, 16)])
    assert status is not None
    assert (status.best_job_id, status.is_complete) == ("run-2", False)
    assert [(each.value, each.held_out_loss, each.published) for each in status.runs] == [
        (4.0, 1.5, True),
        (8.0, 1.25, True),
        (16.0, None, False),
    ]
    assert sweep_text(status).startswith(
        "Sweep of rank: 4 completed, held-out loss 1.500; 8 completed, held-out loss 1.250, best so far; 16 queued. "
    )


def test_what_a_sweep_takes_is_the_sum_of_its_runs_here_and_the_longest_on_a_cluster() -> None:
    def requests(cluster: ClusterPlan | None) -> list[JobRequest]:
        return [
            make_request(
                cluster=cluster,
                estimate=Estimate(train_tokens=1, steps=1, seconds=seconds, memory_bytes=memory, basis=""),
            )
            for seconds, memory in ((60.0, 10), (90.0, 30))
        ]

    here, there = of_all_runs(requests(None)), of_all_runs(requests(make_cluster_plan()))
    assert (here.seconds, there.seconds, here.memory_bytes) == (150.0, 90.0, 30)


class Ending:
    """A sweep whose first run is published with a loss of 1.0, and whose second run is about to end."""

    def __init__(self, root: Path) -> None:
        settings = Settings(data_dir=root)
        self.registry = Registry(settings.paths)
        self.store = Store(settings.paths.database, lambda: 0.0)
        self.store.create()
        self.store.insert(run(1, 4), run(2, 8))
        for job_id in ("run-1", "run-2"):
            self.store.append(job_id, JobStarted())
        published = self.registry.publish(write_draft(root / "draft", "run-1"), "web", "run-1")
        self.store.append("run-1", JobCompleted(adapter_path=str(published), metrics=Metrics(adapter_loss=1.0)))
        lock, machine = FileLock(settings.paths.runner_lock), FreeMachine(Limits())
        state = RunnerState(self.store, self.registry, settings, lock, machine, lambda: MachineUse(load=0.0))
        self.running = RunningJob(self.store.get("run-2"), state)

    def outcome(self, loss: float) -> object:
        return self.running._outcome(AdapterWritten(metrics=Metrics(adapter_loss=loss)), 0)


def test_a_run_that_is_not_better_is_completed_without_an_adapter(tmp_path: Path) -> None:
    for loss in (1.0, 1.1, float("nan")):
        outcome = Ending(tmp_path / str(loss)).outcome(loss)
        assert isinstance(outcome, JobCompleted)
        assert outcome.adapter_path is None


def test_a_run_that_is_better_or_whose_rival_was_deleted_is_to_be_published(tmp_path: Path) -> None:
    assert isinstance(Ending(tmp_path / "better").outcome(0.9), JobFailed)  # this test wrote no adapter for it
    ending = Ending(tmp_path / "deleted")
    ending.registry.delete("web", "run-1")
    assert isinstance(ending.outcome(1.1), JobFailed)


def test_a_sweep_is_queued_and_cancelled_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = JobService(Settings(data_dir=tmp_path / "data"), Registry(Settings(data_dir=tmp_path / "data").paths))
    monkeypatch.setattr(jobs._supervisor, "ensure_runner", lambda: None)
    records = [{"text": f"def add_{n}(a, b):\n    return a + {n} * b\n"} for n in range(60)]
    config = TrainingConfig(base_model=str(write_model(tmp_path / "base")), max_length=128, sweep=Sweep(rank=[2, 4, 8]))
    dry_run = jobs.inspect(records, config)
    assert "This is the first of the sweep's 3 runs, which differ in rank only." in dry_run.estimate.chosen
    status = jobs.queue_runs("web", jobs.plan_runs("web", records, config), records)
    assert status.sweep is not None
    assert [each.value for each in status.sweep.runs] == [2.0, 4.0, 8.0]
    assert [job.request.config.rank for job in jobs.trainings("web")] == [8, 4, 2]
    assert jobs.status_and_ensure_runner("web").job_id == status.job_id  # the first run stands for the sweep
    second = status.sweep.runs[1].job_id
    assert jobs.cancel("web", second).status is Status.CANCELLED
    assert [job.status for job in jobs.trainings("web")] == [Status.QUEUED, Status.CANCELLED, Status.QUEUED]
    jobs.cancel("web", None)
    assert {job.status for job in jobs.trainings("web")} == {Status.CANCELLED}
