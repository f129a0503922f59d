"""Which job a question about a project is answered with."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import InvalidArgument, JobNotFound, JobStateError
from peft_core.jobs.service import JobService
from peft_core.jobs.state import Job
from peft_core.jobs.store import Store
from peft_core.schemas.results import Status
from peft_core.schemas.training import DataSelection, EvaluatedAdapter, TrainingConfig
from peft_core.system.lock import FileLock
from tests.factories import make_job, make_request


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


@pytest.fixture
def service(settings: Settings) -> JobService:
    return JobService(settings, Registry(settings.paths))


def insert(settings: Settings, *jobs: Job) -> None:
    store = Store(settings.paths.database, lambda: 0.0)
    store.create()
    for job in jobs:
        store.insert(job)


def evaluation(job_id: str, project_id: str = "web") -> Job:
    request = make_request(evaluated=EvaluatedAdapter(adapter_path=Path("/a")))
    return make_job(job_id, project_id, status=Status.FAILED, request=request)


def test_a_project_is_answered_with_its_latest_training_although_an_evaluation_followed(
    settings: Settings, service: JobService
) -> None:
    insert(
        settings,
        make_job("old", status=Status.FAILED),
        make_job("new", status=Status.COMPLETED),
        evaluation("evaluation"),
    )
    status = service.status_and_ensure_runner("web")
    assert (status.job_id, status.kind) == ("new", "training")
    named = service.status_and_ensure_runner("web", "evaluation")
    assert (named.kind, named.evaluated_on) == ("evaluation", "/code/web")


def test_an_evaluation_that_runs_after_the_latest_training_is_named_when_that_cannot_be_cancelled(
    settings: Settings, service: JobService
) -> None:
    waiting = evaluation("waiting").model_copy(update={"status": Status.QUEUED})
    insert(settings, make_job("training", status=Status.COMPLETED), waiting, make_job("other", "api"))
    with FileLock(settings.paths.runner_lock) as lock:
        assert lock.acquire()  # no runner may start
        with pytest.raises(
            JobStateError, match=r"training, cannot be cancelled.* job_id: evaluation waiting\."
        ) as caught:
            service.cancel("web", None)
        assert caught.value.code == "job_already_ended"
        assert service.cancel("web", "waiting").status is Status.CANCELLED
        with pytest.raises(JobStateError, match="Nothing needs to be done"):
            service.cancel("web", None)


def test_what_an_adapter_was_trained_on_is_unknown_if_the_record_of_its_job_cannot_be_read(
    settings: Settings, service: JobService
) -> None:
    insert(settings, make_job("known"), make_job("edited"))
    with closing(sqlite3.connect(settings.paths.database)) as db, db:
        db.execute("UPDATE jobs SET state = '{}' WHERE job_id = 'edited'")
    assert (service.base_of("edited"), service.dataset_of("edited")) == (None, None)
    assert service.base_of("known") is not None
    settings.paths.database.write_bytes(b"no database any more" * 100)
    assert (service.base_of("known"), service.dataset_of("known")) == (None, None)


@pytest.mark.parametrize("newer", ["a", "b"])
def test_two_adapters_are_compared_on_the_source_of_the_newer_one_by_default(
    settings: Settings, service: JobService, newer: str
) -> None:
    for project, created_at in (("a", 1.0), ("b", 3.0 if newer == "b" else 0.5)):
        request = make_request(
            source=Path(f"/code/{project}"), config=TrainingConfig(include=["src/"], exclude=["old/"], rank=4)
        )
        job = make_job(f"{project}-01", project, status=Status.COMPLETED, created_at=created_at, request=request)
        insert(settings, job)
    adapters = [Path(f"/data/projects/{project}/lora/{project}-01") for project in ("a", "b")]
    data, selection = service._source_of_newest(adapters)
    assert data == f"/code/{newer}"
    assert selection == DataSelection(include=["src/"], exclude=["old/"])


def test_without_a_recorded_path_the_data_of_a_comparison_must_be_given(
    settings: Settings, service: JobService
) -> None:
    adapters = [Path("/elsewhere/a"), Path("/elsewhere/b")]
    with pytest.raises(InvalidArgument, match="evaluation_data is missing: it must be given"):
        service._source_of_newest(adapters)
    records = make_request(source_kind="records")
    insert(settings, make_job("a", status=Status.COMPLETED, request=records))
    with pytest.raises(InvalidArgument, match="is not recorded here"):
        service._source_of_newest(adapters)


def test_a_project_that_has_evaluations_only_is_answered_with_the_latest(
    settings: Settings, service: JobService
) -> None:
    insert(settings, evaluation("first"), evaluation("second"))
    assert service.status_and_ensure_runner("web").job_id == "second"


def test_an_unknown_project_is_an_error_that_names_the_known_ones(settings: Settings, service: JobService) -> None:
    insert(settings, *(make_job(f"job-{n}", f"project-{n}", status=Status.FAILED) for n in range(12)))
    with pytest.raises(JobNotFound) as caught:
        service.status_and_ensure_runner("proiect-1")
    assert caught.value.code == "unknown_project"
    assert "Projects: project-11, project-10, " in caught.value.message
    assert caught.value.message.endswith(" and 2 more.")


def test_a_first_project_is_not_unknown_but_not_started(service: JobService) -> None:
    assert service.status_and_ensure_runner("web").status is Status.NOT_STARTED


@pytest.mark.parametrize(
    ("directory", "project"),
    [("my adapter (v2)", "my-adapter-v2"), ("größe", "gr-e"), ("...", "adapter"), ("a" * 99, "a" * 64)],
)
def test_an_adapter_from_another_directory_is_a_project_named_after_it(
    service: JobService, tmp_path: Path, directory: str, project: str
) -> None:
    assert service._project_of(tmp_path / directory) == project
