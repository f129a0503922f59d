"""What a process reads in the data directory is not deleted by another one meanwhile.

`NAME` is in use while a process holds a shared lock on the file `.NAME.in_use` beside it. A process that deletes `NAME` takes
the exclusive lock first, and only its holder may delete the lock file. The kernel releases the locks of killed processes.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from peft_core.errors import StorageError
from peft_core.system.lock import FileLock

SUFFIX = ".in_use"
_TIMEOUT_S = 10.0  # the exclusive lock is normally held for milliseconds
_FULL = (errno.ENOSPC, errno.EDQUOT)

_held: dict[Path, FileLock] = {}  # by this process


def hold(path: Path) -> None:
    """Keep other processes from deleting `path`, which need not exist yet, until `keep_only` or the end of this process.

    Where nothing can be locked nothing is: a file that is deleted while it is mapped stays readable.
    """
    if path in _held:
        return
    lock = FileLock(_lock_path(path), shared=True)
    try:
        while (
            acquired := lock.acquire(_TIMEOUT_S)
        ) and not lock.is_current:  # it was deleted while this process waited
            lock.release()
    except StorageError:
        return
    if acquired:
        _held[path] = lock


def keep_only(paths: Collection[Path]) -> None:
    """Release all that this process holds, except `paths`."""
    for path in _held.keys() - set(paths):
        _held.pop(path).release()


def is_in_use(path: Path) -> bool:
    """Return whether a process holds `path` at this moment, or may hold it."""
    if not _lock_path(path).is_file():
        return False
    try:
        with unused(path) as is_unused:
            return not is_unused
    except StorageError:  # a directory that can only be read
        return True


@contextmanager
def unused(path: Path, timeout_s: float = 0.2) -> Iterator[bool]:
    """Yield whether no process holds `path` within `timeout_s` seconds; then none begins to while the block runs.

    Raises:
        StorageError: The directory is not writable, or its file system does not support locks.
    """
    lock = FileLock(_lock_path(path))
    try:
        while (acquired := lock.acquire(timeout_s)) and not lock.is_current:
            lock.release()
    except StorageError as error:
        if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL):
            raise
        yield True  # on a full disk there is no lock file, so no process holds it
        return
    with lock:
        yield acquired
        if acquired:
            _lock_path(path).unlink(missing_ok=True)


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}{SUFFIX}")
