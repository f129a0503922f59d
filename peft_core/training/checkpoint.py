"""All that a run needs to go on exactly where it was, in one file that is replaced atomically; and states to go back to.

Each is three times the adapter (weights and Adam's moments); four where early stopping keeps the best weights.
"""

from __future__ import annotations

import hashlib
import pickle
import struct
from collections.abc import Mapping
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

_LATEST = "state.pt"
_TEMPORARY = ".state.pt.tmp"  # one name for all states: the next write overwrites what a killed process left
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


class StateId(NamedTuple):
    """A state that a run passes through. The same step comes again when it goes back, with another rate."""

    step: int  # completed ones
    times_lowered: int  # the rate

    @property
    def file(self) -> str:
        return f"good-{self.step}-{self.times_lowered}.pt"


START = StateId(0, 0)


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
    good: StateId = START  # where the run goes back to if it diverges


def run_key(task: TrainingTask, dataset: DatasetSummary) -> str:
    """Identity of a run: a checkpoint made with other settings, another base or other data is not continued."""
    request = task.request
    parts = (request.config.model_dump_json(exclude={"device", "base_model"}), request.base.fingerprint, dataset.sha256)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def save_checkpoint(directory: Path, key: str, checkpoint: Checkpoint, file: str = _LATEST) -> None:
    """Write beside the previous one, then take its place: a reader finds the old or the new, never a part."""
    directory.mkdir(parents=True, exist_ok=True)
    document = {"format": _FORMAT, "key": key, **_to_document(checkpoint)}
    with atomic_writer(directory / file, temporary=directory / _TEMPORARY) as out:
        torch.save(document, out)


def load_checkpoint(directory: Path, key: str, file: str = _LATEST) -> Checkpoint | None:
    """The checkpoint of this very run, or None: absent, unreadable, or of another run. Runs no code of the file."""
    path = directory / file
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


class RollbackStates:
    """Where a run can go back to: its start, and the last state that was seen to be good.

    In files beside the checkpoint, which names one of them: they are seldom read, and would take three times the adapter's
    memory each.
    """

    def __init__(self, directory: Path, key: str) -> None:
        self._directory, self._key = directory, key
        self._named = START  # by the checkpoint on disk

    def keep(self, state: Checkpoint) -> None:
        """Besides the start and the one that the checkpoint on disk names."""
        save_checkpoint(self._directory, self._key, state, mark_of(state).file)
        self._forget_all_but(mark_of(state))

    def set_checkpointed(self, mark: StateId) -> None:
        """The checkpoint on disk names this one from now on."""
        self._named = mark
        self._forget_all_but(mark)

    def has(self, mark: StateId) -> bool:
        return (self._directory / mark.file).is_file()

    def at(self, mark: StateId) -> Checkpoint:
        """The state of that mark; the start, where it cannot be read.

        Raises:
            TrainingError: nor can that.
        """
        for there in (mark, START):
            state = load_checkpoint(self._directory, self._key, there.file)
            if state is not None:
                return state
        raise TrainingError(
            f"The run diverged, and no state to go back to can be read: {self._directory / START.file} is missing or damaged.",
            suggestions=["Start the training anew, with a lower learning_rate."],
        )

    def _forget_all_but(self, mark: StateId) -> None:
        kept = {START.file, self._named.file, mark.file}
        for path in self._directory.glob("good-*.pt"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def mark_of(state: Checkpoint) -> StateId:
    return StateId(state.progress.step, len(state.lowered))


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
        "good_state": tuple(checkpoint.good),
    }


def _from_document(document: Mapping[str, Any]) -> Checkpoint:
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
        good=StateId(*document.get("good_state", START)),  # older files name none
    )
