"""Summarise a data source before training: does it exist, is it usable, is it enough, and how large is it.

In: a path (repository, file of records, table) or a list of records. Out: a `SourceSummary`. Nothing is tokenised (tokens
are estimated from bytes) and nothing is written, so that a tool call can be answered with it.

To add a kind of data source that holds records, follow the tables (LanceDB, Parquet), which go through these places:
1. `_locate` recognises the source by its path and returns its kind; `summarise_source` calls the function that summarises it.
2. A module like `table.py` summarises the source and exports its records to a .jsonl file. If reading it needs a heavy
   library, a child process does (`worker/table_reader.py`), which yields mappings; `records.numbered` checks them.
3. `planning/planner.py` calls the export when a job is queued. From there on the source is `SourceKind.RECORDS`, and
   preparation, training and evaluation need no change.
4. Test it as tests/unit/data/test_table.py does: the summary and the examples must equal those of the same records given
   inline, and the process that asks must not import the heavy library.
A source that is not made of records also needs a member of `schemas.dataset.SourceKind` and a branch in `prepare.py`.
To add a record format, see `records.py`; to add a language, see `languages.py`.
"""

from __future__ import annotations

import difflib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from peft_core.data import table
from peft_core.data.records import (
    FORMATS,
    MAX_FILE_BYTES,
    SUFFIXES,
    Notes,
    Record,
    RecordFormat,
    file_type,
    numbered,
    read_file,
)
from peft_core.data.repository import summarise_repositories
from peft_core.data.selection import Selection
from peft_core.data.sources import unique_names
from peft_core.data.split import ExampleKey, advice_on_records, describe_exclusions, digest, require_enough_examples
from peft_core.data.token_counter import BYTES_PER_TOKEN
from peft_core.errors import DataError, InvalidArgument
from peft_core.schemas.dataset import DatasetPurpose, DataSource, SkippedRecords, SourceKind, SourceSummary
from peft_core.system.user_paths import absolute_path, path_advice, user_path

ALLOWED = (
    f"a repository directory, a file of records ({', '.join(SUFFIXES)}, each also with .gz; {table.PARQUET_SUFFIX}), a LanceDB "
    "table (.lance), or a list of records"
)
_SHOWN_KEYS = 20  # unused keys that are named
_ALSO = "config.more_sources"


def summarise_source(
    data: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    max_length: int = 512,
    purpose: DatasetPurpose = DatasetPurpose.TRAINING,
    skip_unusable_records: bool = False,
    selection: Selection | None = None,
    also: Sequence[str] = (),
    held_out_fraction: float = 0.1,
    seed: int = 0,
) -> SourceSummary:
    """Return what a data source holds, or several: `also` are paths of more repositories and files of records.

    Raises:
        InvalidArgument: the path does not exist, is not readable, or is neither a directory, a table nor a .jsonl file; or the
            selection does not suit it.
        DataError: 'training_data_empty', 'no_code', 'too_few_examples', 'broken_record', 'mixed_formats', 'too_large'; for a
            table also the codes of `worker/table_reader.py`.
    """
    selection = selection or Selection()
    if not isinstance(data, (str, os.PathLike)):
        _require_paths("records in the call", selection, also)
        return _summarise_list(
            data, max_length=max_length, purpose=purpose, skip_unusable_records=skip_unusable_records
        )
    kind, path = _locate(os.fspath(data), purpose)
    if kind == "table":
        _require_paths(str(data), selection, also)
        return table.summarise_table(path, max_length, purpose, skip_unusable_records=skip_unusable_records)
    first = DataSource(path=path, kind=kind)
    summarise_code_of = partial(
        summarise_repositories,
        selection=selection,
        max_length=max_length,
        purpose=purpose,
        held_out_fraction=held_out_fraction,
        seed=seed,
    )
    summarise_file = partial(
        _summarise_file, max_length=max_length, purpose=purpose, skip_unusable_records=skip_unusable_records
    )
    if also:
        return _summarise_several(
            first, also, selection=selection, summarise_file=summarise_file, summarise_code_of=summarise_code_of
        )
    if kind is SourceKind.REPOSITORY:
        return summarise_code_of([first])
    _require_paths(str(data), selection)
    return summarise_file(path)


