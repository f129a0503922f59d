"""The finished adapter as files, in PEFT's own format: what the registry publishes."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import platform, python_version

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from peft_core.adapters.card import render_card
from peft_core.adapters.manifest import (
    CARD_NAME,
    BaseRecord,
    Computation,
    DataRecord,
    Manifest,
    RunRecord,
    sha256_of,
    write_manifest,
)
from peft_core.base_models.fingerprint import content_hash
from peft_core.data.leakage import FINGERPRINT_FILE_NAME
from peft_core.schemas.base_model import Base
from peft_core.schemas.evaluation import Evaluation
from peft_core.schemas.events import MemorySaved, RateLowered
from peft_core.schemas.results import Metrics
from peft_core.schemas.task import TrainingTask
from peft_core.training.lora import lora_config, target_modules

_WEIGHTS = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "peft-mcp")


@dataclass(frozen=True)
class RunFacts:
    """What the manifest tells beyond the task."""

    data: DataRecord
    device: str
    weights_dtype: str  # "float32", "bfloat16"
    computation: Computation
    steps: int
    stopped_early_at: int | None
    best_step: int | None
    rate_lowered: tuple[RateLowered, ...]
    memory_saved: tuple[MemorySaved, ...]
    created_at: datetime  # with a time zone
    evaluation: Evaluation
    trained_on: bytes  # of `data.overlap`


def write_adapter(
    directory: Path,
    model: PeftModel,
    task: TrainingTask,
    facts: RunFacts,
    metrics: Callable[[int], Metrics],
) -> Metrics:
    """Write weights, configuration, card and, last, the manifest. What lay there before is removed.

    `metrics` is asked once, with the size of the weights file in bytes, when the weights are on disk; its answer is
    recorded and returned. No file names a path of this machine.
    """
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tensors = {
        name: tensor.contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(tensors, directory / _WEIGHTS, metadata={"format": "pt"})
    _write_config(directory, model, task.request.base.name)

    measured = metrics((directory / _WEIGHTS).stat().st_size)
    manifest = Manifest(
        adapter_id=task.job_id,
        project_id=task.project_id,
        created_at=facts.created_at.isoformat(timespec="seconds"),
        base=_base_record(task.request.base),
        data=facts.data,
        run=RunRecord(
            config=task.request.config.model_copy(update={"base_model": None}),
            target_modules=target_modules(model),
            device=facts.device,
            weights_dtype=facts.weights_dtype,
            computation=facts.computation,
            steps=facts.steps,
            stopped_early_at=facts.stopped_early_at,
            best_step=facts.best_step,
            rate_lowered=facts.rate_lowered,
            memory_saved=facts.memory_saved,
        ),
        metrics=measured,
        evaluation=facts.evaluation.in_figures,
        environment=_environment(),
        files={},
    )
    (directory / FINGERPRINT_FILE_NAME).write_bytes(facts.trained_on)
    (directory / CARD_NAME).write_text(render_card(manifest), encoding="utf-8")
    files = {path.name: sha256_of(path) for path in sorted(directory.iterdir())}
    write_manifest(directory, manifest.model_copy(update={"files": files}))
    return measured


def _base_record(base: Base) -> BaseRecord:
    """The base with the hash of all its weights, which only a training has the time to compute."""
    known = base.fingerprint.model_copy(update={"content": content_hash(base.path)})
    record = BaseRecord.model_validate(base.model_dump(include=set(BaseRecord.model_fields)))
    return record.model_copy(update={"fingerprint": known})


def _write_config(directory: Path, model: PeftModel, base_name: str) -> None:
    """PEFT's own file, with targets in a fixed order (PEFT's are a set) and the base by name (PEFT's is a path)."""
    config = lora_config(model)
    config.base_model_name_or_path = base_name
    config.target_modules = list(target_modules(model))
    config.inference_mode = True
    config.save_pretrained(str(directory))


def _environment() -> dict[str, str]:
    versions = {"python": python_version(), "platform": platform()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # run from a source tree
            versions[package] = "not installed"
    return versions
