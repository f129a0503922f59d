"""A lock between processes: one runner works on the queue, one process at a time changes a project's adapters.

It uses the operating system's `flock` directly rather than a library, because a child must inherit the descriptor: a worker
shares the queue's lock, which is therefore held until the runner *and* its worker are gone.

The lock is released by closing the descriptor, never by unlocking it, and the kernel closes the descriptors of killed
processes. No pid and no clock is involved, so neither a reused pid nor a clock that jumps can make a dead runner look alive.
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

POLL_INTERVAL_S = 0.05
_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)


class FileLock:
    """A lock on a file, which is created if it does not exist. As a context manager it is released at the end.

    `shared`: other processes may hold it as well, if they share it too.
    """

    def __init__(self, path: Path, *, shared: bool = False) -> None:
        self._path = path
        self._operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        self._descriptor: int | None = None

    def acquire(self, timeout_s: float = 0.0) -> bool:
        """Acquire the lock; return False if another process still holds it after `timeout_s` seconds.

        Raises:
            StorageError: The directory is missing or not writable, or its file system does not support locks.
        """
        deadline = time.monotonic() + timeout_s
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise unwritable(self._path.parent, error) from error
        while True:
            try:
                fcntl.flock(descriptor, self._operation)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(descriptor)
                    return False
                time.sleep(POLL_INTERVAL_S)
            except OSError as error:
                os.close(descriptor)
                raise _unlockable(self._path.parent, error) from error
            else:
                self._descriptor = descriptor
                return True

    @property
    def is_current(self) -> bool:
        """Whether the locked file is the one at the path: False once the directory was removed."""
        try:
            return os.path.samestat(os.fstat(self.descriptor), self._path.stat())
        except OSError:
            return False

    @property
    def descriptor(self) -> int:
        """The file descriptor, for a child that shares the lock."""
        if self._descriptor is None:
            raise RuntimeError("the lock is not held")
        return self._descriptor

    def release(self) -> None:
        """Release the lock, unless a child still shares it. Does nothing if it is not held."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _unlockable(directory: Path, error: OSError) -> StorageError:
    if error.errno not in _UNSUPPORTED:
        return unwritable(directory, error)
    return StorageError(
        f"The data directory {directory} is on a file system that cannot lock files ({error.strerror}), so two runs could "
        "write to it at the same time.",
        code="no_file_locks",
        suggestions=[
            "Set CODEBASE_GARDENER_DATA_DIR to a directory on a local disk and restart the server",
            "Or mount the network file system with lock support",
        ],
    )
