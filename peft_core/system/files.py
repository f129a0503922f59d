"""Read files of unknown origin without surprises, and write files so that no reader ever sees half of one."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from peft_core.errors import HeaderError

_AT_ONCE = 0x7FFFF000  # bytes: Linux reads no more


@contextmanager
def open_regular(path: Path, *, follow_links: bool) -> Iterator[int]:
    """A read-only descriptor of a regular file; never blocks on a FIFO or device.

    Raises:
        HeaderError: the path is missing, unreadable, no regular file, or a link where links are not followed.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        linked = not follow_links and path.is_symlink()
        raise HeaderError(
            path,
            "is a symbolic link, which is not followed here" if linked else _reason(error),
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
    """`size` bytes at `start`.

    Raises:
        HeaderError: the file ends before them.
    """
    parts: list[bytes] = []
    while size > 0:
        part = os.pread(descriptor, min(size, _AT_ONCE), start)
        if not part:
            raise HeaderError(path, "ends too early; it was truncated")
        parts.append(part)
        start += len(part)
        size -= len(part)
    return b"".join(parts)  # of one part: itself, not a copy


def read_small(path: Path, limit: int) -> bytes:
    """All of a small file of unknown origin, which must be no link.

    Raises:
        HeaderError: missing, no regular file, a link, or larger than `limit` bytes.
    """
    with open_regular(path, follow_links=False) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > limit:
            raise HeaderError(path, f"has {size} bytes, more than the {limit} that are read")
        return read_exactly(descriptor, size, 0, path)


def refuse_json_bomb(raw: bytes, path: Path, most_values: int) -> None:
    """That JSON stays small when it is parsed: a megabyte of empty lists takes twenty-five in memory.

    Raises:
        HeaderError: it may hold more than `most_values` names, values and containers.
    """
    if sum(raw.count(mark) for mark in (b"[", b"{", b",", b":")) > most_values:
        raise HeaderError(path, f"its JSON holds more than the {most_values} names and values that are read")


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