def _summarise_list(
    data: Sequence[Mapping[str, Any]], *, max_length: int, purpose: DatasetPurpose, skip_unusable_records: bool
) -> SourceSummary:
    if not data:
        raise DataError(
            f"{purpose.field} is an empty list.",
            code="training_data_empty",
            suggestions=(f"Give at least {purpose.min_examples} records, or the path of a repository.",),
        )
    notes = Notes()
    records = numbered(data, skip=skip_unusable_records, notes=notes)
    return summarise_records(SourceKind.RECORDS, None, records, max_length, purpose, notes=notes)


def _summarise_file(
    path: Path, *, max_length: int, purpose: DatasetPurpose, skip_unusable_records: bool, beside_code: bool = False
) -> SourceSummary:
    notes = Notes()
    records = read_file(path, max_length=max_length, skip=skip_unusable_records, notes=notes)
    return summarise_records(SourceKind.JSONL, path, records, max_length, purpose, notes=notes, beside_code=beside_code)


def _require_paths(given: str, selection: Selection, also: Sequence[str] = ()) -> None:
    """Check that settings for repositories are not used with other data.

    Raises:
        InvalidArgument: they are.
    """
    if selection:
        field, value = ("include", selection.include) if selection.include else ("exclude", selection.exclude)
        raise InvalidArgument(
            f"config.{field}",
            list(value),
            f"it selects files of a directory, and training_data is not one: {given}",
            suggestions=("Omit it",),
        )
    if also:
        raise InvalidArgument(
            _ALSO,
            list(also),
            f"training_data must be a directory or a file of records to be trained on with others, and it is not: {given}",
            suggestions=("Write the records into a .jsonl file, and give its path",),
        )


def _summarise_several(
    first: DataSource,
    also: Sequence[str],
    *,
    selection: Selection,
    summarise_file: Callable[..., SourceSummary],
    summarise_code_of: Callable[[Sequence[DataSource]], SourceSummary],
) -> SourceSummary:
    """Return what several sources hold together."""
    located = [first, *map(_locate_other, also)]
    for number, source in enumerate(located[1:], 1):
        if any(os.path.realpath(source.path) == os.path.realpath(other.path) for other in located[:number]):
            raise InvalidArgument(_ALSO, str(source.path), "it is given twice", suggestions=("Give each path once",))
    names = unique_names([source.path for source in located])
    sources = [source.model_copy(update={"name": name}) for source, name in zip(located, names, strict=True)]
    repositories = [source for source in sources if source.kind is SourceKind.REPOSITORY]
    parts = [summarise_code_of(repositories)] if repositories else []
    if not repositories:
        _require_paths(", ".join(str(source.path) for source in sources), selection)
    parts += [
        summarise_file(source.path, beside_code=bool(repositories))
        for source in sources
        if source.kind is not SourceKind.REPOSITORY
    ]
    whole = parts[0].model_copy(
        update={
            "kind": first.kind,
            "path": first.path,
            "name": sources[0].name,
            "more_sources": tuple(sources[1:]),
        }
    )
    return with_parts(whole, parts)


def with_parts(whole: SourceSummary, parts: Sequence[SourceSummary]) -> SourceSummary:
    """Return the summary of several sources with the totals of its parts: one for all repositories, one per file of records."""
    code = [part for part in parts if part.kind is SourceKind.REPOSITORY]
    records = [part.examples for part in parts if part.examples is not None]
    languages, left_out, unused = Counter[str](), Counter[str](), Counter[str]()
    for part in code or parts:
        languages.update(part.languages)
    for part in parts:
        unused.update(part.unused_keys)
        left_out.update(part.left_out)
    return whole.model_copy(
        update={
            "parts": tuple(parts),
            "files": sum(part.files for part in code or parts),
            "examples": sum(records) if records else None,
            "study_items": sum(part.study_items for part in parts),
            "cut_records": sum(part.cut_records for part in parts),
            "estimated_tokens": sum(part.estimated_tokens for part in parts),
            "languages": dict(languages.most_common()),
            "left_out": dict(left_out),
            "advice": tuple(advice for part in parts for advice in part.advice),
            "unused_keys": dict(unused.most_common(_SHOWN_KEYS)),
            "skipped": tuple(skipped for part in parts for skipped in part.skipped),
            "needs_chat_template": any(part.needs_chat_template for part in parts),
        }
    )


