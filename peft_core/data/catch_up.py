"""Choose what a training that continues from an adapter, its parent, trains on and is evaluated on.

In: the examples of the sources as they are now, and what the parent's directory records about the sources as they were. Out: a
`Split`.

- Trained on: examples with a unit that is new or has changed, and a random sample of the others (replay), without which the
  adapter would forget them. Code that was deleted is not in the sources any more, so it is not replayed.
- Never trained on: what the parent or an ancestor held out. Files that the parent held out stay held out, and an example with
  the content of a held-out one is left out wherever it is now.
- Evaluated on: examples of held-out files that are new or have changed, and a sample of those that were held out before.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple

from peft_core.data.examples import learned_text
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.leakage import OVERLAP_THRESHOLD, TrainingFingerprint
from peft_core.data.minhash import MinHashIndex
from peft_core.data.snapshot import FileState, Snapshot, held_out_digests
from peft_core.data.split import ExampleKey, Split, cap_per_file, choose_held_out, digest, distinct, order_key
from peft_core.data.units import Unit, units_of_file
from peft_core.data.walk import File
from peft_core.errors import DataError
from peft_core.schemas.dataset import CatchUpSpec, Example

MAX_CHANGED_HELD_OUT = 100  # examples; scoring three models on more would take longer than many a catch-up
MAX_OLD_HELD_OUT = 60
MIN_REPLAYED = 16  # examples: a few changes alone would be learned by heart
_MIN_REPLAY_SHARE = 0.25  # of the examples, if their number is limited
_MIN_UNIT_CHARACTERS = 80  # shorter units, such as imports, are equal by chance
_MAX_OVERSHOOT = 1.25
_IF_DISTINCT = (ExclusionReason.UNCHANGED, ExclusionReason.NOT_NEEDED)  # why a distinct example is not used


class Novelty(StrEnum):
    """What an example is to the adapter that the training continues from."""

    CHANGED = "changed"  # new, or a part of it has changed
    KNOWN = "known"  # trained on, or it could have been
    HELD_OUT = "held_out"  # an equal example was held out by the adapter or by an ancestor
    BARRED = "barred"  # it has a unit of a held-out file


class _Lines(NamedTuple):
    first: int  # 1-based
    last: int  # inclusive
    digest: str  # of the unit

    def overlap(self, example: Example) -> bool:
        return self.first <= example.end_line and example.start_line <= self.last


class FileChanges(NamedTuple):
    """The units of a file that the parent does not know, and those of files that it held out."""

    changed: tuple[_Lines, ...] = ()
    barred: tuple[_Lines, ...] = ()
    is_new: bool = False  # every example is, even one that has no unit

    def changed_in(self, example: Example) -> frozenset[str]:
        """Return the digests of the units that the parent does not know, as far as they are in an example."""
        return frozenset(lines.digest for lines in self.changed if lines.overlap(example))


UNCHANGED = FileChanges()


@dataclass(frozen=True)
class ParentData:
    """What the adapter that a training continues from records about its data."""

    snapshot: Snapshot
    fingerprint: TrainingFingerprint

    @property
    def key(self) -> str:
        """A digest of both: a dataset that was prepared for another parent is not reused."""
        return hashlib.sha256(self.snapshot.model_dump_json().encode() + self.fingerprint.to_bytes()).hexdigest()

    @cached_property
    def _files(self) -> dict[str, FileState]:
        return {file.path: file for file in self.snapshot.files}

    @cached_property
    def _held_out(self) -> frozenset[bytes]:
        return held_out_digests(self.snapshot)

    @cached_property
    def held_out_files(self) -> frozenset[str]:
        return frozenset(file.path for file in self.snapshot.files if file.part == "held_out")

    @cached_property
    def trained_files(self) -> frozenset[str]:
        return frozenset(file.path for file in self.snapshot.files if file.part == "train")

    @cached_property
    def _barred_units(self) -> frozenset[str]:
        """The units of held-out files that no other file has."""
        held_out = {unit for file in self.snapshot.files if file.part == "held_out" for unit in file.unit_digests}
        other = {unit for file in self.snapshot.files if file.part != "held_out" for unit in file.unit_digests}
        return frozenset(held_out - other)

    def changes_in(self, file: File, state: FileState) -> FileChanges:
        """Compare a file with what it was. `state`: what it is now."""
        before = self._files.get(state.path)
        if before is not None and before.digest == state.digest:
            return UNCHANGED
        units = units_of_file(file)
        return FileChanges(
            changed=tuple(_lines(unit) for unit in units if unit.digest not in self.snapshot.units),
            barred=tuple(
                _lines(unit)
                for unit in units
                if unit.size >= _MIN_UNIT_CHARACTERS and unit.digest in self._barred_units
            ),
            is_new=before is None and not units,
        )

    def novelty(self, example: Example, changes: FileChanges | None) -> Novelty:
        """Return what an example is to the parent. `changes`: of its file; None: it is a record."""
        if self.held_out_before(example):
            return Novelty.HELD_OUT
        if changes is None:
            share = self.fingerprint.share_of(learned_text(example))
            return Novelty.KNOWN if share is not None and share == 1 else Novelty.CHANGED
        if changes.is_new or any(lines.overlap(example) for lines in changes.changed):
            is_barred = example.path not in self.held_out_files and _is_barred(example, changes)
            return Novelty.BARRED if is_barred else Novelty.CHANGED
        is_barred = example.path in self.held_out_files or _is_barred(example, changes)
        return Novelty.BARRED if is_barred else Novelty.KNOWN

    def held_out_before(self, example: Example) -> bool:
        """Return whether the adapter or an ancestor held out an equal example."""
        return digest(learned_text(example)) in self._held_out

    def was_trained_on(self, example: Example) -> bool:
        """Return whether at least half of an example is known to have been trained on."""
        share = self.fingerprint.share_of(learned_text(example))
        return share is not None and share >= OVERLAP_THRESHOLD


def _is_barred(example: Example, changes: FileChanges) -> bool:
    return any(lines.overlap(example) for lines in changes.barred)


def _lines(unit: Unit) -> _Lines:
    return _Lines(unit.start_line, unit.end_line, unit.digest)


@dataclass(frozen=True)
class CatchUpSplit:
    parts: Split
    replayed: int  # training examples that the parent knows
    left_out: Counter[ExclusionReason]  # of every example that is neither trained on nor evaluated on
    postponed: frozenset[int]  # positions of changed examples that are over the limit
    trained_files: frozenset[str]  # that the adapter and its ancestors have been trained on, as far as they still exist


def split_for_catch_up(
    keys: Sequence[ExampleKey],
    signatures: MinHashIndex,
    novelty: Sequence[Novelty],
    *,
    parent: ParentData,
    trained_on: Collection[int],
    spec: CatchUpSpec,
    held_out_fraction: float,
    seed: int,
) -> CatchUpSplit:
    """Choose what is trained on and what is held out.

    `keys`, `signatures` and `novelty` describe the examples, at the same positions. `trained_on`: positions of changed examples
    of which the parent has been trained on at least half. `held_out_fraction`: share of the tokens of new files that is held
    out, 0 to 1.

    Raises:
        DataError: 'nothing_to_catch_up', 'nothing_to_evaluate_on'.
    """
    held_out_files = _held_out_files(keys, novelty, parent)
    untouched = {key.file for key, label in zip(keys, novelty, strict=True) if label is not Novelty.CHANGED}
    new = [key for key in keys if key.file not in untouched | held_out_files | parent.trained_files]
    held_out_files |= _new_held_out_files(new, held_out_fraction, seed, needed=not held_out_files)
    old, changed_held_out, candidates = _candidates(keys, novelty, held_out_files, trained_on)
    kept = distinct(keys, signatures, [*old, *candidates, *changed_held_out])
    train = cap_per_file(keys, [position for position in candidates if position in kept])
    to_learn = [position for position in train if novelty[position] is Novelty.CHANGED]
    known = [position for position in train if novelty[position] is Novelty.KNOWN]
    if not to_learn:
        raise nothing_to_catch_up()
    # Another parent, another sample: the same one each time would leave the rest to be forgotten.
    changed, replayed = _sample(keys, to_learn, known, spec, seed + int(parent.key[:8], 16))
    evaluated = [
        *_random(keys, [position for position in old if position in kept], MAX_OLD_HELD_OUT, seed),
        *_random(keys, [position for position in changed_held_out if position in kept], MAX_CHANGED_HELD_OUT, seed),
    ]
    if not evaluated:
        raise DataError(
            "Nothing is left to measure the new adapter on: none of the code that was held out of training exists any more.",
            code="nothing_to_evaluate_on",
            suggestions=("Train from scratch, with config.continue_from = 'none'",),
        )
    over_file_share = kept.intersection(candidates).difference(train)
    left_out: Counter[ExclusionReason] = Counter()
    for position in set(range(len(keys))).difference(changed, replayed, evaluated):
        is_held_out = keys[position].file in held_out_files
        reason = _why_unused(novelty[position], is_held_out=is_held_out, is_trained_on=position in trained_on)
        if reason in _IF_DISTINCT and position not in kept:
            reason = ExclusionReason.DUPLICATE
        left_out[ExclusionReason.OVER_FILE_SHARE if position in over_file_share else reason] += 1
    return CatchUpSplit(
        parts=Split(
            train=sorted([*changed, *replayed]), held_out=sorted(evaluated), held_out_files=sorted(held_out_files)
        ),
        replayed=len(replayed),
        left_out=left_out,
        postponed=frozenset(to_learn).difference(changed),
        trained_files=frozenset(keys[position].file for position in train) - held_out_files,
    )


def _why_unused(label: Novelty, *, is_held_out: bool, is_trained_on: bool) -> ExclusionReason:
    """Return why an example is neither trained on nor evaluated on, if it is no duplicate."""
    if label in (Novelty.HELD_OUT, Novelty.BARRED) or (label is Novelty.KNOWN and is_held_out):
        return ExclusionReason.HELD_OUT_BEFORE
    if is_held_out and is_trained_on:
        return ExclusionReason.SEEN_IN_TRAINING
    return ExclusionReason.UNCHANGED if label is Novelty.KNOWN else ExclusionReason.NOT_NEEDED


def nothing_to_catch_up(adapter: str = "the adapter to continue from", never_shown: str = "") -> DataError:
    """Return the error. `never_shown`: a sentence on what the training of the adapter was too short for."""
    nothing = f"Nothing to catch up: no code that can be trained on has changed since {adapter} was trained on it."
    return DataError(
        f"{nothing} {never_shown}".rstrip(),
        code="nothing_to_catch_up",
        suggestions=("To train again all the same, from scratch, set config.continue_from = 'none'",),
    )


def _held_out_files(keys: Sequence[ExampleKey], novelty: Sequence[Novelty], parent: ParentData) -> set[str]:
    """Return the files that stay held out: those of the parent, and those with mostly the content of held-out ones."""
    total = Counter(key.file for key in keys)
    barred = Counter(
        key.file for key, label in zip(keys, novelty, strict=True) if label in (Novelty.HELD_OUT, Novelty.BARRED)
    )
    renamed = {file for file, count in barred.items() if 2 * count >= total[file] and file not in parent.trained_files}
    return {file for file in total if file in parent.held_out_files} | renamed


def _new_held_out_files(new: Sequence[ExampleKey], held_out_fraction: float, seed: int, *, needed: bool) -> set[str]:
    """Hold out a fraction of the files that are new; none of few, unless nothing else is held out."""
    if not new:
        return set()
    chosen = choose_held_out(new, held_out_fraction, seed, {}, min_train_groups=1)
    tokens = sum(key.tokens for key in new if key.file in chosen)
    overshoots = tokens > _MAX_OVERSHOOT * held_out_fraction * sum(key.tokens for key in new)
    return set() if overshoots and not needed else chosen


def _candidates(
    keys: Sequence[ExampleKey], novelty: Sequence[Novelty], held_out_files: set[str], trained_on: Collection[int]
) -> tuple[list[int], list[int], list[int]]:
    """Return the positions of old held-out, changed held-out, and training examples."""
    old, changed, train = [], [], []
    for position, (key, label) in enumerate(zip(keys, novelty, strict=True)):
        is_held_out = key.file in held_out_files
        if label is Novelty.HELD_OUT:
            old.append(position)
        elif label is Novelty.CHANGED and is_held_out and position not in trained_on:
            changed.append(position)
        elif label in (Novelty.CHANGED, Novelty.KNOWN) and not is_held_out:
            train.append(position)
    return old, changed, train


def _sample(
    keys: Sequence[ExampleKey], changed: list[int], known: list[int], spec: CatchUpSpec, seed: int
) -> tuple[list[int], list[int]]:
    """Return the changed and the known examples that are trained on."""
    budget = spec.replay_share * sum(keys[position].tokens for position in changed)
    replayed: list[int] = []
    for position in _random(keys, known, len(known), seed):
        if budget <= 0 and (len(replayed) >= MIN_REPLAYED or not spec.replay_share):
            break
        replayed.append(position)
        budget -= keys[position].tokens
    limit = spec.max_examples
    if limit is not None and len(changed) + len(replayed) > limit:
        fewest = min(len(replayed), round(_MIN_REPLAY_SHARE * limit))
        replayed = replayed[: max(fewest, limit - len(changed))]
        changed = _random(keys, changed, max(1, limit - len(replayed)), seed)
    return changed, replayed


def _random(keys: Sequence[ExampleKey], positions: Sequence[int], count: int, seed: int) -> list[int]:
    """Return at most this many of the positions, in a random order that depends on the text of each example only."""
    return sorted(positions, key=lambda position: order_key(keys[position].digest.hex(), seed))[:count]
