"""A lock among processes: "somebody is working on this queue", "somebody is changing what this project has".

The operating system's `flock`, used directly and not through a library, because the descriptor is handed down: the
training child inherits the queue's, so the lock stays held until the runner *and* its child are gone. It is given up by
closing, never by unlocking, and the kernel closes for processes that were killed. A pid or a clock has no say in it, so
neither a pid that was given to another process nor a clock that jumps can make a dead runner look alive.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from peft_core.errors import StorageError, unwritable

POLL_S = 0.05
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class FileLock:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def acquire(self, timeout_s: float = 0.0) -> bool:
        """Take the lock; False when another process still holds it after `timeout_s` seconds.

        Raises:
            StorageError: the directory is gone, cannot be written, or is on a file system that knows no locks.
        """
        deadline = time.monotonic() + timeout_s
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise unwritable(self._path.parent, error) from error
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    return False
                time.sleep(POLL_S)
            except OSError as error:
                os.close(descriptor)
                raise _unlockable(self._path.parent, error) from error
            else:
                self._descriptor = descriptor
                return True

    @property
    def is_current(self) -> bool:
        """Whether the file that is held is the one that others would find: False once the directory was removed."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), self._path.stat())
        except OSError:
            return False

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
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _unlockable(directory: Path, error: OSError) -> StorageError:
    if error.errno not in NO_LOCKS:
        return unwritable(directory, error)
    return StorageError(
        f"The data directory {directory} is on a file system that cannot lock files ({error.strerror}), so two trainings "
        "could not be kept apart there.",
        code="no_file_locks",
        suggestions=[
            "Set CODEBASE_GARDENER_DATA_DIR to a directory on a local disk and restart the server",
            "Or mount the network file system with locks",
        ],
    )
