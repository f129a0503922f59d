"""What is decided before a load: which base model, whether memory suffices, and which adapter a name refers to."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from peft_core.adapters.registry import Registry
from peft_core.adapters.service import AdapterService
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import AdapterInUse, AdapterNotFound, AdapterNotLoaded, InferenceError, InvalidArgument
from peft_core.inference import service as service_module
from peft_core.inference.service import InferenceService, TrainingNeed
from peft_core.manager import PEFTManager
from peft_core.retrieval.service import RetrievalService
from peft_core.schemas.generation import EngineChoice
from peft_core.schemas.results import BaseMatch, DeletedAdapter, MemoryState, ResidentAdapter
from tests.factories import SMOLLM2_SHAPE, make_base, record_base
from tests.model_files import write_adapter, write_model

GB = 1_000_000_000


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return record_base(write_adapter(tmp_path / "adapter"), resolve(str(base), Settings()))


def make_service(data_dir: Path, *, training: TrainingNeed | None = None, **settings: Any) -> InferenceService:
    chosen = Settings(data_dir=data_dir, **settings)
    adapters = AdapterService(chosen, Registry(chosen.paths), lambda _: None)

    async def no_staleness(_: str) -> None:
        return None

    return InferenceService(chosen, adapters, lambda: training, RetrievalService(chosen.paths, no_staleness))


def delete(service: InferenceService, project_id: str, adapter_id: str) -> DeletedAdapter:
    """Delete an adapter as PEFTManager.delete_adapter does."""
    return service._adapters.delete(project_id, adapter_id, service.require_unused)


def set_free_memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(service_module, "available_memory_bytes", lambda: size)


def make_resident(
    service: InferenceService, monkeypatch: pytest.MonkeyPatch, *adapters: Path, base: Path | None = None
) -> None:
    """Make the client report these adapters as resident."""
    resident_adapters = [
        ResidentAdapter(adapter_path=str(path), active=index == 0) for index, path in enumerate(adapters)
    ]
    resident = MemoryState(base_model="tiny", base_path=str(base), adapters=resident_adapters, memory_bytes=1)
    monkeypatch.setattr(type(service._client), "resident", resident)


async def test_a_base_that_is_not_recorded_must_be_named(
    data_dir: Path, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapter / "adapter_manifest.json").unlink()
    service = make_service(data_dir, default_base_model=str(base))
    with pytest.raises(InvalidArgument, match=r"base_model is missing.*only the configuration names"):
        await service.load(str(adapter), None, accept_unproven_base=True, on_progress=None)
    verified = service._adapters.verify(str(adapter), str(base), scan_weights=False)
    assert verified.verdict is BaseMatch.SHAPE_ONLY


# -- memory --------------------------------------------------------------------------------------------------------


async def test_a_model_that_does_not_fit_is_rejected_with_the_sizes(
    data_dir: Path, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free_memory(monkeypatch, GB // 10)
    with pytest.raises(InferenceError, match=r"takes about 0\.\d GB, 0\.1 GB are free\.") as caught:
        await make_service(data_dir).load(str(adapter), str(base), accept_unproven_base=False, on_progress=None)
    assert caught.value.code == "not_enough_memory"


@pytest.mark.parametrize(
    ("rule", "free", "code"),
    [
        ("if_it_fits", 4 * GB, "not_enough_memory"),
        ("if_it_fits", 40 * GB, None),
        ("never", 40 * GB, "training_runs"),
        ("always", GB // 10, None),
    ],
)
def test_during_a_training_the_setting_decides_whether_a_model_is_loaded(
    data_dir: Path, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch, rule: str, free: int, code: str | None
) -> None:
    set_free_memory(monkeypatch, free)
    service = make_service(data_dir, training=TrainingNeed("web", 38 * GB // 10), load_during_training=rule)
    if code is None:
        assert service._load_request(str(adapter), str(base), insist=False).base.name == "tiny"
        return
    with pytest.raises(InferenceError, match="'web'") as caught:
        service._load_request(str(adapter), str(base), insist=False)
    assert caught.value.code == code
    assert "cancel_training" in str(caught.value)
    if rule == "if_it_fits":
        assert "the training of 'web' will need 3.8 GB" in caught.value.message


def test_a_resident_base_needs_no_more_memory(
    data_dir: Path, adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free_memory(monkeypatch, 0)
    service = make_service(data_dir, load_during_training="never", training=TrainingNeed("web", GB))
    make_resident(service, monkeypatch, base=base)
    assert service._load_request(str(adapter), str(base), insist=False)


@pytest.mark.parametrize(("engine", "fits"), [("auto", False), ("torch", False), ("llamacpp", True)])
def test_llama_cpp_needs_half_the_memory_for_the_weights(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, engine: EngineChoice, fits: bool
) -> None:
    large = make_base(shape=SMOLLM2_SHAPE.model_copy(update={"parameters": 7_000_000_000}))
    service = make_service(data_dir, engine=engine)
    set_free_memory(monkeypatch, 20 * GB)
    with nullcontext() if fits else pytest.raises(InferenceError, match="takes about 2"):
        service._require_memory(large, engine)


# -- names ---------------------------------------------------------------------------------------------------------


def test_a_project_id_refers_to_its_loaded_adapter_rather_than_a_newer_current_one(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(data_dir)
    lora = data_dir / "projects" / "web" / "lora"
    for name in ("old", "new"):
        write_adapter(lora / name)
    (lora / "current").symlink_to("new")
    make_resident(service, monkeypatch, lora / "old")
    assert service._loaded_path("web") == lora / "old"
    make_resident(service, monkeypatch, lora / "old", lora / "new")
    assert service._loaded_path("web") == lora / "new"
    assert service._loaded_path(str(lora / "old")) == lora / "old"


async def test_unloading_without_an_adapter_in_memory_starts_no_worker(data_dir: Path) -> None:
    service = make_service(data_dir)
    assert (await service.unload(None)).status == "nothing_loaded"
    with pytest.raises(AdapterNotLoaded, match="'web' is not in memory"):
        await service.unload("web")
    assert service._client.pid is None


# -- delete --------------------------------------------------------------------------------------------------------


def test_a_loaded_adapter_is_not_deleted(data_dir: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    service = make_service(data_dir)
    lora = data_dir / "projects" / "web" / "lora"
    for name in ("adapter-01", "adapter-02"):
        record_base(write_adapter(lora / name), resolve(str(base), Settings()), name)
    (lora / "current").symlink_to("adapter-02")
    make_resident(service, monkeypatch, lora / "adapter-02")
    with pytest.raises(AdapterInUse, match="unload_adapter"):
        delete(service, "web", "adapter-02")
    make_resident(service, monkeypatch)
    deleted = delete(service, "web", "adapter-02")
    assert deleted.current == "adapter-01"
    assert deleted.freed_bytes > 1000
    assert not (lora / "adapter-02").exists()
    assert (lora / "current").resolve() == lora / "adapter-01"
    assert delete(service, "web", "adapter-01").current is None
    assert [path.name for path in lora.iterdir()] == [".lock"]


async def test_an_adapter_with_a_load_in_progress_is_not_deleted(
    data_dir: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = make_service(data_dir)
    lora = data_dir / "projects" / "web" / "lora"
    path = record_base(write_adapter(lora / "adapter-01"), resolve(str(base), Settings()))
    refused: list[bool] = []

    async def try_to_delete(*_: object) -> None:
        with pytest.raises(AdapterInUse, match="is being loaded"):
            delete(service, "web", "adapter-01")
        refused.append(True)
        raise InferenceError("the outcome does not matter")

    monkeypatch.setattr(service._client, "ask", try_to_delete)
    with pytest.raises(InferenceError):
        await service.load(str(path), str(base), accept_unproven_base=False, on_progress=None)
    assert refused
    monkeypatch.setattr(service._client, "is_still_loading", lambda adapter: adapter == path)  # a cancelled load
    with pytest.raises(AdapterInUse, match="is being loaded"):
        delete(service, "web", "adapter-01")
    monkeypatch.undo()
    delete(service, "web", "adapter-01")


async def test_a_loaded_adapter_is_not_deleted_if_the_projects_directory_is_a_symlink(
    data_dir: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "another disk"
    elsewhere.mkdir()
    data_dir.mkdir()
    (data_dir / "projects").symlink_to(elsewhere)
    lora = data_dir / "projects" / "web" / "lora"
    record_base(write_adapter(lora / "adapter-01"), resolve(str(base), Settings()))
    (lora / "current").symlink_to("adapter-01")
    service = make_service(data_dir)
    make_resident(service, monkeypatch, service._adapters.resolve("web"))
    with pytest.raises(AdapterInUse):
        delete(service, "web", "adapter-01")
    async with PEFTManager(Settings(data_dir=data_dir)) as manager:
        assert (await manager.get_adapter_info("web")).manifest is not None


@pytest.mark.parametrize("wrong", ["current", "..", "../../x", "", "web", "adapter-0", ".deleted.x"])
def test_only_a_complete_adapter_id_is_deleted(data_dir: Path, wrong: str) -> None:
    lora = data_dir / "projects" / "web" / "lora"
    write_adapter(lora / "adapter-01")
    (lora / "current").symlink_to("adapter-01")
    with pytest.raises(AdapterNotFound, match="adapter-01"):
        delete(make_service(data_dir), "web", wrong)
    assert (lora / "adapter-01").is_dir()
