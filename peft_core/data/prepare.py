"""Prepare a dataset: cut the source into examples, clean them, split off a held-out set, and record everything.

1. Every file or record becomes examples, which are spooled to disk as they are made; only a key of each stays in memory.
2. The keys decide: duplicates are removed, whole files are held out, and held-out examples that overlap the training set
   are dropped.
3. The spool is read once more and written into the files of the dataset.
4. The manifest is written last. If it already exists for an equal spec, the dataset is reused: a resumed job trains on the
   data that it started with, even if the repository has changed since.
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
from typing import Any, TextIO

from peft_core.data import git
from peft_core.data.augment import reformat_example, require_fim_tokens
from peft_core.data.catch_up import FileChanges, Novelty, ParentData, split_for_catch_up
from peft_core.data.code_names import NameCollector
from peft_core.data.dataset import (
    PreparedDataset,
    WriteStats,
    load_finished,
    read_examples,
    write_examples,
    write_manifest,
)
from peft_core.data.examples import (
    FileResult,
    examples_from_file,
    examples_from_record,
    is_dedupable,
    learned_answer,
    learned_text,
    printable_path,
)
from peft_core.data.exclusions import ExclusionReason, Exclusions
from peft_core.data.git import last_change_times
from peft_core.data.held_out_files import write_held_out_files
from peft_core.data.leakage import OVERLAP_THRESHOLD, TrainingFingerprint, remove_overlap, why_excluded
from peft_core.data.minhash import NEAR_DUPLICATE_RULE, MinHashIndex
from peft_core.data.records import Notes, Record, read_copy, read_file
from peft_core.data.secrets import redact_secrets
from peft_core.data.selection import Selection
from peft_core.data.snapshot import (
    SNAPSHOT_FILE_NAME,
    FileState,
    Snapshot,
    SourceState,
    state_of,
    take_snapshot,
    write_snapshot,
)
from peft_core.data.sources import walk_sources
from peft_core.data.split import (
    FILE_MIN_TOKENS,
    FILE_SHARE,
    ExampleKey,
    Split,
    advice_on_records,
    cap_per_file,
    digest,
    order_key,
    require_enough_examples,
    split,
    with_canonical_digests,
)
from peft_core.data.study.index import index_files
from peft_core.data.study.items import StudyItems
from peft_core.data.token_counter import TokenCounter
from peft_core.data.walk import File
from peft_core.errors import DataError
from peft_core.schemas.dataset import (
    DatasetPurpose,
    DatasetSpec,
    DatasetSummary,
    DataSource,
    Example,
    RepositoryState,
    SourceKind,
)

_REPORT_EVERY_S = 0.5
_OVERSAMPLING = 1.5  # times as many examples are read as a run needs, since some turn out to be near duplicates
# A short run still samples from this many examples, which is all of a code base of ordinary size. Reading takes ten seconds.
_MIN_SAMPLED_EXAMPLES = 10_000


def prepare(
    spec: DatasetSpec,
    *,
    directory: Path,
    token_counter: TokenCounter,
    report: Callable[[str], None],
    known: Sequence[TrainingFingerprint | None] = (),
    parent: ParentData | None = None,
    may_read: Callable[[Path], None] = lambda _source: None,
) -> PreparedDataset:
    """Write the files of a dataset, which `dataset.py` lists, into the directory.

    Examples in `known`, the texts that the evaluated adapters were trained on, are excluded before anything is selected.
    `parent`: what the adapter that the training continues from records, if `spec.catch_up` is set.
    `may_read` raises if the source must not be read.

    Raises:
        DataError: too little data to split, a broken record, a missing source, or a base model without FIM tokens.
    """
    request = spec.model_dump(mode="json")
    request["known"] = [each and hashlib.sha256(each.to_bytes()).hexdigest() for each in known] or None
    if parent is not None:
        request["parent"] = parent.key
    if (done := load_finished(directory, request)) is not None:
        return done
    _require_source(spec, may_read)
    require_fim_tokens(spec.mixture, token_counter)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").unlink(missing_ok=True)
    spool = directory / "examples.partial"
    builder = DatasetBuilder(spec, token_counter, _Progress(report), known, parent)
    reformat = partial(
        reformat_example, mixture=spec.mixture, token_counter=token_counter, max_length=spec.max_length, seed=spec.seed
    )
    try:
        builder.fill(spool)
        # kill-point: worker: the data are spooled
        parts = builder.split(spool)
        written = write_examples(
            spool, directory, parts, reformat, before=None if parent is None else parent.fingerprint
        )
        # kill-point: worker: the data are split, without a manifest
    finally:
        spool.unlink(missing_ok=True)
    held_out = read_examples(directory / "held_out.jsonl")
    if builder.files:
        write_held_out_files(directory, builder.files, held_out, builder.names)
    if spec.purpose is DatasetPurpose.TRAINING:
        write_snapshot(directory / SNAPSHOT_FILE_NAME, builder.snapshot(parts, held_out))
    prepared = builder.summarise(parts, written)
    write_manifest(directory, request, prepared, builder.details(parts))
    return prepared


def _require_source(spec: DatasetSpec, may_read: Callable[[Path], None]) -> None:
    for source in spec.sources:
        if source.kind is not SourceKind.RECORDS:  # checked again: a symbolic link may lead elsewhere by now
            may_read(source.path)
        if not source.path.exists():
            raise DataError(
                f"{source.path} does not exist any more.",
                code="training_data_gone",
                suggestions=(f"Call {spec.purpose.tool} again with its current path",),
            )


@dataclass(slots=True)
class DatasetBuilder:
    """Spools the examples of a source and keeps in memory only what the split needs to know about each."""

    spec: DatasetSpec
    token_counter: TokenCounter
    progress: _Progress
    known: Sequence[TrainingFingerprint | None]
    parent: ParentData | None = None
    novelty: list[Novelty] = field(default_factory=list)  # of each example, if there is a parent
    trained_on: set[int] = field(default_factory=set)  # positions of changed examples that it knows most of
    replayed: int = 0
    unknown_units: list[frozenset[str]] = field(default_factory=list)  # of each example, if there is a parent
    postponed: frozenset[int] = frozenset()  # positions of changed examples that are left to the next training
    trained_files: frozenset[str] = frozenset()  # if there is a parent: also those that only it was trained on
    keys: list[ExampleKey] = field(default_factory=list)
    distinct: set[bytes] = field(default_factory=set)
    signatures: MinHashIndex = field(default_factory=MinHashIndex)
    labels: list[tuple[str, str]] = field(default_factory=list)  # (language, kind) of each example
    left_out: Counter[str] = field(default_factory=Counter)
    not_read: Exclusions = field(default_factory=Exclusions)  # the files among them
    secrets: list[tuple[str, int, str]] = field(default_factory=list)
    _changes: FileChanges | None = None  # of the file that is being read, since the parent; None: records
    states: dict[str, RepositoryState] = field(default_factory=dict)  # by name of the source
    file_states: list[FileState] = field(default_factory=list)  # what the files of repositories were
    files: Sequence[File] = ()  # of repositories, in the order of their names
    names: NameCollector = field(default_factory=NameCollector)
    study: StudyItems | None = None  # set by the first study item

    @property
    def _repositories(self) -> list[DataSource]:
        return [source for source in self.spec.sources if source.kind is SourceKind.REPOSITORY]

    @property
    def _splits_by_time(self) -> bool:
        return self.spec.held_out_by == "time" and len(self._repositories) == len(self.spec.sources)

    @property
    def _trains(self) -> bool:
        return self.spec.purpose is DatasetPurpose.TRAINING

    # 1. Examples into the spool.

    def fill(self, spool: Path) -> None:
        with spool.open("w", encoding="utf-8", newline="\n") as stream:
            if repositories := self._repositories:
                self._spool(self._from_repositories(repositories), stream, is_code=True)
            self._changes = None
            for source in self.spec.sources:
                if source.kind is not SourceKind.REPOSITORY:
                    self._spool(self._from_records(source), stream, is_code=False)
            if self.study is not None:
                self.study.require_some()
                self.left_out.update({reason: len(found) for reason, found in self.study.dropped.items()})

    def _spool(self, results: Iterator[FileResult], stream: TextIO, *, is_code: bool) -> None:
        for result in results:
            self.left_out.update(result.left_out)
            self.secrets += result.secrets
            for example in result.examples:
                if self._add(example, is_code=is_code):
                    stream.write(example.model_dump_json() + "\n")

    def _from_repositories(self, repositories: Sequence[DataSource]) -> Iterator[FileResult]:
        found = walk_sources(repositories, Selection(self.spec.include, self.spec.exclude))
        self.files = found.files
        self.left_out.update(found.exclusions.reasons)
        self.not_read.update(found.exclusions)
        for source in found.by_git:
            commit, dirty = git.head_state(source.path)
            self.states[source.name] = RepositoryState(name=source.name, commit=commit, dirty=dirty)
        enough = self._enough()
        files = found.files if enough is None else sorted(found.files, key=self._random_order)
        for number, file in enumerate(files):
            if enough is not None and len(self.distinct) >= enough:
                self.left_out[ExclusionReason.NOT_NEEDED] += len(files) - number
                for unread in files[number:]:
                    self._record(unread, cut=False)
                return
            self.progress(f"{number} of {len(files)} files")
            self._record(file)  # before it is read: if it changes in between, it counts as changed later
            result = examples_from_file(
                file, token_counter=self.token_counter, max_length=self.spec.max_length, redact=redact_secrets
            )
            if result.not_read is not None:
                self.not_read.add(result.not_read, file.name)
            self.names.add(result.text)
            yield result

    def _record(self, file: File, *, cut: bool = True) -> None:
        if self._trains and (state := state_of(file, cut=cut)) is not None:
            self.file_states.append(state)
            if self.parent is not None:
                self._changes = self.parent.changes_in(file, state)

    def _enough(self) -> int | None:
        """Return how many distinct examples are read at most: a short run need not cut twenty thousand files."""
        if self.spec.enough_examples is None or self._splits_by_time:  # the newest files may be anywhere
            return None
        needed = _OVERSAMPLING * self.spec.enough_examples / (1 - self.spec.held_out_fraction)
        return max(_MIN_SAMPLED_EXAMPLES, round(needed))

    def _random_order(self, file: File) -> bytes:
        return order_key(file.name, self.spec.seed)

    def _from_records(self, source: DataSource) -> Iterator[FileResult]:
        root = _common_root(self._records(source, Notes()))
        notes = Notes()
        for number, record in enumerate(self._records(source, notes)):
            self.progress(f"{number} records")
            checked = self._checked(record)
            if checked is None:
                continue
            result = examples_from_record(
                checked,
                token_counter=self.token_counter,
                max_length=self.spec.max_length,
                redact=redact_secrets,
                root=root,
                skip=self.spec.skip_unusable_records,
            )
            if source.prefix and not checked.study:
                result.examples = [
                    example.model_copy(update={"path": f"{source.prefix}{example.path}"}) for example in result.examples
                ]
            yield result
        self.left_out.update(notes.counts())

    def _checked(self, record: Record) -> Record | None:
        """Return a record that may be used: of study items, those that suit the repositories beside them."""
        if not record.study or not self._trains:
            return record
        if self.study is None:
            self.progress("reading the names of the repository for the study items")
            self.study = StudyItems(index_files(self.files, [source.path for source in self._repositories]))
        return self.study.accept(record)

    def _records(self, source: DataSource, notes: Notes) -> Iterator[Record]:
        spec = self.spec
        if source.kind is SourceKind.RECORDS:
            return read_copy(source.path, skip=spec.skip_unusable_records, notes=notes)
        return read_file(source.path, max_length=spec.max_length, skip=spec.skip_unusable_records, notes=notes)

    def _add(self, example: Example, *, is_code: bool) -> bool:
        """Remember an example that is to be spooled. Return False for one that an adapter was trained on."""
        if self.known and (reason := why_excluded(learned_text(example), self.known)) is not None:
            self.left_out[reason] += 1
            return False
        learned = "\0".join(segment.text for segment in example.segments if segment.learn)
        context = "\0".join(segment.text for segment in example.segments if not segment.learn)
        if is_code:
            context = ""  # the path and the surrounding headers do not make a copied function a different one
        reply = learned_answer(example)
        same_side = b"" if reply is None else digest(reply)
        if self.parent is not None:
            self.novelty.append(self.parent.novelty(example, self._changes))
            self.unknown_units.append(self._changes.changed_in(example) if self._changes else frozenset())
            if self.novelty[-1] is Novelty.CHANGED and self.parent.was_trained_on(example):
                self.trained_on.add(len(self.keys))
        self.keys.append(ExampleKey(example.path, digest(f"{context}\0{learned}"), example.tokens, same_side))
        self.distinct.add(self.keys[-1].digest)
        self.signatures.add(learned if is_dedupable(example) else None)
        self.labels.append((example.language, example.kind))
        return True

    # 2. The split.

    def split(self, spool: Path) -> Split:
        """Decide which examples are trained on and which are held out, and count the rest.

        Raises:
            DataError: 'too_few_examples'.
        """
        spec = self.spec
        if self._trains:  # an evaluation counts its examples itself: it also knows how many the adapter was trained on
            name = spec.purpose.field if spec.source_kind is SourceKind.RECORDS else str(spec.source)
            is_repository = spec.source_kind is SourceKind.REPOSITORY
            advice = self.not_read.advice if is_repository else advice_on_records(self.left_out)
            require_enough_examples(
                with_canonical_digests(self.keys, self.signatures), self.left_out, name, advice=advice
            )
        parts = self._split_by_novelty() if self.parent is not None else self._split_by_file()
        if self._trains:
            parts = remove_overlap(parts, spool)
        self.left_out[ExclusionReason.SEEN_IN_TRAINING] += parts.removed_for_overlap
        self.left_out[ExclusionReason.DUPLICATE] += parts.duplicates
        self.left_out[ExclusionReason.NEAR_DUPLICATE] += parts.near_duplicates
        return parts

    def _split_by_file(self) -> Split:
        spec = self.spec
        parts = split(
            self.keys,
            self.signatures,
            held_out_fraction=spec.held_out_fraction,
            seed=spec.seed,
            changed=self._last_changes(),
            purpose=spec.purpose,
        )
        if self._trains and self._repositories:
            train = cap_per_file(self.keys, parts.train)
            self.left_out[ExclusionReason.OVER_FILE_SHARE] += len(parts.train) - len(train)
            parts = replace(parts, train=train)
        return parts

    def _split_by_novelty(self) -> Split:
        spec = self.spec
        assert self.parent is not None  # noqa: S101 -- for the type checker
        assert spec.catch_up is not None, "a parent comes with catch_up"  # noqa: S101 -- a caller's mistake
        chosen = split_for_catch_up(
            self.keys,
            self.signatures,
            self.novelty,
            parent=self.parent,
            trained_on=self.trained_on,
            spec=spec.catch_up,
            held_out_fraction=spec.held_out_fraction,
            seed=spec.seed,
        )
        self.replayed, self.trained_files = chosen.replayed, chosen.trained_files
        self.postponed = chosen.postponed
        self.left_out.update(chosen.left_out)
        return chosen.parts

    def _last_changes(self) -> dict[str, int] | None:
        if not self._splits_by_time:
            return None
        repositories = self._repositories
        all_times = last_change_times([source.path for source in repositories])
        return {
            printable_path(f"{source.prefix}{name}"): changed_at
            for source, times in zip(repositories, all_times, strict=True)
            for name, changed_at in times.items()
        }

    # 3. The record.

    def summarise(self, parts: Split, written: WriteStats) -> PreparedDataset:
        language_of = {
            self.keys[position].file: self.labels[position][0] for position in (*parts.train, *parts.held_out)
        }
        state = self.states.get(self.spec.source_name)
        return PreparedDataset(
            summary=DatasetSummary(
                train_examples=len(parts.train),
                held_out_examples=len(parts.held_out),
                train_tokens=written.tokens["train"],
                held_out_tokens=written.tokens["held_out"],
                files=len(language_of),
                left_out={reason: count for reason, count in sorted(self.left_out.items()) if count},
                left_out_by_extension=self.not_read.by_extension,
                secrets_removed=len(self.secrets),
                replayed_examples=self.replayed,
                study=self.study.summary(*self._paths(parts)) if self.study is not None else None,
                told=dict(sorted(written.formats.items())),
                sha256=written.sha256,
            ),
            languages=dict(Counter(language_of.values()).most_common()),
            repository_commit=state and state.commit,
            repository_dirty=state and state.dirty,
            repositories=tuple(self.states.values()) if self.spec.more_sources else (),
        )

    def _paths(self, parts: Split) -> tuple[Iterator[str], Iterator[str]]:
        """Return the paths of the examples that are trained on, and of those that are held out."""
        train, held_out = ((self.keys[position].file for position in part) for part in (parts.train, parts.held_out))
        return train, held_out

    def snapshot(self, parts: Split, held_out: Sequence[Example]) -> Snapshot:
        """Return what the sources are. `held_out`: the examples that were written."""
        states = [self.states.get(source.name) for source in self._repositories]
        return take_snapshot(
            [
                SourceState(name=source.name, commit=state and state.commit, dirty=state and state.dirty)
                for source, state in zip(self._repositories, states, strict=True)
            ],
            self._known_states(),
            train={self.keys[position].file for position in parts.train} | self.trained_files,
            held_out=set(parts.held_out_files) if self.parent else {self.keys[each].file for each in parts.held_out},
            held_out_examples=held_out,
            held_out_before=self.parent.snapshot.held_out_ever if self.parent else (),
        )

    def _known_states(self) -> list[FileState]:
        """Return what files were, without what is left to the next training, to which that is still new."""
        units_of: dict[str, set[str]] = {}
        for position in self.postponed:
            units_of.setdefault(self.keys[position].file, set()).update(self.unknown_units[position])
        postponed = set().union(*units_of.values())
        return [
            state.without(postponed) if state.path in units_of else state
            for state in self.file_states
            if units_of.get(state.path) != set()  # a new file that has no units is still new
        ]

    def details(self, parts: Split) -> dict[str, Any]:
        """Return what the manifest records besides the summary: the rules, and their effect."""
        labels = [self.labels[position] for position in (*parts.train, *parts.held_out)]
        return {
            "examples_by_language": dict(Counter(language for language, _ in labels).most_common()),
            "examples_by_kind": dict(Counter(kind for _, kind in labels).most_common()),
            "held_out_files": parts.held_out_files,
            "file_cap": {"share_of_tokens": FILE_SHARE, "but_tokens_at_least": FILE_MIN_TOKENS},
            "near_duplicates": {"rule": NEAR_DUPLICATE_RULE, "held_out_but_seen_in_training": parts.seen_in_training},
            "kept_apart": {"rule": f"less than {OVERLAP_THRESHOLD:g} of the runs of three lines are trained on"},
            "secrets": [{"file": file, "line": line, "type": kind} for file, line, kind in self.secrets],
        }


def _common_root(records: Iterator[Record]) -> str:
    """Return the longest common directory of the records' absolute paths, or "" if the first path is relative."""
    root = ""
    for record in records:
        if record.path.startswith("/"):
            parent = os.path.dirname(record.path)  # noqa: PTH120 - a path of someone else's machine
            root = os.path.commonpath([root, parent]) if root else parent
        elif not root:
            break
    return root


class _Progress:
    """Passes on the first message, and then at most two a second."""

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self._next = 0.0

    def __call__(self, detail: str) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _REPORT_EVERY_S
            self._report(detail)
