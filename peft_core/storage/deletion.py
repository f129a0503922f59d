"""Measure and delete directories of the data directory. Symbolic links are neither followed nor counted.

What is deleted is first renamed to a hidden name, which is atomic; then its files are deleted. What a killed process leaves
under such a name, any later call deletes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from peft_core.system.cleanup import FREED

Inode = tuple[int, int]  # device, number


@dataclass(frozen=True)
class Measured:
    bytes: int
    complete: bool  # False: some directories could not be read
    changed_at: float  # the newest change of a file or directory; seconds since the epoch


def measure(path: Path, counted: set[Inode], *, without: Collection[Path] = ()) -> Measured:
    """Return the size of the regular files at and below `path`, except those below `without`.

    Files whose inode is in `counted` are left out, and the others are added to it: a file with several names counts once.
    """
    size, complete, changed_at = 0, True, 0.0
    for status in _walk(path, frozenset(map(str, without))):
        if status is None:
            complete = False
            continue
        changed_at = max(changed_at, status.st_mtime)
        inode = (status.st_dev, status.st_ino)
        if stat.S_ISREG(status.st_mode) and inode not in counted:
            counted.add(inode)
            size += status.st_size
    return Measured(size, complete, changed_at)


def set_aside(path: Path) -> Path:
    """Rename `path` to a hidden name beside it, which makes it disappear atomically; return the new path.

    Raises:
        OSError: It does not exist any more, or its directory is not writable.
    """
    hidden = path.with_name(f"{FREED}{secrets.token_hex(8)}")
    path.rename(hidden)
    return hidden


def delete(path: Path) -> int:
    """Delete a file or directory and return the bytes that this freed; files that also have names elsewhere free none.

    What cannot be deleted stays. Several processes may delete the same directory.
    """
    before = _bytes_freed_with(path)
    shutil.rmtree(path, ignore_errors=True)  # does nothing to a file or to a symbolic link
    if not path.is_dir() or path.is_symlink():
        with suppress(OSError):
            path.unlink()
    return before - _bytes_freed_with(path)


def _bytes_freed_with(path: Path) -> int:
    names: dict[Inode, int] = {}
    size = 0
    for status in _walk(path, frozenset()):
        if status is not None and stat.S_ISREG(status.st_mode):
            inode = (status.st_dev, status.st_ino)
            names[inode] = names.get(inode, 0) + 1
            if names[inode] == status.st_nlink:
                size += status.st_size
    return size


def _walk(path: Path, without: frozenset[str]) -> Iterator[os.stat_result | None]:
    """Yield the status of each file and directory, a link's own included; None for one that cannot be read."""
    pending = [str(path)]
    while pending:
        directory = pending.pop()
        if directory in without:
            continue
        try:
            status = os.lstat(directory)
        except FileNotFoundError:  # deleted a moment ago
            continue
        except OSError:
            yield None
            continue
        yield status
        if not stat.S_ISDIR(status.st_mode):
            continue
        try:
            with os.scandir(directory) as entries:
                pending += [entry.path for entry in entries]
        except FileNotFoundError:
            continue
        except OSError:
            yield None
