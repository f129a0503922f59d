"""The JSON files of Codebase Gardener: read with limits, changed under a lock, and written without changing the rest.

It writes them itself as well, without a lock between processes. What it knows and we do not is therefore kept: unknown fields,
the order of the fields, the file's permissions.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from peft_core.errors import HeaderError, StorageError, sanitize, unwritable
from peft_core.system.files import atomic_write, read_small, refuse_json_bomb
from peft_core.system.lock import FileLock

VERSION = 1  # the newest major version of the files that is understood
MAX_BYTES = 16_000_000
MAX_VALUES = 1_000_000  # names and values in a file: 20,000 projects have 240,000
LOCK_TIMEOUT_S = 5.0  # a change takes milliseconds

Fields = dict[str, Any]


def read(path: Path) -> Fields | None:
    """Return the content of a file; None if it does not exist.

    Raises:
        StorageError: 'gardener_file': it is a link or too large, it is not a JSON object, or its version is newer.
    """
    found = _read(path)
    return None if found is None else found[0]


@contextmanager
def changing(path: Path, lock: Path) -> Iterator[Fields | None]:
    """Yield the content of a file, and write it back if the block has changed it; yield None if there is no file.

    Raises:
        StorageError: as for `read`, or another process holds the lock, or the file cannot be written.
    """
    if not os.path.lexists(path):
        yield None
        return
    with FileLock(lock) as held:
        if not held.acquire(LOCK_TIMEOUT_S):
            raise StorageError(
                f"Another process has locked {path.name} for more than {LOCK_TIMEOUT_S:g} s.", code="gardener_busy"
            )
        found = _read(path)
        if found is None:  # it was deleted meanwhile
            yield None
            return
        fields, raw = found
        before = _text(fields, raw)
        yield fields
        after = _text(fields, raw)
        if after != before:
            try:
                atomic_write(path, after, mode=stat.S_IMODE(path.stat().st_mode))
            except OSError as error:
                raise unwritable(path.parent, error) from error


def now_like(example: object) -> str:
    """Return the current time in the form of an earlier one: local time, or with its offset; "T" or a space in the middle."""
    text = example if isinstance(example, str) else ""
    try:
        zone = datetime.fromisoformat(text).tzinfo
    except ValueError:
        zone = None
    return datetime.now(zone).isoformat(sep=" " if " " in text else "T")


def _read(path: Path) -> tuple[Fields, bytes] | None:
    try:
        raw = read_small(path, MAX_BYTES)
        refuse_json_bomb(raw, path, MAX_VALUES)
    except HeaderError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        problem = error.problem if error.problem.startswith("its") else f"it {error.problem}"
        raise _unusable(path, problem) from error
    try:
        fields = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _unusable(path, f"it is not JSON ({sanitize(error)})") from error
    if not isinstance(fields, dict):
        raise _unusable(path, "it must be a JSON object")
    _require_version(path, fields.get("version", VERSION))
    return fields, raw


def _require_version(path: Path, version: object) -> None:
    major = str(version).partition(".")[0]
    if not (major.isascii() and major.isdigit() and int(major[:9]) <= VERSION):
        raise _unusable(
            path,
            f"its version is {sanitize(repr(version), limit=40)}; this peft-mcp reads version {VERSION}",
            fix="Upgrade peft-mcp",
        )


def _text(fields: Fields, raw: bytes) -> str:
    """Return the file's new text, in the form that Codebase Gardener gives it."""
    return json.dumps(fields, indent=2, ensure_ascii=raw.isascii())


def _unusable(path: Path, problem: str, *, fix: str = "Repair it, or restore it from a backup") -> StorageError:
    return StorageError(
        f"Codebase Gardener's file {path} cannot be used: {problem.rstrip('.')}.",
        code="gardener_file",
        suggestions=[fix, "Or move it away: trainings, adapters and their status do not depend on it"],
        details={"path": str(path)},
    )
