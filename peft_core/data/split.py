"""Split examples into a training set and a held-out set, and remove duplicates.

In: an `ExampleKey` per example and the MinHash signatures of their texts. Out: a `Split` of positions.

- Whole files are held out, because examples of one file resemble each other. Files that give the same answer (records with
  several questions for one answer) form a group, and a group is held out as a whole.
- Files are held out in the order of a hash of their name. A file keeps its position in that order whatever else is added or
  removed, so that the next training of a project is evaluated on nearly the same files.
- The study items of one API are one file for this purpose, so that held-out items measure what is known of other APIs.
- Only one example of equal or nearly equal ones remains, and training takes precedence: an example that resembles one in the
  training set is never held out.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from peft_core.data.exclusions import ExclusionReason
from peft_core.data.minhash import MinHashIndex
from peft_core.errors import DataError
from peft_core.schemas.counts import counted
from peft_core.schemas.dataset import DatasetPurpose

# Evaluating base model and adapter on more examples takes minutes, and changes the result by less than its noise.
HELD_OUT_MAX_EXAMPLES = 200
# One file gives at most a tenth of the training tokens, but is never cut below this many: small projects have few files.
FILE_SHARE = 0.1
FILE_MIN_TOKENS = 50_000
# What the path of a study item's example begins with; the full name of its API follows, so that an API is split as a file is.
STUDY_PREFIX = "study of "
_NEVER_COMMITTED = 1 << 62  # as a commit time: later than any commit
_MAX_OVERSHOOT = 1.25  # a file is skipped if it would take the held-out set beyond this multiple of its target


class ExampleKey(NamedTuple):
    """What the split needs to know of an example."""

    file: str
    digest: bytes  # of the text, white space normalised
    tokens: int
    answer: bytes = b""  # digest of the answer that a record teaches; equal answers stay on one side; empty: no answer


@dataclass(frozen=True, slots=True)
class Split:
    """Positions of examples, and how many were removed."""

    train: list[int]
    held_out: list[int]
    held_out_files: list[str]
    duplicates: int = 0  # removed because an equal example remains
    near_duplicates: int = 0  # removed because a nearly equal example remains
    seen_in_training: int = 0  # of both: examples of held-out files that resemble one in the training set
    removed_for_overlap: int = 0  # removed by `leakage.remove_overlap`


def digest(text: str) -> bytes:
    """Return a digest that is equal for texts that differ in white space only."""
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def order_key(file: str, seed: int) -> bytes:
    """Return a key that sorts files into a random order that depends only on their names and the seed."""
    return hashlib.sha256(f"{seed}\0{file}".encode("utf-8", "surrogatepass")).digest()


def with_canonical_digests(keys: Sequence[ExampleKey], signatures: MinHashIndex) -> list[ExampleKey]:
    """Return the keys with the digest of the first near duplicate, so that near duplicates count as one example."""
    representatives = signatures.representatives(range(len(keys)))
    return [key._replace(digest=keys[representatives[position]].digest) for position, key in enumerate(keys)]


def count_distinct(keys: Iterable[ExampleKey]) -> tuple[int, int]:
    """Count distinct examples, and files that hold an example that no other file holds."""
    owners = _only_files(keys)
    return len(owners), len({file for file in owners.values() if file is not None})


def split(
    keys: Sequence[ExampleKey],
    signatures: MinHashIndex,
    *,
    held_out_fraction: float,
    seed: int,
    changed: Mapping[str, int] | None = None,
    purpose: DatasetPurpose = DatasetPurpose.TRAINING,
) -> Split:
    """Hold out about this fraction of the tokens, in whole files; at least one file on either side if there are two.

    Args:
        keys: One per example.
        signatures: Of the examples' texts, at the same positions.
        held_out_fraction: Share of the tokens of distinct examples, 0 to 1.
        seed: Of the random order in which files are held out.
        changed: The time at which each file was last changed. If given, the newest files are held out; files that are missing
            here were never committed, and count as newest.
        purpose: For an evaluation there is no training set.
    """
    training = purpose is DatasetPurpose.TRAINING
    group_of_file = _groups_by_answer(keys)
    if len(set(group_of_file.values())) == 1:
        # All files give one answer: `remove_overlap` separates the examples later.
        group_of_file = {file: file for file in group_of_file}
    group_keys = [key._replace(file=group_of_file[key.file]) for key in with_canonical_digests(keys, signatures)]
    held_out_groups: set[str] = set()
    for are_items in (False, True):  # study items have a held-out share of their own: a few of them say little else
        of_kind = [key for key in group_keys if key.file.startswith(STUDY_PREFIX) is are_items]
        held_out_groups |= choose_held_out(
            of_kind, held_out_fraction, seed, changed or {}, min_train_groups=1 if training else 0
        )
    held_out_files = {file for file, group in group_of_file.items() if group in held_out_groups}
    train = [position for position, key in enumerate(keys) if training and key.file not in held_out_files]
    held_out = [position for position, key in enumerate(keys) if key.file in held_out_files]
    result = _without_duplicates(keys, signatures, train, held_out)
    if train and held_out and not result.held_out:
        # All held-out examples resemble one in the training set. Then evaluation takes precedence.
        swapped = _without_duplicates(keys, signatures, held_out, train)
        result = replace(swapped, train=swapped.held_out, held_out=swapped.train, seen_in_training=0)
    if not training:  # a single file may hold any number of examples
        result = replace(result, held_out=_evenly_spaced(result.held_out, HELD_OUT_MAX_EXAMPLES))
    return replace(result, held_out_files=sorted(held_out_files))


def _evenly_spaced(positions: list[int], count: int) -> list[int]:
    """Return at most this many positions, evenly spaced from the first to the last."""
    return [positions[n * len(positions) // count] for n in range(count)] if len(positions) > count else positions


def distinct(keys: Sequence[ExampleKey], signatures: MinHashIndex, order: Sequence[int]) -> set[int]:
    """Return the positions that resemble none before them in this order."""
    first_with_digest: dict[bytes, int] = {}
    originals = [
        position for position in order if first_with_digest.setdefault(keys[position].digest, position) == position
    ]
    representatives = signatures.representatives(originals)
    return {position for position in originals if representatives[position] == position}


def _without_duplicates(
    keys: Sequence[ExampleKey], signatures: MinHashIndex, train: list[int], held_out: list[int]
) -> Split:
    """Remove every example that resembles one before it; training examples come before held-out ones."""
    ordered = (*train, *held_out)
    first_with_digest: dict[bytes, int] = {}
    copies = {
        position: original
        for position in ordered
        if (original := first_with_digest.setdefault(keys[position].digest, position)) != position
    }
    representatives = signatures.representatives(position for position in ordered if position not in copies)
    distinct_train, distinct_held_out = (
        [position for position in part if representatives.get(position) == position] for part in (train, held_out)
    )
    train_positions = set(train)
    resembles = [representatives.get(copies.get(position, position)) for position in held_out]
    return Split(
        train=distinct_train,
        held_out=distinct_held_out,
        held_out_files=[],
        duplicates=len(copies),
        near_duplicates=len(representatives) - len(distinct_train) - len(distinct_held_out),
        seen_in_training=sum(position in train_positions for position in resembles),
    )


def _groups_by_answer(keys: Sequence[ExampleKey]) -> dict[str, str]:
    """Map each file to its group, which is named by its first file: files that give the same answer are in one group."""
    parent = {key.file: key.file for key in keys}  # a union-find forest

    def root(file: str) -> str:
        while parent[file] != file:
            parent[file] = file = parent[parent[file]]
        return file

    first_file_with_answer: dict[bytes, str] = {}
    for key in keys:
        if key.answer:
            other_file = first_file_with_answer.setdefault(key.answer, key.file)
            first, second = sorted((root(key.file), root(other_file)))
            parent[second] = first
    return {file: root(file) for file in parent}


def choose_held_out(
    keys: Sequence[ExampleKey],
    held_out_fraction: float,
    seed: int,
    changed: Mapping[str, int],
    *,
    min_train_groups: int,
) -> set[str]:
    """Return the groups to hold out; `key.file` is a group here.

    Groups are taken in order until enough tokens or examples are held out. One that would take the held-out set far beyond its
    target is skipped. If all of them would, the smallest group is held out.
    """
    tokens, examples = _size_of_groups(keys, must_be_unique=min_train_groups > 0)
    order = sorted(tokens, key=lambda group: (-changed.get(group, _NEVER_COMMITTED), order_key(group, seed)))
    target_tokens = held_out_fraction * sum(tokens.values())
    chosen: set[str] = set()
    chosen_tokens = chosen_examples = 0
    for group in order:
        is_enough = chosen_tokens >= target_tokens or chosen_examples >= HELD_OUT_MAX_EXAMPLES
        if is_enough or len(chosen) == len(order) - min_train_groups:
            break
        fits = chosen_tokens + tokens[group] <= _MAX_OVERSHOOT * target_tokens
        if fits and chosen_examples + examples[group] <= _MAX_OVERSHOOT * HELD_OUT_MAX_EXAMPLES:
            chosen.add(group)
            chosen_tokens += tokens[group]
            chosen_examples += examples[group]
    if chosen or len(order) <= min_train_groups:
        return chosen
    return {min(order, key=lambda group: (tokens[group], order.index(group)))}


def _size_of_groups(keys: Sequence[ExampleKey], *, must_be_unique: bool) -> tuple[dict[str, int], Counter[str]]:
    """Return the tokens and the number of the distinct examples that would be held out with each group.

    If there is a training set, an example that other groups hold as well could not be held out: it may be trained on there.
    """
    tokens_of_text: dict[bytes, int] = defaultdict(int)
    for key in keys:  # copies may differ in white space, and so in tokens
        tokens_of_text[key.digest] = max(tokens_of_text[key.digest], key.tokens)
    owners: Mapping[bytes, str | None] = _only_files(keys) if must_be_unique else _first_files(keys)
    tokens: dict[str, int] = defaultdict(int)
    examples: Counter[str] = Counter()
    for text, group in owners.items():
        if group is not None:
            tokens[group] += tokens_of_text[text]
            examples[group] += 1
    return tokens, examples


def _only_files(keys: Iterable[ExampleKey]) -> dict[bytes, str | None]:
    """Map each text to the only file that holds it, or to None if several do."""
    owners: dict[bytes, str | None] = {}
    for key in keys:
        owners[key.digest] = key.file if owners.get(key.digest, key.file) == key.file else None
    return owners


def _first_files(keys: Iterable[ExampleKey]) -> dict[bytes, str]:
    """Map each text to the first file, by name, that holds it."""
    first: dict[bytes, str] = {}
    for key in keys:
        first[key.digest] = min(key.file, first.get(key.digest, key.file))
    return first


def cap_per_file(keys: Sequence[ExampleKey], train: Sequence[int]) -> list[int]:
    """Drop what giant files hold beyond the limit; what remains of them is spread evenly from beginning to end."""
    positions_of_file: dict[str, list[int]] = defaultdict(list)
    for position in train:
        positions_of_file[keys[position].file].append(position)
    tokens = {
        file: sum(keys[position].tokens for position in positions) for file, positions in positions_of_file.items()
    }
    limit = file_limit(tokens.values())
    remaining: list[int] = []
    for file, positions in positions_of_file.items():
        ratio = min(1.0, limit / max(1, tokens[file]))
        # The n-th remains if the number that should remain by then has grown by one.
        remaining += [position for n, position in enumerate(positions) if int((n + 1) * ratio) > int(n * ratio)]
    return sorted(remaining)


def file_limit(tokens: Iterable[int]) -> float:
    """Return how many tokens a file may give, so that no file gives more than its share of what all files then give.

    With k files cut to the limit L and the others complete, L = share * (k * L + others). The result is for the smallest k that
    leaves no larger file complete. From k = 10 on there is no such L, and the guaranteed minimum applies.
    """
    largest_first = sorted(tokens, reverse=True)
    others = sum(largest_first)
    for k, largest in enumerate(largest_first):
        if FILE_SHARE * k >= 1:
            break
        limit = FILE_SHARE * others / (1 - FILE_SHARE * k)
        if limit >= largest:
            return max(FILE_MIN_TOKENS, limit)
        others -= largest
    return FILE_MIN_TOKENS


# Is there enough to split?


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
        f"{where} gives {counted(examples, 'distinct example')} in {counted(files, 'file or record', 'files or records')}; "
        f"at least {purpose.min_examples} examples{among} are needed{purpose.needed_for}. "
        f"Left out: {describe_exclusions(left_out)}.",
        code="too_few_examples",
        suggestions=tuple(advice) or _advice_on(left_out),
        details={"examples": examples, "files": files, "left_out": dict(left_out)},
    )


def advice_on_records(left_out: Mapping[str, int]) -> tuple[str, ...]:
    """Return what the user may do if a source of records gives too few examples."""
    longer = left_out.get(ExclusionReason.TOO_LONG, 0)
    raised = (f"Raise config.max_length: {counted(longer, 'record')} would take more tokens",) if longer else ()
    return (*raised, "Give more records, each with a text of its own")


def _advice_on(left_out: Mapping[str, int]) -> tuple[str, ...]:
    if left_out.get("too_long"):
        return ("Raise config.max_length: longer records are left out", "Or give more records")
    return ("Give more code: a parent directory, or the whole repository",)


def describe_exclusions(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items())) or "nothing"
