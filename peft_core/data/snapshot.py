"""`snapshot.json.gz`: what the sources of a training were, so that a later reader can say what has changed since.

It lies in the dataset directory of a job and in the directory of the adapter. It holds names relative to the sources, and
digests; no text and no path of the machine. An adapter may come from elsewhere, so the file is read as hostile: its size, the
size of what it unpacks to, and every value are bounded.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from peft_core.data.examples import learned_text, printable_path
from peft_core.data.secrets import redact_secrets
from peft_core.data.split import digest
from peft_core.data.units import FILE_DIGEST_BYTES, UNIT_DIGEST_BYTES, file_digest, units_of_file
from peft_core.data.walk import File
from peft_core.errors import HeaderError
from peft_core.schemas.dataset import Example
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.files import atomic_write, read_small, refuse_json_bomb

SNAPSHOT_FILE_NAME = "snapshot.json.gz"
MAX_PACKED_BYTES = 16 << 20
MAX_UNPACKED_BYTES = 24 << 20  # 50,000 files with twenty units each
MAX_FILES = 100_000
MAX_HELD_OUT = 200_000  # digests of held-out examples; one training holds out at most 200
_MAX_JSON_VALUES = 2_000_000
_HEX_PER_UNIT = 2 * UNIT_DIGEST_BYTES
_NO_DIGEST = "0" * 2 * FILE_DIGEST_BYTES

Part = Literal["train", "held_out", "unused"]
HeldOutDigest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class FileState(FrozenModel):
    """What a file was, and what the training used it for."""

    path: str = Field(max_length=8192)  # as in `Example.path`
    digest: str = Field(pattern="^[0-9a-f]{32}$")  # of the bytes
    part: Part = "unused"  # "unused": none of its examples was selected, or the file was not needed and not cut
    units: str | None = Field(None, pattern="^([0-9a-f]{16})*$")  # the digests, joined; None: it was not cut

    @property
    def unit_digests(self) -> list[str]:
        units = self.units or ""
        return [units[start : start + _HEX_PER_UNIT] for start in range(0, len(units), _HEX_PER_UNIT)]

    def is_same_file(self, other: FileState) -> bool:
        """Return whether both have the same bytes. A file of which something is still to be trained on is like no other."""
        return self.digest == other.digest != _NO_DIGEST

    def without(self, units: Collection[str]) -> FileState:
        """Return the state of a file of which some units are still to be trained on: it differs from any file."""
        kept = "".join(unit for unit in self.unit_digests if unit not in units)
        return self.model_copy(update={"digest": _NO_DIGEST, "units": kept})


class SourceState(FrozenModel):
    """What a repository was."""

    name: str = Field(
        "", max_length=8192
    )  # of several sources: what the names of its files begin with, see `DataSource`
    commit: str | None = Field(None, pattern="^[0-9a-f]{40,64}$")
    dirty: bool | None = None


class Snapshot(FrozenModel):
    """What the sources of an adapter were when it was trained."""

    schema_version: Literal[1] = 1
    sources: tuple[SourceState, ...] = ()  # repositories only
    files: tuple[FileState, ...] = Field((), max_length=MAX_FILES)  # of the repositories, sorted by path
    held_out_ever: tuple[HeldOutDigest, ...] = Field((), max_length=MAX_HELD_OUT)

    @cached_property
    def units(self) -> frozenset[str]:
        """The digests of all units of all files."""
        return frozenset(unit for file in self.files for unit in file.unit_digests)


def state_of(file: File, *, cut: bool = True) -> FileState | None:
    """Return what a file is now; None if it cannot be read, or if its name holds a secret.

    `cut`: whether its units are recorded, too.
    """
    path = printable_path(file.name)
    content_digest = None if has_secret_name(path) else file_digest(file)
    if content_digest is None:
        return None
    units = "".join(unit.digest for unit in units_of_file(file)) if cut else None
    return FileState(path=path, digest=content_digest, units=units)


def has_secret_name(path: str) -> bool:
    return bool(redact_secrets([path])[1])


def take_snapshot(
    sources: Sequence[SourceState],
    files: Iterable[FileState],
    *,
    train: Collection[str],
    held_out: Collection[str],
    held_out_examples: Iterable[Example],
    held_out_before: Iterable[str] = (),
) -> Snapshot:
    """Return the snapshot of a dataset. It has no files where there are more than a reader accepts.

    Args:
        sources: The repositories.
        files: Their files, as `state_of` returned them when they were read.
        train: Paths of the files that are trained on.
        held_out: Paths of the files that are held out.
        held_out_examples: The examples that are held out.
        held_out_before: `held_out_digests` of the adapters that this one continues.
    """
    part_of: dict[str, Part] = {**dict.fromkeys(held_out, "held_out"), **dict.fromkeys(train, "train")}
    ever = {digest(learned_text(example)).hex() for example in held_out_examples} | set(held_out_before)
    recorded = [file.model_copy(update={"part": part_of.get(file.path, "unused")}) for file in files]
    return Snapshot(
        sources=tuple(sources),
        files=tuple(sorted(recorded, key=lambda file: file.path)) if len(recorded) <= MAX_FILES else (),
        held_out_ever=tuple(sorted(ever)[:MAX_HELD_OUT]),
    )


def held_out_digests(snapshot: Snapshot) -> frozenset[bytes]:
    """Return `split.digest` of the learned text of every example that the adapter, or one that it continues, held out."""
    return frozenset(bytes.fromhex(value) for value in snapshot.held_out_ever)


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Write a snapshot atomically. Of more files than a reader accepts, the units are left out, or else the files."""
    raw = snapshot.model_dump_json().encode()
    if not _is_readable(raw):
        files = tuple(file.model_copy(update={"units": None}) for file in snapshot.files)
        raw = snapshot.model_copy(update={"files": files}).model_dump_json().encode()
    if not _is_readable(raw):
        raw = snapshot.model_copy(update={"files": ()}).model_dump_json().encode()
    atomic_write(path, gzip.compress(raw, compresslevel=6, mtime=0))


def read_snapshot(directory: Path) -> Snapshot | None:
    """Return the snapshot in the directory of an adapter or dataset; None if it is missing or damaged."""
    path = directory / SNAPSHOT_FILE_NAME
    try:
        packed = read_small(path, MAX_PACKED_BYTES)
        unpacker = zlib.decompressobj(wbits=31)  # gzip
        raw = unpacker.decompress(packed, MAX_UNPACKED_BYTES + 1)
        if len(raw) > MAX_UNPACKED_BYTES or not unpacker.eof:
            return None
        refuse_json_bomb(raw, path, _MAX_JSON_VALUES)
        return Snapshot.model_validate_json(raw, extra="ignore")
    except (HeaderError, ValueError, zlib.error):
        return None


def _is_readable(raw: bytes) -> bool:
    return len(raw) <= MAX_UNPACKED_BYTES
