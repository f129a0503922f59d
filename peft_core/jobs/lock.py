"""The lock that says "somebody is working on this queue".

The operating system's `flock`, used directly and not through a library, because the descriptor is handed down: the
training child inherits it, so the lock stays held until the runner *and* its child are gone. It is given up by closing,
never by unlocking, and the kernel closes for processes that were killed.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

POLL_S = 0.05


class WorkLock:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self, timeout_s: float = 0.0) -> bool:
        """Take the lock; False when another process still holds it after `timeout_s` seconds."""
        deadline = time.monotonic() + timeout_s
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    return False
                time.sleep(POLL_S)
            else:
                self._descriptor = descriptor
                return True

    @property
    def descriptor(self) -> int:
        """To pass to a child that shares the lock."""
        if self._descriptor is None:
            raise RuntimeError("the lock is not held")
        return self._descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
