"""All that a run needs to go on exactly where it was: one file, replaced atomically.

Three times the adapter (weights and Adam's moments); with a good state to go back to and the best one, seven.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import struct
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import structlog
import torch

from peft_core.events import EVENT, Event, MemorySaved, RateLowered
from peft_core.spec import DatasetSummary
from peft_core.task import TrainingTask

_log = structlog.get_logger(__name__)

_FILE = "state.pt"
_FORMAT = 1
# What torch and pickle raise on damaged files; `weights_only` reports forbidden content as UnpicklingError.
_UNREADABLE = (
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    struct.error,
    pickle.UnpicklingError,
)

Tensors = Mapping[str, torch.Tensor]


@dataclass
class Progress:
    """How far a run has come. The data position follows from `step`."""

    base_loss: float  # of the base itself on all held-out examples
    step: int = 0  # completed
    tokens: int = 0  # processed, of all processes together
    seconds: float = 0.0  # in the steps, evaluations not counted
    measured_at: int = 0  # step of the latest measurement during training
    best_loss: float = float("inf")
    best_step: int = 0
    misses: int = 0  # measurements since the best
    stopped_early: bool = False


@dataclass(frozen=True)
class Checkpoint:
    progress: Progress
    adapter: Tensors  # trainable weights by name
    best: Tensors | None  # the same at the best measurement, where early stopping wants it
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    rng: Tensors  # by device type, as of the start of the next step
    lowered: tuple[RateLowered, ...] = ()  # the rates of optimizer and scheduler are the lowered ones
    memory_saved: tuple[MemorySaved, ...] = ()
    recent: tuple[Event, ...] = ()  # what was told last, for a run that goes on: it may have reached nobody
    good: Checkpoint | None = None  # where the run goes back to if it diverges; None in files of older versions

    def copy(self) -> Checkpoint:
        """What the next steps do not change. `best` is shared: it is replaced, never written to."""
        return replace(
            self,
            progress=replace(self.progress),
            adapter={name: tensor.detach().clone() for name, tensor in self.adapter.items()},
            optimizer=deepcopy(self.optimizer),
            scheduler=deepcopy(self.scheduler),
        )


def run_key(task: TrainingTask, dataset: DatasetSummary) -> str:
    """Identity of a run: a checkpoint made with other settings, another base or other data is not continued."""
    parts = (task.config.model_dump_json(exclude={"device", "base_model"}), task.base.fingerprint, dataset.sha256)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def save_checkpoint(directory: Path, key: str, checkpoint: Checkpoint) -> None:
    """Write beside the previous one, then take its place: a reader finds the old or the new, never a part."""
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{_FILE}.tmp"
    document = {"format": _FORMAT, "key": key, **_to_document(checkpoint)}
    with temporary.open("wb") as file:
        torch.save(document, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / _FILE)


def load_checkpoint(directory: Path, key: str) -> Checkpoint | None:
    """The checkpoint of this very run, or None: absent, unreadable, or of another run. Runs no code of the file."""
    path = directory / _FILE
    if not path.is_file():
        return None
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
        if document["format"] != _FORMAT or document["key"] != key:
            _log.warning("checkpoint_ignored", reason="it belongs to a run with other settings, base or data")
            return None
        return _from_document(document)
    except _UNREADABLE as error:
        _log.warning("checkpoint_ignored", reason=f"it cannot be read: {error}")
        return None


def _to_document(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "progress": asdict(checkpoint.progress),
        "adapter": {name: tensor.detach() for name, tensor in checkpoint.adapter.items()},
        "best": checkpoint.best and dict(checkpoint.best),
        "optimizer": checkpoint.optimizer,
        "scheduler": checkpoint.scheduler,
        "rng": dict(checkpoint.rng),
        "memory_saved": [event.model_dump() for event in checkpoint.memory_saved],
        "lowered": [event.model_dump() for event in checkpoint.lowered],
        "recent": [event.model_dump(mode="json") for event in checkpoint.recent],
        "good": checkpoint.good and _to_document(checkpoint.good),
    }


def _from_document(document: Mapping[str, Any]) -> Checkpoint:
    good = document.get("good")
    return Checkpoint(
        progress=Progress(**document["progress"]),
        adapter=document["adapter"],
        best=document["best"],
        optimizer=document["optimizer"],
        scheduler=document["scheduler"],
        rng=document["rng"],
        memory_saved=tuple(MemorySaved.model_validate(event) for event in document.get("memory_saved", ())),
        lowered=tuple(RateLowered.model_validate(event) for event in document.get("lowered", ())),
        recent=tuple(EVENT.validate_python(event) for event in document.get("recent", ())),
        good=good and _from_document(good),
    )
