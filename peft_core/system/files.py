"""Read files of unknown origin without surprises, and write files so that no reader ever sees half of one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from peft_core.errors import HeaderError

_MAX_READ_BYTES = 0x7FFFF000  # of one call on Linux


@contextmanager
def open_regular(path: Path, *, follow_links: bool) -> Iterator[int]:
    """Open a regular file for reading, and yield its descriptor. Never blocks on a FIFO or device.

    Raises:
        HeaderError: The path is missing, unreadable or not a regular file, or it is a symbolic link and links are not followed.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        linked = not follow_links and path.is_symlink()
        raise HeaderError(
            path, "is a symbolic link, which is not followed here" if linked else _reason(error)
        ) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise HeaderError(path, "is not a regular file")
        yield descriptor
    except OSError as error:
        raise HeaderError(path, _reason(error)) from error
    finally:
        os.close(descriptor)


def read_exactly(descriptor: int, size: int, start: int, path: Path) -> bytes:
    """Read `size` bytes at offset `start`; `path` is for the error message.

    Raises:
        HeaderError: The file ends before.
    """
    chunks: list[bytes] = []
    while size > 0:
        chunk = os.pread(descriptor, min(size, _MAX_READ_BYTES), start)
        if not chunk:
            raise HeaderError(path, "is truncated")
        chunks.append(chunk)
        start += len(chunk)
        size -= len(chunk)
    return b"".join(chunks)  # does not copy a single chunk


def read_small(path: Path, limit: int) -> bytes:
    """Read a small file of unknown origin. Symbolic links are not followed.

    Raises:
        HeaderError: It is missing, a symbolic link, not a regular file, or larger than `limit` bytes.
    """
    with open_regular(path, follow_links=False) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise HeaderError(path, f"has {size} bytes; must be at most {limit}")
        return read_exactly(descriptor, size, 0, path)


def refuse_json_bomb(raw: bytes, path: Path, max_values: int) -> None:
    """Check that a JSON document stays small when it is parsed: a megabyte of empty lists takes 25 MB in memory.

    Raises:
        HeaderError: It may contain more than `max_values` names, values and containers.
    """
    if sum(raw.count(mark) for mark in (b"[", b"{", b",", b":")) > max_values:
        raise HeaderError(path, f"its JSON has more than {max_values} names and values, which is the limit")


def atomic_write(path: Path, data: bytes | str, *, mode: int | None = None) -> None:
    """Replace `path` by a file with this content (text as UTF-8): readers see the old file or the new one, never a part.

    Args:
        path: The file to write; its directory must exist.
        data: The whole content.
        mode: Permissions of the file; None: what the umask leaves of 0o666.
    """
    with atomic_writer(path, mode=mode) as stream:
        stream.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def atomic_writer(path: Path, *, temporary: Path | None = None, mode: int | None = None) -> Iterator[BinaryIO]:
    """Like `atomic_write`, for content that is written piece by piece. If the block raises, `path` stays as it was.

    Args:
        path: The file to write; its directory must exist.
        temporary: The file to write first, in the same directory; None: `.NAME.tmp`. Its name is fixed, so that the next
            attempt overwrites what a killed process left. Two processes must not write the same file at a time.
        mode: Permissions of the file; None: what the umask leaves of 0o666.
    """
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            if mode is not None:
                os.fchmod(stream.fileno(), mode)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def fsync_file(path: Path) -> None:
    """Flush a file's content to the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def fsync_directory(path: Path) -> None:
    """Flush a directory's entries (names that were added, replaced or removed) to the disk; not its files' content."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return f"cannot be read ({error.strerror or type(error).__name__})"
