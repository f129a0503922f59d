"""The state of a run on disk: the checkpoint that it resumes from, and the states that it can roll back to.

One file holds the adapter's weights and Adam's two moments, so it is three times as large as the adapter; with early stopping
it also holds the best weights. Every file is replaced atomically. Loading one never executes code from it.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import structlog
import torch

from peft_core.errors import TrainingError
from peft_core.schemas.dataset import DatasetSummary
from peft_core.schemas.events import EVENT, Event, MemorySaved, RateLowered
from peft_core.schemas.task import TrainingTask
from peft_core.system.files import atomic_writer

_log = structlog.get_logger(__name__)

_CHECKPOINT = "state.pt"
_TEMPORARY = ".state.pt.tmp"  # shared by all states, so the next write overwrites what a killed process left
_FORMAT = 1
# What torch and pickle raise for damaged files. With `weights_only`, forbidden content raises UnpicklingError.
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
    """How far a run has come. The position in the data follows from `step`."""

    base_loss: float  # of the base model on the whole held-out set
    step: int = 0  # completed optimiser steps
    tokens: int = 0  # processed by all processes together
    seconds: float = 0.0  # spent in steps, without evaluations
    measured_at: int = 0  # step of the latest evaluation during training
    best_loss: float = float("inf")
    best_step: int = 0
    misses: int = 0  # evaluations since the best one
    stopped_early: bool = False


class StateId(NamedTuple):
    """Identifies a state of a run. The step alone does not: after a rollback the run reaches it again, at a lower rate."""

    step: int  # completed optimiser steps
    rollbacks: int  # before this state

    @property
    def file(self) -> str:
        return f"good-{self.step}-{self.rollbacks}.pt"


START = StateId(0, 0)


@dataclass(frozen=True)
class RollbackState:
    """What a run needs to know to recover from divergence; part of every checkpoint."""

    target: StateId = START  # the last state that was verified to be good
    history: tuple[RateLowered, ...] = ()

    @property
    def rate_factor(self) -> float:
        """Current learning rate as a share of the configured one."""
        return self.history[-1].factor if self.history else 1.0

    @property
    def next_target(self) -> StateId:
        """Where to roll back to now.

        If the previous rollback went to the same target, the run has diverged from there twice, at two learning rates: the
        target was bad already, and only the start is left.
        """
        repeated = self.history and self.history[-1].back_to_step == self.target.step
        return START if repeated else self.target


@dataclass(frozen=True)
class Checkpoint:
    progress: Progress
    adapter: Tensors  # trainable weights by name
    best: Tensors | None  # trainable weights at the best evaluation, if early stopping is on
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]  # its rates, and the optimiser's, are the lowered ones after a rollback
    rng: Tensors  # generator states by device type, at the start of the next step
    rollback: RollbackState = RollbackState()
    memory_saved: tuple[MemorySaved, ...] = ()
    recent: tuple[Event, ...] = ()  # emitted last; a resumed run emits them again, in case the runner missed them

    @property
    def id(self) -> StateId:
        return StateId(self.progress.step, len(self.rollback.history))


def run_key(task: TrainingTask, dataset: DatasetSummary) -> str:
    """Identify a run by its settings, base model, data and parent: a checkpoint with another key is not resumed."""
    request = task.request
    config = request.config.model_dump_json(exclude={"device", "base_model", "continue_from"})
    parent = () if request.continued is None else (request.continued.weights_sha256,)
    parts = (config, request.base.fingerprint, dataset.sha256, *parent)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def scores_key(run: str, device: str, weights_dtype: str, earlier_trainings: int) -> str:
    """Identify the scores of base model and parent.

    Those of another device or number format differ by its rounding, and those on retrieved code by the trainings whose
    examples are searched, which may be deleted before the run is resumed.
    """
    return f"{run} on {device} in {weights_dtype} with {earlier_trainings} earlier trainings"


def save_checkpoint(directory: Path, key: str, checkpoint: Checkpoint, file: str = _CHECKPOINT) -> None:
    """Replace the file atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    document = {"format": _FORMAT, "key": key, **_to_document(checkpoint)}
    with atomic_writer(directory / file, temporary=directory / _TEMPORARY) as out:
        torch.save(document, out)
        # kill-point: worker: the start state is written but not in its place
        # kill-point: worker: a checkpoint is written but not in its place (pass 2)


