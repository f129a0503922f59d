"""A first look at training data: does it exist, can it be used, how much is it. Nothing is tokenised or written."""

from __future__ import annotations

import difflib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

from peft_core.data import lance_table
from peft_core.data.examples import examples_from_file, unchanged
from peft_core.data.minhash import MinHashIndex
from peft_core.data.records import FORMS, Record, RecordFormat, read_inline, read_jsonl
from peft_core.data.split import ExampleKey, count_distinct, digest, with_canonical_digests
from peft_core.data.token_counter import BYTES_PER_TOKEN, EstimatedTokenCounter
from peft_core.data.walk import File, walk
from peft_core.errors import DataError, InvalidArgument
from peft_core.schemas.dataset import DatasetPurpose, SourceKind, SourceSummary

MAX_JSONL_BYTES = 1_000_000_000
ALLOWED = "a repository directory, a .jsonl file, a LanceDB table (.lance), or a list of records"
# Files that are cut to see whether there is enough; a source that is still in doubt then is decided by its preparation.
_PROBE_FILES = 300
_PROBE_BYTES = 1_500_000
_PROBE_SMALLEST = 400  # bytes; below it lie the empty __init__.py of this world
_MARKDOWN_CODE = 0.2  # share of a Markdown file that is fenced code


def summarise_source(
    data: str | os.PathLike[str] | Sequence[Mapping[str, Any]],
    *,
    max_length: int = 512,
    purpose: DatasetPurpose = DatasetPurpose.TRAINING,
) -> SourceSummary:
    """What a data source holds.

    Raises:
        InvalidArgument: nothing there, not readable, or neither a directory, a table nor a .jsonl file.
        DataError: 'training_data_empty', 'no_code', 'too_few_examples', 'broken_record', 'mixed_formats', 'too_large'; of a
            table also what `table_rows` says.
    """
    if not isinstance(data, (str, os.PathLike)):
        if not data:
            raise DataError(
                f"{purpose.field} is an empty list.",
                code="training_data_empty",
                suggestions=(f"Give at least {purpose.min_examples} records, or the path of a repository.",),
            )
        return summarise_records(SourceKind.RECORDS, None, read_inline(data), max_length, purpose)
    kind, path = _locate(os.fspath(data), purpose)
    if kind == "table":
        return lance_table.summarise_table(path, max_length, purpose)
    if kind is SourceKind.REPOSITORY:
        return _repository(path, max_length, purpose)
    return summarise_records(SourceKind.JSONL, path, read_jsonl(path), max_length, purpose)


def require_enough_examples(
    keys: Sequence[ExampleKey],
    left_out: Mapping[str, int],
    where: str,
    purpose: DatasetPurpose = DatasetPurpose.TRAINING,
) -> None:
    """Refuse what is too little: to be split into a part to train on and a part to measure on, for one.

    Raises:
        DataError: 'too_few_examples', with the figures.
    """
    examples, files = count_distinct(keys)
    if examples >= purpose.min_examples and files >= purpose.min_files:
        return
    among = f" in {purpose.min_files}" if purpose.min_files > 1 else ""
    raise DataError(
        f"{where} gives {_many(examples, 'distinct example')} in {_many(files, 'file or record', 'files or records')}; "
        f"at least {purpose.min_examples} examples{among} are needed{purpose.needed_for}. "
        f"Left out: {describe_exclusions(left_out)}.",
        code="too_few_examples",
        suggestions=("Give more code: a directory further up, or the whole repository",),
        details={"examples": examples, "files": files, "left_out": dict(left_out)},
    )


