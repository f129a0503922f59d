"""Cut a file into units that two versions of a code base are compared by, and give each of them a digest.

A unit is a function, a method, a paragraph, or a run of statements without a blank line. Unlike examples, units depend on
neither the tokenizer nor `max_length`, and an edit changes only the units that hold its lines. Digests ignore white space, so
that a formatter that only indents differently changes nothing. They are not secret: the digest of a known text can be computed.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from peft_core.data.chunking import split_finely
from peft_core.data.classification import NOTEBOOK
from peft_core.data.examples import FileResult, parts_of_file, printable_path
from peft_core.data.exclusions import MAX_FILE_BYTES, ExclusionReason
from peft_core.data.notebook import MAX_NOTEBOOK_BYTES
from peft_core.data.read_text import read_bytes
from peft_core.data.walk import File

UNIT_DIGEST_BYTES = 8
FILE_DIGEST_BYTES = 16


class Unit(NamedTuple):
    """A unit of a file."""

    digest: str  # 16 hexadecimal digits; equal for texts that differ in white space only
    kind: str  # function, class, method, module, block
    start_line: int  # 1-based; of a notebook as in `Example.start_line`
    end_line: int  # inclusive
    size: int  # characters


def units_of_file(file: File) -> list[Unit]:
    """Return the units of a file in order; none if it cannot be read or holds no code."""
    path = printable_path(file.name)
    parts = parts_of_file(file, path, FileResult())
    if isinstance(parts, ExclusionReason):
        return []
    units: list[Unit] = []
    for part in parts:
        for unit in split_finely(part.lines, part.language):
            text = "".join(part.lines[unit.start : unit.end])
            first, last = part.line_number(unit.start), part.line_number(unit.end - 1)
            units.append(Unit(unit_digest(text), unit.kind, first, last, len(text)))
    return units


def unit_digest(text: str) -> str:
    normalised = " ".join(text.split()).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(normalised, digest_size=UNIT_DIGEST_BYTES).hexdigest()


def file_digest(file: File) -> str | None:
    """Return a digest of the bytes of a file, 32 hexadecimal digits; None if it cannot be read."""
    content = read_bytes(file.path, MAX_NOTEBOOK_BYTES if file.language is NOTEBOOK else MAX_FILE_BYTES)
    if isinstance(content, ExclusionReason):
        return None
    return hashlib.blake2b(content, digest_size=FILE_DIGEST_BYTES).hexdigest()