def load_checkpoint(directory: Path, key: str, file: str = _CHECKPOINT) -> Checkpoint | None:
    """Return the checkpoint, or None if it is missing, unreadable, or belongs to a run with another key."""
    path = directory / file
    if not path.is_file():
        return None
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
        if document["format"] != _FORMAT or document["key"] != key:
            _log.warning("checkpoint_ignored", reason="it belongs to a run with other settings, base model or data")
            return None
        return _from_document(document)
    except _UNREADABLE as error:
        _log.warning("checkpoint_ignored", reason=f"it cannot be read: {error}")
        return None


class RollbackStates:
    """The states on disk that a run can roll back to: its start, and the last state that was verified to be good.

    They are files next to the checkpoint, because they are rarely read and would each take three times the adapter's memory.
    The checkpoint names one of them. A newer state does not replace that one until the next checkpoint is written: a killed
    run resumes from the checkpoint, and may then have to roll back to the state that it names.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self._directory, self._key = directory, key
        self._checkpointed = START

    def save(self, state: Checkpoint) -> None:
        """Write the state; delete all others but the start and the one that the checkpoint on disk names."""
        save_checkpoint(self._directory, self._key, state, state.id.file)
        self._delete_all_but({START, self._checkpointed, state.id})

    def set_checkpointed(self, state_id: StateId) -> None:
        """Record that the checkpoint on disk now names this state; delete all others but the start."""
        self._checkpointed = state_id
        self._delete_all_but({START, state_id})

    def load(self, state_id: StateId) -> Checkpoint:
        """Return this state, or the start if its file cannot be read.

        Raises:
            TrainingError: neither can be read.
        """
        for candidate in (state_id, START):
            state = load_checkpoint(self._directory, self._key, candidate.file)
            if state is not None:
                return state
        raise TrainingError(
            "The run diverged and cannot be rolled back: no earlier state is readable "
            f"({self._directory / START.file} is missing or damaged).",
            suggestions=["Start the training again with a lower learning_rate."],
        )

    def _delete_all_but(self, kept: Collection[StateId]) -> None:
        names = {state_id.file for state_id in kept}
        for path in self._directory.glob("good-*.pt"):
            if path.name not in names:
                path.unlink(missing_ok=True)


def _to_document(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "progress": asdict(checkpoint.progress),
        "adapter": {name: tensor.detach() for name, tensor in checkpoint.adapter.items()},
        "best": checkpoint.best and dict(checkpoint.best),
        "optimizer": checkpoint.optimizer,
        "scheduler": checkpoint.scheduler,
        "rng": dict(checkpoint.rng),
        "memory_saved": [event.model_dump() for event in checkpoint.memory_saved],
        "lowered": [event.model_dump() for event in checkpoint.rollback.history],
        "recent": [event.model_dump(mode="json") for event in checkpoint.recent],
        "good_state": tuple(checkpoint.rollback.target),
    }


def _from_document(document: Mapping[str, Any]) -> Checkpoint:
    return Checkpoint(
        progress=Progress(**document["progress"]),
        adapter=document["adapter"],
        best=document["best"],
        optimizer=document["optimizer"],
        scheduler=document["scheduler"],
        rng=document["rng"],
        rollback=RollbackState(
            target=StateId(*document["good_state"]),
            history=tuple(RateLowered.model_validate(event) for event in document["lowered"]),
        ),
        memory_saved=tuple(MemorySaved.model_validate(event) for event in document["memory_saved"]),
        recent=tuple(EVENT.validate_python(event) for event in document["recent"]),
    )
