"""The code units that an adapter was trained on, from the examples of its dataset and of those that it continues."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peft_core.data.chunking import split_finely, split_lines
from peft_core.data.dataset import read_examples
from peft_core.data.languages import language_named
from peft_core.data.snapshot import FileState, Snapshot, read_snapshot
from peft_core.data.units import unit_digest
from peft_core.schemas.dataset import Example, FillInTheMiddle, Segment


@dataclass(frozen=True, slots=True)
class CodeUnit:
    """A function, a class or another piece of a file."""

    path: str
    language: str
    start_line: int  # 1-based
    end_line: int  # inclusive
    text: str


def read_units(files: Sequence[Path], families: Sequence[FillInTheMiddle]) -> list[CodeUnit]:
    """Return the code that an adapter was trained on, as it was when the adapter was trained, each text once.

    Of earlier trainings, what had changed or been deleted by then is left out: a new version of it is in the first file.

    Args:
        files: train.jsonl of the adapter's dataset, then those of the adapters that it continues. What the code was lies beside
            each, in the dataset's snapshot.
        families: As for `units_of`.

    Raises:
        DataError: 'broken_dataset'.
    """
    if not files:
        return []
    newest, *earlier = files
    units = {unit.text: unit for unit in units_of(read_examples(newest), families)}
    now = read_snapshot(newest.parent) if earlier else None
    for file in earlier:
        found = units_of(read_examples(file), families)
        for unit in found if now is None or not now.files else _still_there(found, read_snapshot(file.parent), now):
            units.setdefault(unit.text, unit)
    return list(units.values())


def _still_there(units: Iterable[CodeUnit], then: Snapshot | None, now: Snapshot) -> Iterator[CodeUnit]:
    """Yield the units that are in the code now: those of files that are the same, and of others if each part is known."""
    before = {file.path: file for file in then.files} if then is not None else {}
    files = {file.path: file for file in now.files}
    by_digest = {file.digest: file for file in now.files}
    for unit in units:
        was, file = before.get(unit.path), files.get(unit.path)
        moved = by_digest.get(was.digest) if was is not None and file is None else None
        if file is not None and ((was is not None and was.is_same_file(file)) or _has(file, unit)):
            yield unit
        elif was is not None and moved is not None and was.is_same_file(moved):
            yield replace(unit, path=moved.path)


def _has(file: FileState, unit: CodeUnit) -> bool:
    """Return whether every function or paragraph of a unit is in a file. One that was cut in the middle is in none."""
    lines = split_lines(textwrap.dedent(unit.text))
    parts = ["".join(lines[part.start : part.end]) for part in split_finely(lines, language_named(unit.language))]
    return bool(parts) and set(map(unit_digest, parts)) <= set(file.unit_digests)


def units_of(examples: Iterable[Example], families: Sequence[FillInTheMiddle]) -> list[CodeUnit]:
    """Return the code in training examples, each text once; records, such as conversations, have none.

    `families`: the tokens for fill-in-the-middle of all base models. With those of the adapter's some examples were reordered,
    and the model that the code is put before may be another one.
    """
    units: dict[str, CodeUnit] = {}
    for example in examples:
        segments = _in_file_order(example.segments, families)
        text = "".join(segment.text for segment in segments if segment.learn and segment.literal)
        if text.strip() and example.start_line:
            unit = CodeUnit(example.path, example.language, example.start_line, example.end_line, text)
            units.setdefault(text, unit)
    return list(units.values())


def _in_file_order(segments: Sequence[Segment], families: Sequence[FillInTheMiddle]) -> Sequence[Segment]:
    """Return the segments as in the file. See `FillInTheMiddle.prompt` for the order in which they are trained on."""
    marks = {segment.text: position for position, segment in enumerate(segments) if not segment.literal}
    tokens = next((each for each in families if each.prefix in marks and each.suffix in marks), None)
    if tokens is None:
        return segments
    if not tokens.middle:
        border = marks[tokens.prefix]
        return (*segments[border:], *segments[:border])
    suffix, middle = marks[tokens.suffix], marks.get(tokens.middle, len(segments))
    return (*segments[:suffix], *segments[middle:], *segments[suffix:middle])
