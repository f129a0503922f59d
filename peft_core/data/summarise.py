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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from peft_core.data import table
from peft_core.data.classification import NOTEBOOK
from peft_core.data.examples import examples_from_file, keep_secrets
from peft_core.data.exclusions import Exclusions
from peft_core.data.minhash import MinHashIndex
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
from peft_core.data.split import ExampleKey, count_distinct, digest, with_canonical_digests
from peft_core.data.token_counter import BYTES_PER_TOKEN, EstimatedTokenCounter
from peft_core.data.walk import Tree, walk
from peft_core.errors import DataError, InvalidArgument
from peft_core.schemas.dataset import (
    DatasetPurpose,
    SkippedRecords,
    SourceKind,
    SourceSummary,
    describe_by_extension,
)

ALLOWED = (
    f"a repository directory, a file of records ({', '.join(SUFFIXES)}, each also with .gz; {table.PARQUET_SUFFIX}), a LanceDB "
    "table (.lance), or a list of records"
)
_SHOWN_KEYS = 20  # unused keys that are named
# Limits of the work that is done to see whether there is enough. A source that is still in doubt then is judged by `prepare`.
_PROBE_FILES = 300
_PROBE_BYTES = 1_500_000
_PROBE_MIN_BYTES = 400  # smaller files, such as an almost empty __init__.py, are looked at last
# Share of a file that is code: the fenced blocks of Markdown, the code cells of a notebook.
_CODE_SHARES = {"markdown": 0.2, NOTEBOOK.name: 0.1}


def summarise_source(
    data: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    max_length: int = 512,
    purpose: DatasetPurpose = DatasetPurpose.TRAINING,
    skip_unusable_records: bool = False,
) -> SourceSummary:
    """Return what a data source holds.

    Raises:
        InvalidArgument: the path does not exist, is not readable, or is neither a directory, a table nor a .jsonl file.
        DataError: 'training_data_empty', 'no_code', 'too_few_examples', 'broken_record', 'mixed_formats', 'too_large'; for a
            table also the codes of `worker/table_reader.py`.
    """
    notes = Notes()
    if not isinstance(data, (str, os.PathLike)):
        if not data:
            raise DataError(
                f"{purpose.field} is an empty list.",
                code="training_data_empty",
                suggestions=(f"Give at least {purpose.min_examples} records, or the path of a repository.",),
            )
        records = numbered(data, skip=skip_unusable_records, notes=notes)
        return summarise_records(SourceKind.RECORDS, None, records, max_length, purpose, notes=notes)
    kind, path = _locate(os.fspath(data), purpose)
    if kind == "table":
        return table.summarise_table(path, max_length, purpose, skip_unusable_records=skip_unusable_records)
    if kind is SourceKind.REPOSITORY:
        return _summarise_repository(path, max_length, purpose)
    records = read_file(path, max_length=max_length, skip=skip_unusable_records, notes=notes)
    return summarise_records(SourceKind.JSONL, path, records, max_length, purpose, notes=notes)


def require_enough_examples(
    keys: Sequence[ExampleKey],
    left_out: Mapping[str, int],
    where: str,
    purpose: DatasetPurpose = DatasetPurpose.TRAINING,
    *,
    advice: Sequence[str] = (),
) -> None:
    """Refuse a source with too few distinct examples to train on and to hold out some, or to evaluate on.

    `advice`: what the user may do about what was left out.

    Raises:
        DataError: 'too_few_examples', with the figures.
    """
    examples, files = count_distinct(keys)
    if examples >= purpose.min_examples and files >= purpose.min_files:
        return
    among = f" in {purpose.min_files}" if purpose.min_files > 1 else ""
    raise DataError(
        f"{where} gives {_count_of(examples, 'distinct example')} in {_count_of(files, 'file or record', 'files or records')}; "
        f"at least {purpose.min_examples} examples{among} are needed{purpose.needed_for}. "
        f"Left out: {describe_exclusions(left_out)}.",
        code="too_few_examples",
        suggestions=tuple(advice) or ("Give more code: a parent directory, or the whole repository",),
        details={"examples": examples, "files": files, "left_out": dict(left_out)},
    )


