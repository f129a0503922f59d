"""Source to dataset: cut, cleaned, split into a part to train on and a part to measure on, all of it recorded.

1. Every file or record becomes examples, spooled to disk as they come; in memory stays a key of each.
2. The keys decide: duplicates go, whole files are held out, and nothing of them that is trained on elsewhere.
3. The spool is read once more into the files of the dataset.
4. Its manifest is written last. Where it exists already for the same request, the dataset is taken as it is: a job that
   is resumed trains on what it began with, whatever has become of the repository.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from peft_core.data import git
from peft_core.data.augment import reformat_example, require_fim_tokens
from peft_core.data.dataset import PreparedDataset, WriteStats, finished, write_manifest, write_parts
from peft_core.data.examples import FileResult, answer, from_file, from_record, is_dedupable, learned_text, printable
from peft_core.data.git import last_changes
from peft_core.data.leakage import SEEN, TrainingFingerprint, remove_overlap
from peft_core.data.minhash import RULE, MinHashIndex
from peft_core.data.records import Record, read_jsonl
from peft_core.data.secrets import redacted
from peft_core.data.split import (
    FILE_MIN_TOKENS,
    FILE_SHARE,
    ExampleKey,
    Split,
    cap_per_file,
    digest,
    merged,
    order_key,
    split,
)
from peft_core.data.summarise import require_enough
from peft_core.data.token_counter import TokenCounter
from peft_core.data.walk import File, Reason, walk
from peft_core.errors import DataError
from peft_core.schemas.dataset import TRAINING, DatasetSummary, Example, Purpose
from peft_core.schemas.training import TaskMixture

SourceKind = Literal["repository", "jsonl", "records"]
_PLAIN = TaskMixture()
_REPORT_EVERY_S = 0.5
_SPARE = 1.5  # times as many examples as a run needs: some of them will be near duplicates of others
# However short the run, what it sees is drawn from so many: from all of a code base that is not huge. Ten seconds of reading.
_AT_LEAST = 10_000


@dataclass(slots=True)
class DatasetBuilder:
    """What stays in memory of the examples that were spooled."""

    known: TrainingFingerprint | None = None  # what was trained on before, and is not measured on
    keys: list[ExampleKey] = field(default_factory=list)
    distinct: set[bytes] = field(default_factory=set)
    signatures: MinHashIndex = field(default_factory=MinHashIndex)
    sorts: list[tuple[str, str]] = field(default_factory=list)  # language and kind of each
    left_out: Counter[str] = field(default_factory=Counter)
    secrets: list[tuple[str, int, str]] = field(default_factory=list)
    commit: str | None = None
    dirty: bool | None = None

    def takes(self, example: Example, source_kind: SourceKind) -> bool:
        """Whether it is one to be spooled; then it is remembered."""
        share = 0.0 if self.known is None else self.known.share_of(learned_text(example))
        if share is None or share >= SEEN:
            self.left_out[Reason.MAYBE_TRAINED_ON if share is None else Reason.TRAINED_ON] += 1
            return False
        learned = "\0".join(segment.text for segment in example.segments if segment.learn)
        given = "" if source_kind == "repository" else "\0".join(s.text for s in example.segments if not s.learn)
        said = answer(example)
        same_side = b"" if said is None else digest(said)
        self.keys.append(ExampleKey(example.path, digest(f"{given}\0{learned}"), example.tokens, same_side))
        self.distinct.add(self.keys[-1].digest)
        self.signatures.add(learned if is_dedupable(example) else None)
        self.sorts.append((example.language, example.kind))
        return True


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How many examples are enough, and in which order files are read to find them."""

    enough: int | None
    seed: int

    def order(self, files: Sequence[File]) -> Sequence[File]:
        if self.enough is None:
            return files
        return sorted(files, key=lambda file: order_key(file.name, self.seed))


