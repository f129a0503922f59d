"""A data directory with one of everything that is kept."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peft_core.adapters.manifest import write_manifest
from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.jobs.store import Store
from peft_core.paths import DataPaths
from peft_core.schemas.events import (
    CheckpointSaved,
    JobCompleted,
    JobInterrupted,
    JobStarted,
    RunPlanned,
    StepCompleted,
)
from peft_core.schemas.results import Metrics
from peft_core.schemas.storage import DiskItem, DiskUsage
from peft_core.storage.service import StorageService
from peft_core.system import in_use
from tests.factories import make_job, make_manifest
from tests.model_files import GGUF_METADATA, gguf_bytes

KEY = "0123456789abcdef01234567"
F16 = gguf_bytes({**GGUF_METADATA, "general.name": (8, "tiny")}, {"token_embd.weight": (64, 64)})
DONE, STOPPED = "20260101-000000-aaaaaa", "20260102-000000-bbbbbb"

Usage = Callable[..., DiskUsage]


def write(path: Path, size: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * size)
    return path


def item(usage: DiskUsage, name: str) -> DiskItem:
    return next(item for item in usage.items if item.name == name)


def publish(paths: DataPaths, project: str, adapter_id: str) -> Path:
    draft = paths.job(adapter_id).adapter
    write(draft / "adapter_model.safetensors", 3000)
    (draft / "adapter_config.json").write_text('{"r": 16, "lora_alpha": 32, "target_modules": ["q_proj"]}')
    write_manifest(draft, make_manifest(adapter_id, project))
    return Registry(paths).publish(draft, project, adapter_id)


@pytest.fixture
def paths(tmp_path: Path) -> DataPaths:
    return DataPaths(tmp_path / "data")


@pytest.fixture
def store(paths: DataPaths) -> Store:
    clock = itertools.count(1_767_225_600.0)
    store = Store(paths.database, now=lambda: next(clock))
    store.create()
    return store


@pytest.fixture
def kept(paths: DataPaths, store: Store) -> DataPaths:
    """Fill the data directory."""
    base = paths.base_models / KEY
    write(base / "model.safetensors", 50_000)
    (base / "config.json").write_text(json.dumps({"_name_or_path": "SmolLM2-135M-Instruct"}))
    (paths.base_models / f"{KEY}.f16.gguf").write_bytes(F16)

    store.insert(make_job(DONE))
    adapter = publish(paths, "web", DONE)
    store.append(DONE, JobStarted())
    store.append(DONE, JobCompleted(adapter_path=str(adapter), metrics=Metrics()))
    write(paths.job(DONE).dataset / "train.jsonl", 7000)

    store.insert(make_job(STOPPED))
    for event in (
        JobStarted(),
        RunPlanned(device="cpu", total_steps=9),
        StepCompleted(step=4, loss=1.0, learning_rate=1e-4, tokens=9, tokens_per_second=1.0, eta_s=5.0, memory_bytes=1),
        CheckpointSaved(step=4),
        JobInterrupted(reason="stopped"),
    ):
        store.append(STOPPED, event)
    write(paths.job(STOPPED).checkpoint / "state.safetensors", 9000)

    export = paths.exports("web") / DONE / "gguf-lora"
    write(export / "adapter.gguf", 4000)
    write(export / "export.json", 10)
    write(paths.logs / "runner.log", 500)
    return paths


@pytest.fixture
def usage(paths: DataPaths) -> Usage:
    """List, or free the named items, as another server would."""

    def call(*names: str, require_unused: Callable[[Path], None] = lambda _: None) -> DiskUsage:
        return StorageService(Settings(data_dir=paths.root), Registry(paths)).usage(names, require_unused)

    return call


@pytest.fixture(autouse=True)
def release() -> Iterator[None]:
    yield
    in_use.keep_only(())
