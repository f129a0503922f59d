"""Whether people use a model at this moment: processes that answer requests say so in a file of the data directory.

A process holds a shared lock on the file while it answers, and sets its modification time afterwards. The kernel releases the
lock of a killed process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from peft_core.errors import StorageError
from peft_core.system.lock import FileLock

_TIMEOUT_S = 1.0  # a process that only looks holds the lock for microseconds


@contextmanager
def active(path: Path | None) -> Iterator[None]:
    """Record that this process answers a request while the block runs. Nothing is recorded where nothing can be locked."""
    if path is None:
        yield
        return
    lock = FileLock(path, shared=True)
    with suppress(StorageError):
        lock.acquire(_TIMEOUT_S)
    with lock:
        try:
            yield
        finally:
            with suppress(OSError):
                os.utime(path)


def idle_seconds(path: Path, now: float) -> float | None:
    """Return for how long no process has answered a request; 0 while one does, None if none ever did.

    `now`: seconds since the epoch.
    """
    try:
        changed_at = path.stat().st_mtime
        with FileLock(path) as lock:
            return max(0.0, now - changed_at) if lock.acquire() else 0.0
    except (OSError, StorageError):
        return None
