"""Which changes of a job are shown in Codebase Gardener's registry, and by whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.gardener.registry import ProjectRegistry
from peft_core.jobs.recovery import recover
from peft_core.jobs.service import JobService
from peft_core.jobs.store import Store
from peft_core.manager import PEFTManager
from peft_core.paths import DataPaths
from peft_core.schemas.events import JobFailed, JobResumed, JobStarted, PhaseStarted
from peft_core.schemas.results import ErrorInfo, Phase, Status
from peft_core.schemas.training import EvaluatedAdapter
from tests.factories import make_job, make_request
from tests.unit.adapters.test_registry import write_draft
from tests.unit.gardener.conftest import WEB, adapter
from tests.unit.gardener.test_registry import web


@pytest.fixture
def store(paths: DataPaths) -> Store:
    store = Store(paths.database, lambda: 0.0, ProjectRegistry(paths).show)
    store.create()
    return store


@pytest.fixture
def service(paths: DataPaths) -> JobService:
    return JobService(Settings(data_dir=paths.root), Registry(paths))


def test_each_change_of_a_trainings_status_is_shown(store: Store, registry_file: Path) -> None:
    shown = []
    store.insert(make_job("a", WEB))
    shown.append(web(registry_file)["training_status"])
    store.append("a", JobStarted())
    store.append("a", JobFailed(error=ErrorInfo(code="x", message="x")))
    shown.append(web(registry_file)["training_status"])
    store.requeue("a", JobResumed())
    shown.append(web(registry_file)["training_status"])
    store.request_cancel("a")
    shown.append(web(registry_file)["training_status"])
    assert shown == ["training", "failed", "training", "not_started"]


def test_progress_and_evaluations_do_not_touch_the_registry(store: Store, registry_file: Path) -> None:
    evaluation = make_request(evaluated=EvaluatedAdapter(adapter_path=Path("/a")))
    before = registry_file.read_bytes()
    store.insert(make_job("e", WEB, request=evaluation))
    store.append("e", JobStarted())
    assert registry_file.read_bytes() == before
    store.insert(make_job("a", WEB))
    store.append("a", JobStarted())
    before = registry_file.read_bytes()
    registry_file.write_bytes(before.replace(b'"training"', b'"not_started"'))
    store.append("a", PhaseStarted(phase=Phase.TRAINING))
    assert web(registry_file)["training_status"] == "not_started"


def test_a_recovered_job_shows_as_failed(store: Store, paths: DataPaths, registry_file: Path) -> None:
    store.insert(make_job("a", WEB))
    store.append("a", JobStarted())
    recover(store, Registry(paths))
    assert web(registry_file)["training_status"] == "failed"


@pytest.mark.parametrize("job_id", [None, "a"])
def test_asking_for_the_status_shows_what_a_killed_process_could_not(
    store: Store, service: JobService, paths: DataPaths, registry_file: Path, job_id: str | None
) -> None:
    directory = adapter(paths, WEB, "a")
    silent = Store(paths.database, lambda: 0.0)
    silent.insert(make_job("old", WEB, status=Status.FAILED))
    silent.insert(make_job("a", WEB, status=Status.COMPLETED))
    service.status_and_ensure_runner(WEB, "old")  # it is not the latest
    assert web(registry_file)["training_status"] == "not_started"
    assert service.status_and_ensure_runner(WEB, job_id).status is Status.COMPLETED
    assert (web(registry_file)["training_status"], web(registry_file)["lora_adapter_path"]) == (
        "completed",
        str(directory),
    )


def test_a_project_that_was_only_added_there_is_not_started_and_its_name_is_refused(
    store: Store, service: JobService, registry_file: Path
) -> None:
    store.insert(make_job("a", "other", status=Status.FAILED))
    assert service.status_and_ensure_runner(WEB).status is Status.NOT_STARTED
    with pytest.raises(InvalidArgument, match=WEB):
        service.status_and_ensure_runner("web")


async def test_a_training_without_data_needs_a_project_of_codebase_gardener(
    paths: DataPaths, registry_file: Path
) -> None:
    manager = PEFTManager(Settings(data_dir=paths.root))
    with pytest.raises(InvalidArgument, match=r"training_data = '/code/web' cannot be used: no such file"):
        await manager.train_adapter(WEB)
    with pytest.raises(InvalidArgument, match=f"must be its id: '{WEB}'"):
        await manager.train_adapter("web")
    with pytest.raises(InvalidArgument, match="training_data is missing: the absolute path"):
        await manager.train_adapter("other")


async def test_a_deleted_adapter_is_not_shown_any_more(store: Store, paths: DataPaths, registry_file: Path) -> None:
    published = Registry(paths).publish(write_draft(paths.root / "draft", "a"), WEB, "a")
    store.insert(make_job("a", WEB, status=Status.COMPLETED))
    assert web(registry_file)["lora_adapter_path"] == str(published)
    await PEFTManager(Settings(data_dir=paths.root)).delete_adapter(WEB, "a")
    assert (web(registry_file)["training_status"], web(registry_file)["lora_adapter_path"]) == ("not_started", None)