def prepare(
    *,
    source: Path,
    source_kind: SourceKind,
    directory: Path,
    codec: TokenCounter,
    max_length: int,
    held_out_fraction: float,
    seed: int,
    report: Callable[[str], None],
    enough_examples: int | None = None,
    held_out_by: Literal["file", "time"] = "file",
    mixture: TaskMixture = _PLAIN,
    purpose: Purpose = TRAINING,
    known: TrainingFingerprint | None = None,
    may_read: Callable[[Path], None] = lambda _source: None,
) -> PreparedDataset:
    """Write train.jsonl, held_out.jsonl, trained_on.bin and manifest.json into the directory.

    `enough_examples`: more than so many are not trained on. Of a repository whole files are then read in an order drawn by lot
    until there are enough, ten thousand at least: twenty thousand files need not be cut for a run of a hundred steps.
    `known`: what was trained on before is left out, before anything is chosen to be measured on. `may_read` raises where the
    source may not be read.

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
        "purpose": purpose.field,
        "known": None if known is None else hashlib.sha256(known.to_bytes()).hexdigest(),
    }
    if (done := finished(directory, request)) is not None:
        return done
    if source_kind != "records":  # once more: a link on the way may lead elsewhere by now
        may_read(source)
    if not source.exists():
        raise DataError(
            f"{source} is not there any more.",
            code="training_data_gone",
            suggestions=(f"Call {purpose.tool} again with its present place",),
        )
    require_fim_tokens(mixture, codec)
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
        draw = SamplingPlan(enough, seed)
        found = DatasetBuilder(known)
        progress = _Progress(report)
        _spool(source, source_kind, spool, found, codec=codec, max_length=max_length, draw=draw, progress=progress)
        where = str(source) if source_kind != "records" else purpose.field
        if purpose.trains:  # who measures says what was trained on
            require_enough(merged(found.keys, found.signatures), found.left_out, where)
        parts = split(
            found.keys,
            found.signatures,
            held_out_fraction=held_out_fraction,
            seed=seed,
            changed=changed,
            purpose=purpose,
        )
        if source_kind == "repository" and purpose.trains:
            train = cap_per_file(found.keys, parts.train)
            found.left_out[Reason.OVER_FILE_SHARE] += len(parts.train) - len(train)
            parts = replace(parts, train=train)
        if purpose.trains:
            parts = remove_overlap(parts, spool)
        found.left_out[Reason.SEEN_IN_TRAINING] += parts.seen_as_lines
        found.left_out[Reason.DUPLICATE] += parts.duplicates
        found.left_out[Reason.NEAR_DUPLICATE] += parts.near_duplicates
        written = write_parts(
            spool,
            directory,
            parts,
            partial(reformat_example, mixture=mixture, codec=codec, max_length=max_length, seed=seed),
        )
    finally:
        spool.unlink(missing_ok=True)
    prepared = _prepared(found, parts, written)
    write_manifest(directory, request, prepared, _told(found, parts))
    return prepared


def _spool(
    source: Path,
    source_kind: SourceKind,
    spool: Path,
    found: DatasetBuilder,
    *,
    codec: TokenCounter,
    max_length: int,
    draw: SamplingPlan,
    progress: _Progress,
) -> None:
    if source_kind == "repository":
        yields = _from_repository(source, found, codec=codec, max_length=max_length, draw=draw, progress=progress)
    else:
        yields = _from_records(source, source_kind, codec, max_length, progress)
    with spool.open("w", encoding="utf-8", newline="\n") as stream:
        for result in yields:
            found.left_out.update(result.left_out)
            found.secrets += result.secrets
            for example in result.examples:
                if found.takes(example, source_kind):
                    stream.write(example.model_dump_json() + "\n")


def _from_repository(
    root: Path,
    found: DatasetBuilder,
    *,
    codec: TokenCounter,
    max_length: int,
    draw: SamplingPlan,
    progress: _Progress,
) -> Iterator[FileResult]:
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
    path: Path,
    source_kind: SourceKind,
    codec: TokenCounter,
    max_length: int,
    progress: _Progress,
) -> Iterator[FileResult]:
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


def _prepared(found: DatasetBuilder, parts: Split, written: WriteStats) -> PreparedDataset:
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


def _told(found: DatasetBuilder, parts: Split) -> dict[str, Any]:
    """What the manifest tells beside the figures: the rules, and how they came out."""
    kept = [found.sorts[position] for position in (*parts.train, *parts.held_out)]
    return {
        "examples_by_language": dict(Counter(language for language, _ in kept).most_common()),
        "examples_by_kind": dict(Counter(kind for _, kind in kept).most_common()),
        "held_out_files": parts.held_out_files,
        "file_cap": {"share_of_tokens": FILE_SHARE, "but_tokens_at_least": FILE_MIN_TOKENS},
        "near_duplicates": {"rule": RULE, "held_out_but_seen_in_training": parts.seen_in_training},
        "remove_overlap": {"rule": f"less than {SEEN:g} of the runs of three lines are trained on"},
        "secrets": [{"file": file, "line": line, "type": kind} for file, line, kind in found.secrets],
    }


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
