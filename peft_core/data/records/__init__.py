"""Read records: examples that another tool prepared, in a file, in the rows of a table, or inline.

In: a path, or an iterable of mappings. Out: `Record`s that are checked and all have one `RecordFormat`; and `Notes`, which
say what was given but not used. Nothing is lost in silence: a key of a record, of a message or of a tool call is used, is
harmless metadata and noted, or the record is refused with the key's name. With `skip`, records that would be refused are
skipped and noted.

- `formats.py`: the formats, their keys, and what a record becomes. `messages.py`: conversations. `checks.py`: the harmless
  keys.
- `files.py`: the types of files. `transcripts.py`: sessions of coding assistants.

To add a record format:
1. Add a member to `RecordFormat` (its value is the example that error messages show) and its keys to `_FORMS`.
2. Write its parser and add it to `_PARSERS`: `Record.texts` are (text, learn) pairs in the order in which they are tokenised,
   `Record.conversation` is what a chat template renders.
3. If its records may be split when they are too long, add it to the split formats in `examples.examples_from_record` and
   `summarise._expected_examples`.
4. Test it in tests/unit/data/test_records.py: add a record to `RECORDS` in test_summarise.py, and its broken forms to the
   table of `test_a_broken_record_is_named_with_the_rule_it_breaks`; describe its keys in docs/training-data.md.

To add a type of file, see `files.py`; to add a kind of data source, such as another table, see `summarise.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from peft_core.data.records.checks import (
    FORMATS,
    METADATA,
    Notes,
    Place,
    RecordFormat,
    Skipped,
    SkipReason,
)
from peft_core.data.records.files import (
    MAX_FILE_BYTES,
    SUFFIXES,
    Unreadable,
    file_type,
    json_lines,
    read_values,
)
from peft_core.data.records.formats import RECORD, USED_KEYS, Record, parse
from peft_core.errors import DataError

__all__ = [
    "FORMATS", "MAX_FILE_BYTES", "RECORD", "SUFFIXES", "Notes", "Record", "RecordFormat", "SkipReason", "Skipped", "file_type",
    "numbered", "parse", "read_copy", "read_file", "write_records",
]  # fmt: skip


def read_file(path: Path, *, max_length: int = 512, skip: bool = False, notes: Notes | None = None) -> Iterator[Record]:
    """Yield the records of a file.

    Args:
        path: The file, of one of the types in `SUFFIXES`.
        max_length: The tokens that an example may have: a transcript is cut into pieces of about this length.
        skip: Whether records that cannot be used are skipped instead of refused.
        notes: What was not used; filled in while the records are read.

    Raises:
        DataError: 'broken_record' or 'mixed_formats', with the number of the line; 'unreadable_file', 'too_large'.
    """
    notes = Notes() if notes is None else notes
    return _checked(read_values(path, notes, max_length), str(path), skip=skip, notes=notes)


def read_copy(path: Path, *, skip: bool = False, notes: Notes | None = None) -> Iterator[Record]:
    """Yield the records that `write_records` wrote: the user knows them by their number, and not this file."""
    return _checked(json_lines(path, "record"), "", skip=skip, notes=Notes() if notes is None else notes)


def numbered(
    records: Iterable[Mapping[str, Any]],
    noun: str = "record",
    *,
    where: str = "",
    skip: bool = False,
    notes: Notes | None = None,
) -> Iterator[Record]:
    """Yield the records, checked, and named by their position: "row 17"."""
    named = ((f"{noun} {number}", record) for number, record in enumerate(records, 1))
    return _checked(named, where, skip=skip, notes=Notes() if notes is None else notes)


def write_records(records: Iterable[Mapping[str, Any]], path: Path, *, skip: bool = False) -> None:
    """Write records as a .jsonl file, as they were given but for their metadata; record N is on line N.

    With `skip`, an empty record stands for one that has no JSON form: it is skipped when the file is read, as it was before.

    Raises:
        DataError: 'broken_record', for a record that has no JSON form.
    """
    with path.open("w", encoding="utf-8") as stream:
        for number, record in enumerate(records, 1):
            try:
                kept = record
                if isinstance(record, Mapping):
                    kept = {key: value for key, value in record.items() if key in USED_KEYS or key not in METADATA}
                line = json.dumps(kept, default=_json_form)
            except (TypeError, ValueError, RecursionError) as error:
                if not skip:
                    raise Place(f"record {number}").refuse(f"it cannot be written as JSON: {error}") from error
                line = "{}"
            stream.write(line + "\n")


def _json_form(value: object) -> object:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, date):  # metadata of a message
        return value.isoformat()
    raise TypeError(f"a {type(value).__name__} has no JSON form")


def _checked(values: Iterable[tuple[str, object]], where: str, *, skip: bool, notes: Notes) -> Iterator[Record]:
    first: Record | None = None
    for name, value in values:
        own = Notes()
        try:
            record = _record(name, value, where, own)
            first = first or record
            if record.format is not first.format:
                raise _mixed(record, first, Place(name, where))
        except DataError as error:
            if not skip:
                raise
            notes.skip(name, error)
            continue
        notes.unused.update(own.unused)
        yield record


def _record(name: str, value: object, where: str, notes: Notes) -> Record:
    if isinstance(value, Unreadable):
        raise Place(name, where).refuse(
            value.rule,
            "Correct it, or set config.skip_unusable_records=true to leave out records that cannot be used",
            reason=value.reason,
        )
    return parse(value, name, where=where, notes=notes)


def _mixed(record: Record, first: Record, place: Place) -> DataError:
    return DataError(
        f"{place.words} has the format {record.format}, but {first.name} has the format {first.format}.",
        code="mixed_formats",
        suggestions=("Give all records of a source the same format, or train on one format at a time.",),
        details={"reason": SkipReason.OTHER_FORMAT.value, "record": record.name},
    )
