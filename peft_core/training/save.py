"""Write the finished adapter in PEFT's file format, with a manifest and a model card. The registry publishes these files."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import platform, python_version

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from peft_core.adapters.card import render_card
from peft_core.adapters.manifest import (
    CARD_NAME,
    WEIGHTS,
    BaseRecord,
    DataRecord,
    Manifest,
    RunRecord,
    sha256_of,
    write_manifest,
)
from peft_core.base_models.fingerprint import content_hash
from peft_core.data.leakage import FINGERPRINT_FILE_NAME
from peft_core.data.snapshot import SNAPSHOT_FILE_NAME
from peft_core.schemas.base_model import Base
from peft_core.schemas.evaluation import Evaluation
from peft_core.schemas.results import Metrics
from peft_core.schemas.task import TrainingTask
from peft_core.training.lora import lora_config, target_modules

_PACKAGES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "peft-mcp")


def write_adapter(
    directory: Path,
    model: PeftModel,
    task: TrainingTask,
    *,
    data: DataRecord,
    run: RunRecord,
    evaluation: Evaluation,
    dataset: Path,
    created_at: datetime,
    measure: Callable[[int], Metrics],
) -> Metrics:
    """Write weights, configuration, model card and, last, the manifest. Existing content of the directory is removed.

    No file contains a path of this machine.

    Args:
        directory: The adapter's directory.
        model: The trained model.
        task: The task, for its ids and base model.
        data: What the adapter was trained on.
        run: How it was trained.
        evaluation: Its comparison with the base model, of which only the figures are written.
        dataset: The directory of the prepared dataset, from which trained_on.bin and snapshot.json.gz are copied.
        created_at: With a time zone.
        measure: Called once, with the size of the weights file in bytes. Its result is recorded and returned.
    """
    # kill-point: worker: the adapter is about to be written
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    tensors = {
        name: tensor.contiguous()
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    # kill-point: worker: the weights are written, without a configuration
    _write_config(directory, model, task.request.base.name)

    metrics = measure((directory / WEIGHTS).stat().st_size)
    manifest = Manifest(
        adapter_id=task.job_id,
        project_id=task.project_id,
        created_at=created_at.isoformat(timespec="seconds"),
        base=_base_record(task.request.base),
        data=data,
        run=run,
        metrics=metrics,
        evaluation=evaluation.without_texts,
        environment=_environment(),
        files={},
    )
    shutil.copyfile(dataset / FINGERPRINT_FILE_NAME, directory / FINGERPRINT_FILE_NAME)
    with suppress(FileNotFoundError):  # the dataset was prepared by a version that wrote none
        shutil.copyfile(dataset / SNAPSHOT_FILE_NAME, directory / SNAPSHOT_FILE_NAME)
    (directory / CARD_NAME).write_text(render_card(manifest), encoding="utf-8")
    files = {path.name: sha256_of(path) for path in sorted(directory.iterdir())}
    # kill-point: worker: everything but the manifest is written
    write_manifest(directory, manifest.model_copy(update={"files": files}))
    # kill-point: worker: the adapter is complete but not reported
    return metrics


def _base_record(base: Base) -> BaseRecord:
    """Describe the base model, with a hash over all its weights: only a training has the time to compute that."""
    fingerprint = base.fingerprint.model_copy(update={"content": content_hash(base.path)})
    record = BaseRecord.model_validate(base.model_dump(include=set(BaseRecord.model_fields)))
    return record.model_copy(update={"fingerprint": fingerprint})


def _write_config(directory: Path, model: PeftModel, base_name: str) -> None:
    """Write adapter_config.json. PEFT itself would write targets in random order and the base model as a local path."""
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
        except PackageNotFoundError:  # the package runs from a source tree
            versions[package] = "not installed"
    return versions
