"""The models in memory: one base model, an LRU cache of adapters on it, and which of them is active."""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from peft_core.adapters.layout import MLX, PEFT
from peft_core.adapters.manifest import CONFIG, MANIFEST_NAME
from peft_core.errors import AdapterNotLoaded
from peft_core.inference.worker.models import LoadedModel
from peft_core.modeling.adapter_model import release_memory
from peft_core.modeling.memory import memory_bytes
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import Compatibility, LoadCheck, MemoryState, ResidentAdapter

FileState = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class CacheEntry:
    """A resident adapter."""

    name: str  # in the model
    state: FileState  # of its files before they were read
    effect: LoadCheck
    compatibility: Compatibility


class AdapterCache:
    def __init__(self, max_entries: int) -> None:
        self._max_entries = max_entries
        self.model: LoadedModel | None = None
        self.entries: OrderedDict[Path, CacheEntry] = OrderedDict()  # least recently used first
        self.active: Path | None = None
        self.base_answers = False  # after a failed load: requests that name no adapter go to the base model

    @property
    def summary(self) -> MemoryState:
        return MemoryState(
            base_model=self.model.base.name if self.model else None,
            base_path=str(self.model.base.path) if self.model else None,
            engine=self.model.engine if self.model else None,
            adapters=[ResidentAdapter(adapter_path=str(path), active=path == self.active) for path in self.entries],
            memory_bytes=memory_bytes(),
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """The directories of the adapters, and what the base model is read from."""
        return (*self.entries, *(self.model.files if self.model else ()))

    def is_on(self, base: Base) -> bool:
        """Return whether this base model is resident. The path counts too: a copy may have another vocabulary."""
        if self.model is None:
            return False
        resident = self.model.base
        same_path = os.path.realpath(resident.path) == os.path.realpath(base.path)
        return same_path and resident.fingerprint.same_weights(base.fingerprint)

    def set_model(self, model: LoadedModel) -> None:
        """Make this the only base model in memory; another one is dropped with its adapters."""
        if model is not self.model:
            self.clear()
            self.model = model
            release_memory()

    def add(self, path: Path, entry: CacheEntry) -> list[Path]:
        """Keep an adapter that is already in the model, activate it, and return the adapters evicted for it."""
        if path in self.entries:  # its files have changed since
            self.remove(path)
        self.entries[path] = entry
        self.activate(path)
        evicted = list(self.entries)[: max(0, len(self.entries) - self._max_entries)]
        for other in evicted:
            self.remove(other)
        return evicted

    def activate(self, path: Path) -> None:
        self.mark_used(path)
        self.active = path
        self.base_answers = False
        self.restore_selection()

    def mark_used(self, path: Path) -> None:
        self.entries.move_to_end(path)

    def remove(self, path: Path) -> None:
        # kill-point: inference worker, unload_adapter: the adapter is about to be removed
        entry = self.entries.pop(path)
        if path == self.active:
            self.active = None
        if self.model is not None:
            self.model.remove(entry.name)
            # kill-point: inference worker, unload_adapter: the adapter is removed, the base model is still loaded
        self.restore_selection()

    def restore_selection(self) -> None:
        """Select the active adapter in the model again, after another one was selected."""
        if self.model is not None:
            self.model.select(self.entries[self.active].name if self.active else None)

    def clear(self) -> None:
        """Drop the base model and all adapters. `release_memory` then returns their memory to the system."""
        self.model = None
        self.entries.clear()
        self.active = None
        self.base_answers = False

    def require(self, path: Path, tool: str = "load_adapter") -> CacheEntry:
        """Return the entry of an adapter.

        Raises:
            AdapterNotLoaded: it is not in memory; the message names the adapters that are.
        """
        if path not in self.entries:
            raise self.not_loaded(f"{path} is not in memory", path, tool=tool)
        return self.entries[path]

    def not_loaded(self, what: str, path: Path | None = None, tool: str = "load_adapter") -> AdapterNotLoaded:
        """Return the error for a request that needs an adapter which is not in memory. `tool`: the call to suggest."""
        resident = [str(entry) for entry in self.entries]
        if tool == "unload_adapter":
            advice = [f"Call unload_adapter(adapter_path={resident[-1]!r})"] if resident else []
        else:
            suggested = str(path) if path else resident[-1] if resident else None
            argument = repr(suggested) if suggested else "..."
            advice = [
                f"Call load_adapter(adapter_path={argument}) first",
                "Or call generate with use_base=true to use the base model without an adapter",
            ]
        return AdapterNotLoaded(
            f"{what}. In memory: {', '.join(resident) or 'none'}.", suggestions=advice, details={"resident": resident}
        )


def file_state(directory: Path) -> FileState:
    """Return a value that changes when the adapter's files do. Take it before reading them."""
    states = []
    for name in (CONFIG, PEFT.weights, MLX.weights, MANIFEST_NAME):
        try:
            stat = (directory / name).lstat()
        except OSError:
            continue
        states.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(states)
