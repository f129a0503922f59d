"""Find what is kept below the data directory, as items that can be named. Symbolic links are not followed."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote_from_bytes

from peft_core.errors import StorageError
from peft_core.paths import DataPaths
from peft_core.schemas.storage import ItemKind
from peft_core.storage.deletion import Inode, measure
from peft_core.system.cleanup import FREED
from peft_core.system.lock import FileLock

ABANDONED_S = 3_600.0  # no process writes a file for so long without changing it
_PROBE_S = 0.2  # another process may be testing the same lock


@dataclass(frozen=True)
class Item:
    """Something that is kept. `names` are its own names on disk, such as project and adapter; `name` is for people."""

    kind: ItemKind
    name: str
    names: tuple[str, ...]
    paths: tuple[Path, ...]
    bytes: int
    complete: bool
    changed_at: float

    @property
    def path(self) -> Path:
        return self.paths[0]


def find_items(paths: DataPaths) -> list[Item]:
    """Return all items with their sizes; the last one is what belongs to no other. A file with several names counts once."""
    counted: set[Inode] = set()
    found = [_measured(kind, names, files, counted) for kind, names, files in _find(paths)]
    known = [path for item in found for path in item.paths]
    rest = measure(paths.root, counted, without=known)
    return [*found, Item("other", "other", (), (paths.root,), rest.bytes, rest.complete, rest.changed_at)]


def is_locked(lock: Path) -> bool:
    """Return whether another process holds this lock at the moment, or may hold it."""
    if not lock.is_file():
        return False
    with FileLock(lock) as probe:
        try:
            return not probe.acquire(_PROBE_S)
        except StorageError:  # a directory that can only be read
            return True


def conversion_lock(paths: DataPaths) -> Path:
    return paths.base_models / ".lock"


def _measured(kind: ItemKind, names: tuple[str, ...], files: list[Path], counted: set[Inode]) -> Item:
    sizes = [measure(path, counted) for path in files]
    prefix = {"converted_base": "base_models", "adapter": "adapters", "job": "jobs", "export": "exports"}.get(
        kind, kind
    )
    return Item(
        kind,
        "/".join([prefix, *map(_printable, names)]),
        names,
        tuple(files),
        sum(size.bytes for size in sizes),
        all(size.complete for size in sizes),
        max((size.changed_at for size in sizes), default=0.0),
    )


def _printable(name: str) -> str:
    """Return a file name without characters that cannot be shown, which are written as %XX; different names stay different."""
    shown = (c if c.isprintable() and c != "%" else quote_from_bytes(os.fsencode(c), safe="") for c in name)
    return "".join(shown)


def _find(paths: DataPaths) -> Iterator[tuple[ItemKind, tuple[str, ...], list[Path]]]:
    for path in _visible(paths.base_models, files=True):
        yield "converted_base", (path.name,), [path]
    for path in _visible(paths.root / "jobs"):
        yield "job", (path.name,), [path]
    for project in _visible(paths.root / "projects"):
        for path in _visible(project / "lora"):
            yield "adapter", (project.name, path.name), [path]
        for adapter in _visible(project / "exports"):
            for path in _visible(adapter):
                yield "export", (project.name, adapter.name, path.name), [path]
    if logs := [path for path in _children(paths.logs) if path.is_file() and not path.is_symlink()]:
        yield "logs", (), logs
    if leftovers := list(_leftovers(paths)):
        yield "leftovers", (), leftovers
    database = [Path(f"{paths.database}{suffix}") for suffix in ("", "-wal", "-shm")]
    if files := [path for path in database if path.is_file() and not path.is_symlink()]:
        yield "database", (), files


def _leftovers(paths: DataPaths) -> Iterator[Path]:
    """Yield what killed processes left behind, and nothing that a living one may still use."""
    converting, exporting = is_locked(conversion_lock(paths)), is_locked(paths.exports_lock)
    for path in _children(paths.base_models):
        if fnmatch(path.name, ".converting-*"):
            if not converting:
                yield path
        elif path.name.startswith(FREED) or (fnmatch(path.name, ".*.gguf.*") and _is_abandoned(path)):
            yield path
    yield from (path for path in _children(paths.root / "jobs") if path.name.startswith(FREED))
    yield from (path for path in _children(paths.inspections) if _is_abandoned(path))
    yield from (path for path in _children(paths.root) if fnmatch(path.name, ".peft.db.*") and _is_abandoned(path))
    for project in _visible(paths.root / "projects"):
        for path in _children(project / "lora"):
            if path.name.startswith(".deleted.") or (path.name.startswith(".current.") and _is_abandoned(path)):
                yield path
        for adapter in _visible(project / "exports"):
            for path in _children(adapter):
                if path.name.startswith(FREED) or (not exporting and _is_unfinished_export(path)):
                    yield path


def _is_unfinished_export(path: Path) -> bool:
    """Return whether nothing needs a hidden directory any more once no export runs."""
    if fnmatch(path.name, ".*.replaced"):  # the earlier export, which returns if the later one was not completed
        return path.with_name(path.name[1 : -len(".replaced")]).is_dir()
    return fnmatch(path.name, ".*.exporting-*")


def _is_abandoned(path: Path) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > ABANDONED_S
    except OSError:
        return False


def _visible(directory: Path, *, files: bool = False) -> list[Path]:
    """Return the subdirectories, and with `files` the files, that are neither hidden nor symbolic links."""
    return [
        path
        for path in _children(directory)
        if not path.name.startswith(".") and not path.is_symlink() and (path.is_dir() or (files and path.is_file()))
    ]


def _children(directory: Path) -> list[Path]:
    """Return the content of a directory in order; nothing if it is a symbolic link or cannot be read."""
    try:
        return [] if directory.is_symlink() else sorted(directory.iterdir())
    except OSError:
        return []