def _locate_other(given: str) -> DataSource:
    try:
        kind, path = _locate(given, DatasetPurpose.TRAINING)
    except InvalidArgument as error:
        raise InvalidArgument(
            _ALSO, given, error.details["allowed"], suggestions=error.suggestions, code=error.code
        ) from None
    if kind == "table":
        raise InvalidArgument(
            _ALSO,
            given,
            "a table cannot be trained on together with other sources",
            suggestions=("Give it as training_data alone, or export its rows to a .jsonl file",),
        )
    return DataSource(path=path, kind=kind)


def _locate(given: str, purpose: DatasetPurpose) -> tuple[SourceKind | Literal["table"], Path]:
    path, status = _existing_path(given, purpose)
    if stat.S_ISDIR(status.st_mode):
        if not os.access(path, os.R_OK | os.X_OK):
            _refuse(purpose, given, "the directory cannot be read by this user")
        if path.suffix.lower() == table.LANCE_SUFFIX:
            table.require_table(path, given, purpose)
            return "table", path
        return SourceKind.REPOSITORY, path
    if not stat.S_ISREG(status.st_mode):
        _refuse(purpose, given, f"it is neither a directory nor a regular file; it must be {ALLOWED}")
    is_table = path.suffix.lower() == table.PARQUET_SUFFIX
    if file_type(path) is None and not is_table:
        _refuse(
            purpose,
            given,
            f"a file of this type is not read, and code must be given as its directory; it must be {ALLOWED}",
            f"Give the directory of the repository, such as {path.parent}",
            f"Write the data as .jsonl, one JSON object per line: {RecordFormat.TEXT}",
        )
    if not os.access(path, os.R_OK):
        _refuse(purpose, given, "the file cannot be read by this user")
    if status.st_size > MAX_FILE_BYTES:
        raise DataError(
            f"{path} has {status.st_size / 1e9:.1f} GB; a file of records must have at most {MAX_FILE_BYTES / 1e9:.0f} GB.",
            code="too_large",
            suggestions=("Give a part of it: a LoRA adapter learns from thousands of examples, not from millions",),
        )
    return "table" if is_table else SourceKind.JSONL, path


def _existing_path(given: str, purpose: DatasetPurpose) -> tuple[Path, os.stat_result]:
    if given.lstrip()[:1] in ("[", "{"):
        _refuse(purpose, given, "records must be given as a list, not as a string that holds JSON")
    if not given.strip() or "\0" in given:
        _refuse(purpose, given, f"it must be {ALLOWED}")
    try:
        path = absolute_path(user_path(given))
    except RuntimeError:
        _refuse(purpose, given, "the user that it names has no home directory here; it must be an absolute path")
    try:
        return path, path.stat()
    except (FileNotFoundError, NotADirectoryError):
        advice = path_advice(given) or _similar(path) or f"Check its spelling: {path} must exist on this machine"
        _refuse(purpose, given, "no such file or directory exists", advice)
    except (OSError, ValueError) as error:
        _refuse(purpose, given, f"it cannot be read ({getattr(error, 'strerror', None) or error})")


def _refuse(purpose: DatasetPurpose, given: str, allowed: str, *suggestions: str) -> NoReturn:
    raise InvalidArgument(purpose.field, given, allowed, suggestions=suggestions)