def describe_exclusions(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "nothing"


def _locate(given: str, purpose: DatasetPurpose) -> tuple[SourceKind | Literal["table"], Path]:
    path, status = _found(given, purpose)
    if stat.S_ISDIR(status.st_mode):
        if not os.access(path, os.R_OK | os.X_OK):
            _refuse(purpose, given, "the directory cannot be read by this user")
        if path.suffix.lower() == lance_table.SUFFIX:
            lance_table.require_table(path, given, purpose)
            return "table", path
        return SourceKind.REPOSITORY, path
    if not stat.S_ISREG(status.st_mode):
        _refuse(purpose, given, f"it is neither a directory nor a regular file; it must be {ALLOWED}")
    if path.suffix.lower() not in (".jsonl", ".ndjson"):
        _refuse(
            purpose,
            given,
            f"it is a file of another kind; a file must be .jsonl, code is given as a directory ({ALLOWED})",
            f"Give the directory of the repository, such as {path.parent}",
            f"Write the data as .jsonl, one JSON object a line: {RecordFormat.TEXT}",
        )
    if not os.access(path, os.R_OK):
        _refuse(purpose, given, "the file cannot be read by this user")
    if status.st_size > MAX_JSONL_BYTES:
        raise DataError(
            f"{path} has {status.st_size / 1e9:.1f} GB; a .jsonl file may have {MAX_JSONL_BYTES / 1e9:.0f} GB.",
            code="too_large",
            suggestions=("Give a part of it: a LoRA adapter learns from thousands of examples, not from millions",),
        )
    return SourceKind.JSONL, path


def _found(given: str, purpose: DatasetPurpose) -> tuple[Path, os.stat_result]:
    if given.lstrip()[:1] in ("[", "{"):
        _refuse(purpose, given, "records are given as a list, not as a text that holds one")
    if not given.strip() or "\0" in given:
        _refuse(purpose, given, f"it must be {ALLOWED}")
    try:
        path = Path(given).expanduser().absolute()
    except RuntimeError:
        _refuse(purpose, given, "that user has no home directory here; give an absolute path")
    try:
        return path, path.stat()
    except (FileNotFoundError, NotADirectoryError):
        _refuse(purpose, given, f"there is no such file or directory; it must be {ALLOWED}", *_similar(path))
    except (OSError, ValueError) as error:
        _refuse(purpose, given, f"it cannot be read ({getattr(error, 'strerror', None) or error})")


def _refuse(purpose: DatasetPurpose, given: str, allowed: str, *suggestions: str) -> NoReturn:
    raise InvalidArgument(purpose.field, given, allowed, suggestions=suggestions)


def _similar(path: Path) -> list[str]:
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ["Give an absolute path"]
    close = difflib.get_close_matches(path.name, names[:5_000], n=1)
    return [f"Did you mean {path.parent / close[0]}?"] if close else ["Give an absolute path"]


def _repository(root: Path, max_length: int, purpose: DatasetPurpose) -> SourceSummary:
    tree = walk(root)
    if not tree.files:
        raise DataError(
            f"{root} holds no file with code. Left out: {describe_exclusions(tree.left_out)}.",
            code="no_code",
            suggestions=(
                "Give the directory that holds the source files",
                f"For data that is not code, give a .jsonl file, {FORMS}",
            ),
            details={"left_out": dict(tree.left_out)},
        )
    _probe(tree.files, tree.left_out, root, max_length, purpose)
    size = sum(file.size * (_MARKDOWN_CODE if file.language.name == "markdown" else 1) for file in tree.files)
    return SourceSummary(
        kind=SourceKind.REPOSITORY,
        path=root,
        files=len(tree.files),
        examples=None,
        estimated_tokens=round(size / BYTES_PER_TOKEN),
        languages=dict(Counter(file.language.name for file in tree.files).most_common()),
        left_out=dict(tree.left_out),
    )


def _probe(files: Sequence[File], left_out: Counter[str], root: Path, max_length: int, purpose: DatasetPurpose) -> None:
    """Cut files until there is certainly enough; refuse only when all of them were cut and it is not."""
    keys: list[ExampleKey] = []
    signatures = MinHashIndex()
    missed = Counter(left_out)
    token_counter = EstimatedTokenCounter()
    cut_bytes = 0
    for number, file in enumerate(sorted(files, key=lambda file: (file.size < _PROBE_SMALLEST, file.size, file.name))):
        if number >= _PROBE_FILES or cut_bytes > _PROBE_BYTES:
            return
        result = examples_from_file(file, token_counter=token_counter, max_length=max_length, redact=unchanged)
        cut_bytes += file.size
        missed.update(result.left_out)
        for example in result.examples:
            keys.append(ExampleKey(example.path, digest(example.segments[-1].text), example.tokens))
            signatures.add(example.segments[-1].text)
        if len(keys) >= purpose.min_examples:
            examples, sources = count_distinct(with_canonical_digests(keys, signatures))
            if examples >= purpose.min_examples and sources >= purpose.min_files:
                return
    require_enough_examples(with_canonical_digests(keys, signatures), missed, str(root), purpose)


def summarise_records(
    kind: SourceKind,
    path: Path | None,
    records: Iterable[Record],
    max_length: int,
    purpose: DatasetPurpose,
) -> SourceSummary:
    """What records hold. `path`: the file or table that they are from."""
    count = characters = 0
    form: RecordFormat | None = None
    languages: Counter[str] = Counter()
    files: set[str] = set()
    keys: list[ExampleKey] = []
    for record in records:
        count += 1
        form = record.form
        characters += len(record.content.encode())
        file = record.path or record.name
        if file not in files:
            files.add(file)
            languages[record.language] += 1
        if len(keys) < 50 * purpose.min_examples:  # enough to see that there is enough
            keys += _expected(record, file, max_length, purpose)
    where = str(path or purpose.field)
    if form is None:
        raise DataError(
            f"{where} holds no record.",
            code="training_data_empty",
            suggestions=(f"Give at least {purpose.min_examples} records, each {FORMS}",),
        )
    require_enough_examples(keys, {}, where, purpose)
    return SourceSummary(
        kind=kind,
        path=path,
        files=len(files),
        examples=count,
        estimated_tokens=round(characters / BYTES_PER_TOKEN),
        languages=dict(languages.most_common()),
        left_out={},
        needs_chat_template=form is RecordFormat.MESSAGES,
    )


def _expected(record: Record, file: str, max_length: int, purpose: DatasetPurpose) -> list[ExampleKey]:
    """The examples a record will become: one, or as many as a long text is split into."""
    whole = digest(record.content)
    parts = 1
    if record.form in (RecordFormat.TEXT, RecordFormat.CHUNK):
        parts = min(purpose.min_examples, 1 + int(len(record.content) / BYTES_PER_TOKEN / max_length))
    return [ExampleKey(file, whole + bytes([part]), 1) for part in range(parts)]


def _many(count: int, one: str, several: str = "") -> str:
    return f"{count} {one if count == 1 else several or one + 's'}"
