"""Source to dataset: cut, cleaned, split into a part to train on and a part to measure on, all of it recorded.

1. Every file or record becomes examples, spooled to disk as they come; in memory stays a key of each.
2. The keys decide: duplicates go, whole files are held out.
3. The spool is read once more into train.jsonl and held_out.jsonl.
4. manifest.json is written last. Where it exists already for the same request, the dataset is taken as it is: a job that
   is resumed trains on what it began with, whatever has become of the repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from peft_core.data import git
from peft_core.data.classify import Reason
from peft_core.data.codec import Codec
from peft_core.data.examples import Yield, from_file, from_record
from peft_core.data.records import Record, read_jsonl
from peft_core.data.secret_scan import redacted
from peft_core.data.source import require_enough
from peft_core.data.split import Key, Split, digest, split
from peft_core.data.walk import walk
from peft_core.errors import DataError
from peft_core.places import require_data_place
from peft_core.spec import DatasetSummary, Frozen

SourceKind = Literal["repository", "jsonl", "records"]
_MANIFEST_SCHEMA = 1
_REPORT_EVERY_S = 0.5


class PreparedDataset(Frozen):
    summary: DatasetSummary
    languages: dict[str, int]  # files by language
    repository_commit: str | None = None
    repository_dirty: bool | None = None


@dataclass(slots=True)
class _Found:
    """What stays in memory of the examples that were spooled."""

    keys: list[Key] = field(default_factory=list)
    sorts: list[tuple[str, str]] = field(default_factory=list)  # language and kind of each
    left_out: Counter[str] = field(default_factory=Counter)
    secrets: list[tuple[str, int, str]] = field(default_factory=list)
    commit: str | None = None
    dirty: bool | None = None


def prepare(
    *,
    source: Path,
    source_kind: SourceKind,
    directory: Path,
    codec: Codec,
    max_length: int,
    held_out_fraction: float,
    seed: int,
    report: Callable[[str], None],
) -> PreparedDataset:
    """Write train.jsonl, held_out.jsonl and manifest.json into the directory.

    Raises:
        DataError: too little to split, a broken record, or a source that is gone.
    """
    request = {
        "source": os.fspath(source),
        "source_kind": source_kind,
        "max_length": max_length,
        "held_out_fraction": held_out_fraction,
        "seed": seed,
    }
    if (done := _finished(directory, request)) is not None:
        return done
    if source_kind != "records":  # once more: a link on the way may lead elsewhere by now
        require_data_place(source, data_dir=directory, allowed_roots=None)
    if not source.exists():
        raise DataError(
            f"{source} is not there any more.",
            code="training_data_gone",
            suggestions=("Call train_adapter again with the present place of the training data",),
        )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").unlink(missing_ok=True)
    spool = directory / "examples.partial"
    try:
        found = _spool(source, source_kind, spool, codec=codec, max_length=max_length, progress=_Progress(report))
        require_enough(found.keys, found.left_out, str(source) if source_kind != "records" else "training_data")
        parts = split(found.keys, held_out_fraction=held_out_fraction, seed=seed)
        found.left_out[Reason.DUPLICATE] += parts.duplicates
        sha256 = _write_parts(spool, directory, parts)
    finally:
        spool.unlink(missing_ok=True)
    prepared = _prepared(found, parts, sha256)
    _write_manifest(directory / "manifest.json", request, prepared, found, parts)
    return prepared


def _spool(
    source: Path, source_kind: SourceKind, spool: Path, *, codec: Codec, max_length: int, progress: _Progress
) -> _Found:
    found = _Found()
    if source_kind == "repository":
        yields = _from_repository(source, found, codec, max_length, progress)
    else:
        yields = _from_records(source, source_kind, codec, max_length, progress)
    with spool.open("w", encoding="utf-8", newline="\n") as stream:
        for result in yields:
            found.left_out.update(result.left_out)
            found.secrets += result.secrets
            for example in result.examples:
                stream.write(example.model_dump_json() + "\n")
                learned = "\0".join(segment.text for segment in example.segments if segment.learn)
                given = (
                    "" if source_kind == "repository" else "\0".join(s.text for s in example.segments if not s.learn)
                )
                found.keys.append(Key(example.path, digest(f"{given}\0{learned}"), example.tokens))
                found.sorts.append((example.language, example.kind))
    return found


def _from_repository(root: Path, found: _Found, codec: Codec, max_length: int, progress: _Progress) -> Iterator[Yield]:
    tree = walk(root)
    found.left_out.update(tree.left_out)
    if tree.by_git:
        found.commit, found.dirty = git.state(root)
    for number, file in enumerate(tree.files):
        progress(f"{number} of {len(tree.files)} files")
        yield from_file(file, codec=codec, max_length=max_length, redact=redacted)


def _from_records(
    path: Path, source_kind: SourceKind, codec: Codec, max_length: int, progress: _Progress
) -> Iterator[Yield]:
    called = "line" if source_kind == "jsonl" else "record"
    root = _common_root(read_jsonl(path, called=called))
    for number, record in enumerate(read_jsonl(path, called=called)):
        progress(f"{number} records")
        yield from_record(record, codec=codec, max_length=max_length, redact=redacted, root=root)


def _common_root(records: Iterator[Record]) -> str:
    """What all absolute paths of the records begin with; decided by the first record, for most sources have none."""
    root = ""
    for record in records:
        if record.path.startswith("/"):
            parent = os.path.dirname(record.path)  # noqa: PTH120 - a path of someone else's machine
            root = os.path.commonpath([root, parent]) if root else parent
        elif not root:
            break
    return root


def _write_parts(spool: Path, directory: Path, parts: Split) -> str:
    """The spooled lines into their files; the hash of all of them, trained on first."""
    place = dict.fromkeys(parts.train, "train") | dict.fromkeys(parts.held_out, "held_out")
    hashes = {name: hashlib.sha256() for name in ("train", "held_out")}
    partial = {name: directory / f"{name}.partial" for name in hashes}
    with spool.open("rb") as lines, partial["train"].open("wb") as train, partial["held_out"].open("wb") as held_out:
        streams = {"train": train, "held_out": held_out}
        for position, line in enumerate(lines):
            if (name := place.get(position)) is not None:
                streams[name].write(line)
                hashes[name].update(line)
    for name, path in partial.items():
        path.replace(directory / f"{name}.jsonl")
    return hashlib.sha256(hashes["train"].digest() + hashes["held_out"].digest()).hexdigest()


def _prepared(found: _Found, parts: Split, sha256: str) -> PreparedDataset:
    kept = [*parts.train, *parts.held_out]
    language_of = {found.keys[position].file: found.sorts[position][0] for position in kept}
    return PreparedDataset(
        summary=DatasetSummary(
            train_examples=len(parts.train),
            held_out_examples=len(parts.held_out),
            train_tokens=sum(found.keys[position].tokens for position in parts.train),
            held_out_tokens=sum(found.keys[position].tokens for position in parts.held_out),
            files=len(language_of),
            left_out={reason: count for reason, count in sorted(found.left_out.items()) if count},
            secrets_removed=len(found.secrets),
            sha256=sha256,
        ),
        languages=dict(Counter(language_of.values()).most_common()),
        repository_commit=found.commit,
        repository_dirty=found.dirty,
    )


def _write_manifest(
    path: Path, request: dict[str, Any], prepared: PreparedDataset, found: _Found, parts: Split
) -> None:
    kept = [found.sorts[position] for position in (*parts.train, *parts.held_out)]
    manifest = {
        "schema": _MANIFEST_SCHEMA,
        "request": request,
        "dataset": prepared.model_dump(mode="json"),
        "examples_by_language": dict(Counter(language for language, _ in kept).most_common()),
        "examples_by_kind": dict(Counter(kind for _, kind in kept).most_common()),
        "held_out_files": parts.held_out_files,
        "secrets": [{"file": file, "line": line, "type": kind} for file, line, kind in found.secrets],
    }
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(manifest, stream, indent=1, ensure_ascii=False)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def _finished(directory: Path, request: dict[str, Any]) -> PreparedDataset | None:
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        if manifest["schema"] != _MANIFEST_SCHEMA or manifest["request"] != request:
            return None
        if not all((directory / f"{name}.jsonl").is_file() for name in ("train", "held_out")):
            return None
        return PreparedDataset.model_validate(manifest["dataset"])
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        return None


class _Progress:
    """Passes on the first word and then at most two a second."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._next = 0.0

    def __call__(self, detail: str) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _REPORT_EVERY_S
            self._report(detail)
