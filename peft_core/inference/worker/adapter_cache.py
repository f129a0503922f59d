"""What is in memory: one base, some adapters on it, and which of them answers."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from peft_core.adapters.manifest import CONFIG, MANIFEST_NAME, WEIGHTS
from peft_core.errors import AdapterNotLoaded
from peft_core.modeling.adapter_model import ResidentModel, release_memory
from peft_core.modeling.memory import memory_bytes
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import Compatibility, LoadCheck, MemoryState, ResidentAdapter

FileState = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class CacheEntry:
    """A resident adapter."""

    name: str  # in the model
    state: FileState  # of its files when they were read
    effect: LoadCheck
    compatibility: Compatibility


class AdapterCache:
    def __init__(self, most: int) -> None:
        self._most = most
        self.model: ResidentModel | None = None
        self.slots: OrderedDict[Path, CacheEntry] = OrderedDict()  # least recently used first
        self.active: Path | None = None
        self.base_answers = False  # after a load fell back: without being asked each time

    @property
    def summary(self) -> MemoryState:
        return MemoryState(
            base_model=self.model.base.name if self.model else None,
            base_path=str(self.model.base.path) if self.model else None,
            adapters=[ResidentAdapter(adapter_path=str(path), active=path == self.active) for path in self.slots],
            memory_bytes=memory_bytes(),
        )

    def is_on(self, base: Base) -> bool:
        """Whether the resident base is this one: another place may have another vocabulary beside the same weights."""
        there = None if self.model is None else self.model.base
        return (
            there is not None
            and there.fingerprint.same_weights(base.fingerprint)
            and os.path.realpath(there.path) == os.path.realpath(base.path)
        )

    def settle(self, model: ResidentModel) -> None:
        """Have this base in memory, and no other; what was on another goes with it."""
        if model is not self.model:
            self.forget()
            self.model = model
            release_memory()

    def put(self, path: Path, slot: CacheEntry) -> list[Path]:
        """Keep an adapter that was added to the model and make it the active one: what had to go for it."""
        if path in self.slots:  # its files have changed since
            self.take_off(path)
        self.slots[path] = slot
        self.activate(path)
        evicted = list(self.slots)[: max(0, len(self.slots) - self._most)]
        for other in evicted:
            self.take_off(other)
        return evicted

    def activate(self, path: Path) -> None:
        self.touch(path)
        self.active = path
        self.base_answers = False
        self.select_active()

    def touch(self, path: Path) -> None:
        """It was used now."""
        self.slots.move_to_end(path)

    def take_off(self, path: Path) -> None:
        slot = self.slots.pop(path)
        if path == self.active:
            self.active = None
        if self.model is not None:
            self.model.remove(slot.name)
        self.select_active()

    def select_active(self) -> None:
        """After something else was selected: back to what answers."""
        if self.model is not None:
            self.model.select(self.slots[self.active].name if self.active else None)

    def forget(self) -> None:
        """Let go of everything. The memory is back after `release_memory`."""
        self.model = None
        self.slots.clear()
        self.active = None
        self.base_answers = False

    def require(self, path: Path, verb: str = "load_adapter") -> CacheEntry:
        """The slot of an adapter.

        Raises:
            AdapterNotLoaded: it is not in memory; names what is.
        """
        if path not in self.slots:
            raise self.not_loaded(f"{path} is not in memory", path, verb=verb)
        return self.slots[path]

    def not_loaded(self, what: str, path: Path | None = None, verb: str = "load_adapter") -> AdapterNotLoaded:
        """The error of a request for what is not there. `verb`: the tool to call instead."""
        there = [str(resident) for resident in self.slots]
        if verb == "unload_adapter":
            advice = [f"Call unload_adapter(adapter_path={there[-1]!r})"] if there else []
        else:
            wanted = str(path) if path else there[-1] if there else "..."
            advice = [
                f"Call load_adapter(adapter_path={wanted!r}) first",
                "Or call generate with use_base=true to have the base answer without an adapter",
            ]
        return AdapterNotLoaded(
            f"{what}. In memory: {', '.join(there) or 'none'}.",
            suggestions=advice,
            details={"resident": there},
        )


def file_state(directory: Path) -> FileState:
    """What changes when the adapter's files do. Take it before they are read."""
    states = []
    for name in (CONFIG, WEIGHTS, MANIFEST_NAME):
        try:
            stat = (directory / name).lstat()
        except OSError:
            continue
        states.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(states)