def describe_exclusions(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "nothing"


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
        path = Path(given).expanduser().absolute()
    except RuntimeError:
        _refuse(purpose, given, "the user that it names has no home directory here; it must be an absolute path")
    try:
        return path, path.stat()
    except (FileNotFoundError, NotADirectoryError):
        _refuse(purpose, given, f"no such file or directory exists; it must be {ALLOWED}", *_similar(path))
    except (OSError, ValueError) as error:
        _refuse(purpose, given, f"it cannot be read ({getattr(error, 'strerror', None) or error})")


def _refuse(purpose: DatasetPurpose, given: str, allowed: str, *suggestions: str) -> NoReturn:
    raise InvalidArgument(purpose.field, given, allowed, suggestions=suggestions)


def _similar(path: Path) -> list[str]:
    """Return suggestions: an existing path with a similar name, or else an absolute path."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ["Give an absolute path"]
    close = difflib.get_close_matches(path.name, names[:5_000], n=1)
    return [f"Did you mean {path.parent / close[0]}?"] if close else ["Give an absolute path"]


def _summarise_repository(root: Path, max_length: int, purpose: DatasetPurpose) -> SourceSummary:
    tree = walk(root)
    if not tree.files:
        raise _no_source_files(root, tree.exclusions)
    _require_enough_code(tree, root, max_length, purpose)
    size = sum(file.size * _CODE_SHARES.get(file.language.name, 1.0) for file in tree.files)
    return SourceSummary(
        kind=SourceKind.REPOSITORY,
        path=root,
        files=len(tree.files),
        examples=None,
        estimated_tokens=round(size / BYTES_PER_TOKEN),
        languages=dict(Counter(file.language.name for file in tree.files).most_common()),
        left_out=dict(tree.left_out),
        left_out_by_extension=tree.exclusions.by_extension,
        advice=tree.exclusions.advice,
    )


def _no_source_files(root: Path, exclusions: Exclusions) -> DataError:
    not_read = describe_by_extension(exclusions.by_extension)
    suggestions = exclusions.advice
    if not suggestions:
        suggestions = (
            "Give the directory that holds the source files",
            f"For data that is not code, give a .jsonl file, {FORMATS}",
        )
        if not exclusions.reasons:
            suggestions = ("If it is a submodule, run `git submodule update --init`", *suggestions)
    return DataError(
        f"{root} contains no source files. Left out: {describe_exclusions(exclusions.reasons)}."
        + (f" Not read: {not_read}." if not_read else ""),
        code="no_code",
        suggestions=suggestions,
        details={"left_out": dict(exclusions.reasons), "left_out_by_extension": exclusions.by_extension},
    )


def _require_enough_code(tree: Tree, root: Path, max_length: int, purpose: DatasetPurpose) -> None:
    """Split files into examples until there are certainly enough; refuse only if all files together give too few."""
    files = tree.files
    keys: list[ExampleKey] = []
    signatures = MinHashIndex()
    exclusions = Exclusions()
    exclusions.update(tree.exclusions)
    all_left_out = Counter(tree.left_out)
    token_counter = EstimatedTokenCounter()
    probed_bytes = 0
    for number, file in enumerate(sorted(files, key=lambda file: (file.size < _PROBE_MIN_BYTES, file.size, file.name))):
        if number >= _PROBE_FILES or probed_bytes > _PROBE_BYTES:
            return
        result = examples_from_file(file, token_counter=token_counter, max_length=max_length, redact=keep_secrets)
        probed_bytes += file.size
        all_left_out.update(result.left_out)
        if result.not_read is not None:
            exclusions.add(result.not_read, file.name)
        for example in result.examples:
            keys.append(ExampleKey(example.path, digest(example.segments[-1].text), example.tokens))
            signatures.add(example.segments[-1].text)
        if len(keys) >= purpose.min_examples:
            examples, sources = count_distinct(with_canonical_digests(keys, signatures))
            if examples >= purpose.min_examples and sources >= purpose.min_files:
                return
    distinct = with_canonical_digests(keys, signatures)
    require_enough_examples(distinct, all_left_out, str(root), purpose, advice=exclusions.advice)


def summarise_records(
    kind: SourceKind,
    path: Path | None,
    records: Iterable[Record],
    max_length: int,
    purpose: DatasetPurpose,
    *,
    notes: Notes,
) -> SourceSummary:
    """Return what records hold. `path` is the file or table that they come from; `notes` are taken while they are read."""
    count = size = 0
    needs_chat_template = False
    record_format: RecordFormat | None = None
    languages: Counter[str] = Counter()
    files: set[str] = set()
    keys: list[ExampleKey] = []
    for record in records:
        count += 1
        record_format = record.format
        size += len(record.content.encode())
        needs_chat_template = needs_chat_template or record.needs_chat_template
        file = record.path or record.name
        if file not in files:
            files.add(file)
            languages[record.language] += 1
        if len(keys) < 50 * purpose.min_examples:  # more are not needed to see that there are enough
            keys += _expected_examples(record, file, max_length, purpose)
    where = str(path or purpose.field)
    if record_format is None:
        raise DataError(
            f"{where} contains no {'usable ' * bool(notes.skipped)}records. Left out: {describe_exclusions(notes.counts())}.",
            code="training_data_empty",
            suggestions=(
                *(skipped.example for skipped in notes.skipped.values()),
                f"Give at least {purpose.min_examples} records, each {FORMATS}",
            ),
        )
    require_enough_examples(keys, notes.counts(), where, purpose)
    return SourceSummary(
        kind=kind,
        path=path,
        files=len(files),
        examples=count,
        estimated_tokens=round(size / BYTES_PER_TOKEN),
        languages=dict(languages.most_common()),
        left_out=dict(notes.counts()),
        needs_chat_template=needs_chat_template,
        unused_keys=dict(notes.unused.most_common(_SHOWN_KEYS)),
        skipped=tuple(
            SkippedRecords(reason=reason, count=each.count, first=tuple(each.first), example=each.example)
            for reason, each in notes.skipped.items()
        ),
    )


def _expected_examples(record: Record, file: str, max_length: int, purpose: DatasetPurpose) -> list[ExampleKey]:
    """Return keys of the examples that a record will become: one, or as many as a long text is split into."""
    content_digest = digest(record.content)
    parts = 1
    if record.format in (RecordFormat.TEXT, RecordFormat.CHUNK):
        parts = min(purpose.min_examples, 1 + int(len(record.content) / BYTES_PER_TOKEN / max_length))
    return [ExampleKey(file, content_digest + bytes([part]), 1) for part in range(parts)]


def _count_of(count: int, singular: str, plural: str = "") -> str:
    return f"{count} {singular if count == 1 else plural or singular + 's'}"
