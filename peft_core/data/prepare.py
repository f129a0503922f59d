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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from peft_core.data import git
from peft_core.data.classify import Reason
from peft_core.data.codec import Codec
from peft_core.data.examples import Yield, from_file, from_record, may_be_like_others, printable
from peft_core.data.history import last_changes
from peft_core.data.near import RULE, Signatures
from peft_core.data.records import Record, read_jsonl
from peft_core.data.retell import Told, require_means, retell
from peft_core.data.secret_scan import redacted
from peft_core.data.source import require_enough
from peft_core.data.split import FILE_MIN_TOKENS, FILE_SHARE, Key, Split, capped, digest, drawn, merged, split
from peft_core.data.walk import File, walk
from peft_core.errors import DataError
from peft_core.places import require_data_place
from peft_core.spec import DatasetSummary, Example, Frozen, Mixture

SourceKind = Literal["repository", "jsonl", "records"]
_MANIFEST_SCHEMA = 1
_PLAIN = Mixture()
_REPORT_EVERY_S = 0.5
_SPARE = 1.5  # times as many examples as a run needs: some of them will be near duplicates of others
# However short the run, what it sees is drawn from so many: from all of a code base that is not huge. Ten seconds of reading.
_AT_LEAST = 10_000


class PreparedDataset(Frozen):
    summary: DatasetSummary
    languages: dict[str, int]  # files by language
    repository_commit: str | None = None
    repository_dirty: bool | None = None


@dataclass(slots=True)
class _Found:
    """What stays in memory of the examples that were spooled."""

    keys: list[Key] = field(default_factory=list)
    distinct: set[bytes] = field(default_factory=set)
    signatures: Signatures = field(default_factory=Signatures)
    sorts: list[tuple[str, str]] = field(default_factory=list)  # language and kind of each
    left_out: Counter[str] = field(default_factory=Counter)
    secrets: list[tuple[str, int, str]] = field(default_factory=list)
    commit: str | None = None
    dirty: bool | None = None

    def take(self, example: Example, source_kind: SourceKind) -> None:
        learned = "\0".join(segment.text for segment in example.segments if segment.learn)
        given = "" if source_kind == "repository" else "\0".join(s.text for s in example.segments if not s.learn)
        self.keys.append(Key(example.path, digest(f"{given}\0{learned}"), example.tokens))
        self.distinct.add(self.keys[-1].digest)
        self.signatures.add(learned if may_be_like_others(example) else None)
        self.sorts.append((example.language, example.kind))