def _similar(path: Path) -> str | None:
    """Return the suggestion of an existing path with a similar name."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    close = difflib.get_close_matches(path.name, names[:5_000], n=1)
    return f"Did you mean {path.parent / close[0]}?" if close else None


class _Counts:
    """What was counted while records were read. `size` is in bytes of UTF-8."""

    def __init__(self, max_length: int, purpose: DatasetPurpose) -> None:
        self._max_length = max_length
        self._purpose = purpose
        self.records = self.size = self.cut_records = self.study_items = 0
        self.needs_chat_template = False
        self.languages: Counter[str] = Counter()
        self.files: set[str] = set()
        self.keys: list[ExampleKey] = []
        self._distinct: set[int] = set()

    def add(self, record: Record) -> None:
        self.records += 1
        self.study_items += bool(record.study)
        self.size += len(record.content.encode())
        if (text := hash(record.content)) not in self._distinct:
            self._distinct.add(text)
            self.cut_records += _parts(record, self._max_length)
        self.needs_chat_template = self.needs_chat_template or record.needs_chat_template
        file = record.path or record.name
        if file not in self.files:
            self.files.add(file)
            self.languages[record.language] += 1
        if len(self.keys) < 50 * self._purpose.min_examples:  # more are not needed to see that there are enough
            self.keys += _expected_examples(record, file, self._max_length, self._purpose)


def summarise_records(
    kind: SourceKind,
    path: Path | None,
    records: Iterable[Record],
    max_length: int,
    purpose: DatasetPurpose,
    *,
    notes: Notes,
    beside_code: bool = False,
) -> SourceSummary:
    """Return what records hold. `path` is the file or table that they come from; `notes` are taken while they are read.

    `beside_code`: the records add to repositories, which hold enough, so that a single record is enough here.
    """
    counts = _Counts(max_length, purpose)
    for record in records:
        counts.add(record)
    where = str(path or purpose.field)
    if not counts.records:
        raise DataError(
            f"{where} contains no {'usable ' * bool(notes.skipped)}records. Left out: {describe_exclusions(notes.counts())}.",
            code="training_data_empty",
            suggestions=(
                *(skipped.example for skipped in notes.skipped.values()),
                f"Give at least {purpose.min_examples} records, each {FORMATS}",
            ),
        )
    if not beside_code:
        require_enough_examples(counts.keys, notes.counts(), where, purpose, advice=advice_on_records(notes.counts()))
    return SourceSummary(
        kind=kind,
        path=path,
        files=len(counts.files),
        examples=counts.records,
        study_items=counts.study_items,
        cut_records=counts.cut_records,
        estimated_tokens=round(counts.size / BYTES_PER_TOKEN),
        languages=dict(counts.languages.most_common()),
        left_out=dict(notes.counts()),
        needs_chat_template=counts.needs_chat_template,
        unused_keys=_most_used(notes.unused),
        skipped=tuple(
            SkippedRecords(reason=reason, count=each.count, first=tuple(each.first), example=each.example)
            for reason, each in notes.skipped.items()
        ),
    )


def _most_used(unused: Counter[str]) -> dict[str, int]:
    shown = dict(unused.most_common(_SHOWN_KEYS))
    more = len(unused) - len(shown)
    return {**shown, f"{more} more keys": unused.total() - sum(shown.values())} if more else shown


def _expected_examples(record: Record, file: str, max_length: int, purpose: DatasetPurpose) -> list[ExampleKey]:
    """Return keys of the examples that a record will become: one, or as many as a long text is split into."""
    content_digest = digest(record.content)
    parts = min(purpose.min_examples, _parts(record, max_length))
    return [ExampleKey(file, content_digest + bytes([part]), 1) for part in range(parts)]


def _parts(record: Record, max_length: int) -> int:
    """Return how many examples a record becomes: one, or as many as a long text is split into."""
    if record.format not in (RecordFormat.TEXT, RecordFormat.CHUNK):
        return 1
    return 1 + int(len(record.content) / BYTES_PER_TOKEN / max_length)