@dataclass(frozen=True, slots=True)
class Draw:
    """How many examples are enough, and in which order files are read to find them."""

    enough: int | None
    seed: int

    def order(self, files: Sequence[File]) -> Sequence[File]:
        if self.enough is None:
            return files
        return sorted(files, key=lambda file: drawn(file.name, self.seed))


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
    enough_examples: int | None = None,
    held_out_by: Literal["file", "time"] = "file",
    mixture: Mixture = _PLAIN,
) -> PreparedDataset:
    """Write train.jsonl, held_out.jsonl and manifest.json into the directory.

    `enough_examples`: more than so many are not trained on. Of a repository whole files are then read in an order drawn by lot
    until there are enough, ten thousand at least: twenty thousand files need not be cut for a run of a hundred steps.

    Raises:
        DataError: too little to split, a broken record, a source that is gone, or a base without tokens for the mixture.
    """
    request = {
        "source": os.fspath(source),
        "source_kind": source_kind,
        "max_length": max_length,
        "held_out_fraction": held_out_fraction,
        "seed": seed,
        "enough_examples": enough_examples,
        "held_out_by": held_out_by,
        "mixture": mixture.model_dump(),
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
    require_means(mixture, codec)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").unlink(missing_ok=True)
    spool = directory / "examples.partial"
    try:
        changed: dict[str, int] | None = None
        if held_out_by == "time" and source_kind == "repository":
            changed = {printable(name): at for name, at in last_changes(source).items()}
        enough = enough_examples if changed is None else None  # the newest may be anywhere
        if enough is not None:
            enough = max(_AT_LEAST, round(_SPARE * enough / (1 - held_out_fraction)))
        draw = Draw(enough, seed)
        found = _spool(
            source, source_kind, spool, codec=codec, max_length=max_length, draw=draw, progress=_Progress(report)
        )
        where = str(source) if source_kind != "records" else "training_data"
        require_enough(merged(found.keys, found.signatures), found.left_out, where)
        parts = split(found.keys, found.signatures, held_out_fraction=held_out_fraction, seed=seed, changed=changed)
        if source_kind == "repository":
            train = capped(found.keys, parts.train)
            found.left_out[Reason.OVER_FILE_SHARE] += len(parts.train) - len(train)
            parts = replace(parts, train=train)
        found.left_out[Reason.DUPLICATE] += parts.duplicates
        found.left_out[Reason.NEAR_DUPLICATE] += parts.near_duplicates
        written = _write_parts(
            spool, directory, parts, partial(retell, mixture=mixture, codec=codec, max_length=max_length, seed=seed)
        )
    finally:
        spool.unlink(missing_ok=True)
    prepared = _prepared(found, parts, written)
    _write_manifest(directory / "manifest.json", request, prepared, found, parts)
    return prepared


def _spool(
    source: Path,
    source_kind: SourceKind,
    spool: Path,
    *,
    codec: Codec,
    max_length: int,
    draw: Draw,
    progress: _Progress,
) -> _Found:
    found = _Found()
    if source_kind == "repository":
        yields = _from_repository(source, found, codec=codec, max_length=max_length, draw=draw, progress=progress)
    else:
        yields = _from_records(source, source_kind, codec, max_length, progress)
    with spool.open("w", encoding="utf-8", newline="\n") as stream:
        for result in yields:
            found.left_out.update(result.left_out)
            found.secrets += result.secrets
            for example in result.examples:
                stream.write(example.model_dump_json() + "\n")
                found.take(example, source_kind)
    return found


def _from_repository(
    root: Path, found: _Found, *, codec: Codec, max_length: int, draw: Draw, progress: _Progress
) -> Iterator[Yield]:
    tree = walk(root)
    found.left_out.update(tree.left_out)
    if tree.by_git:
        found.commit, found.dirty = git.state(root)
    for number, file in enumerate(draw.order(tree.files)):
        if draw.enough is not None and len(found.distinct) >= draw.enough:
            found.left_out[Reason.NOT_NEEDED] += len(tree.files) - number
            return
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


@dataclass(slots=True)
class _Written:
    """What went into the two files."""

    sha256: str = ""  # of all lines, those to train on first
    tokens: Counter[str] = field(default_factory=Counter)  # by part
    told: Counter[Told] = field(default_factory=Counter)  # to train on


def _write_parts(
    spool: Path, directory: Path, parts: Split, retold: Callable[[Example], tuple[Example, Told]]
) -> _Written:
    """The spooled examples into their files, those to train on as the mixture tells them."""
    place = dict.fromkeys(parts.train, "train") | dict.fromkeys(parts.held_out, "held_out")
    hashes = {name: hashlib.sha256() for name in ("train", "held_out")}
    unfinished = {name: directory / f"{name}.partial" for name in hashes}
    written = _Written()
    with (
        spool.open("rb") as lines,
        unfinished["train"].open("wb") as train,
        unfinished["held_out"].open("wb") as held_out,
    ):
        streams = {"train": train, "held_out": held_out}
        for position, line in enumerate(lines):
            if (name := place.get(position)) is None:
                continue
            example, told = Example.model_validate_json(line), Told.PLAINLY
            if name == "train":
                example, told = retold(example)
                written.told[told] += 1
            row = line if told is Told.PLAINLY else example.model_dump_json().encode() + b"\n"
            written.tokens[name] += example.tokens
            streams[name].write(row)
            hashes[name].update(row)
    for name, path in unfinished.items():
        path.replace(directory / f"{name}.jsonl")
    written.sha256 = hashlib.sha256(hashes["train"].digest() + hashes["held_out"].digest()).hexdigest()
    return written


def _prepared(found: _Found, parts: Split, written: _Written) -> PreparedDataset:
    kept = [*parts.train, *parts.held_out]
    language_of = {found.keys[position].file: found.sorts[position][0] for position in kept}
    return PreparedDataset(
        summary=DatasetSummary(
            train_examples=len(parts.train),
            held_out_examples=len(parts.held_out),
            train_tokens=written.tokens["train"],
            held_out_tokens=written.tokens["held_out"],
            files=len(language_of),
            left_out={reason: count for reason, count in sorted(found.left_out.items()) if count},
            secrets_removed=len(found.secrets),
            told=dict(sorted(written.told.items())),
            sha256=written.sha256,
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
        "file_cap": {"share_of_tokens": FILE_SHARE, "but_tokens_at_least": FILE_MIN_TOKENS},
        "near_duplicates": {"rule": RULE, "held_out_but_seen_in_training": parts.seen_in_training},
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
