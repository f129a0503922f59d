"""Held out or trained on: whole files, chosen by a hash of their name.

A file keeps its place in the order whatever else is added or removed, so that the next training of a project measures on
nearly the same files. Of copies and near duplicates one is kept, and training comes first: what is like anything that is
trained on is never measured on.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from peft_core.data.minhash import MinHashIndex
from peft_core.schemas.dataset import DatasetPurpose

# Measuring base and adapter on more examples costs minutes and moves the figure by less than its noise.
HELD_OUT_MAX_EXAMPLES = 200
# One file gives at most a tenth of what is trained on in the end; but these tokens at least, for small projects are made
# of few files.
FILE_SHARE = 0.1
FILE_MIN_TOKENS = 50_000
_NOW = 1 << 62  # later than any commit
_OVERSHOOT = 1.25  # of what is asked for: a file that leads beyond that is trained on


class ExampleKey(NamedTuple):
    """What the split needs to know of an example."""

    file: str
    digest: bytes  # of the body, white space normalised
    tokens: int
    answer: bytes = b""  # digest of what a record teaches; the same answer is on one side; empty: it has none


@dataclass(frozen=True, slots=True)
class Split:
    train: list[int]  # positions in the sequence of keys
    held_out: list[int]
    held_out_files: list[str]
    duplicates: int = 0  # left out, for they are equal to one that is kept
    near_duplicates: int = 0  # left out, for they are nearly so
    seen_in_training: int = 0  # of both, those of held-out files that are like one that is trained on
    removed_for_overlap: int = 0  # left out, for half of their lines are on the other side


def digest(text: str) -> bytes:
    """Equal for texts that differ in white space only."""
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def order_key(file: str, seed: int) -> bytes:
    """By which files are put into an order that depends on nothing but their names."""
    return hashlib.sha256(f"{seed}\0{file}".encode("utf-8", "surrogatepass")).digest()


def with_canonical_digests(keys: Sequence[ExampleKey], signatures: MinHashIndex) -> list[ExampleKey]:
    """Near duplicates with the digest of the first of them: equal, for who counts what there is."""
    representatives = signatures.representatives(range(len(keys)))
    return [key._replace(digest=keys[representatives[position]].digest) for position, key in enumerate(keys)]


def count_distinct(keys: Iterable[ExampleKey]) -> tuple[int, int]:
    """Distinct examples, and files that hold an example that no other file holds."""
    owners = _owners(keys)
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
    """About that fraction of the tokens in whole files; at least one file on either side if there are two.

    Files are taken in the order of their hash until enough is held out. A file that would lead far beyond that is passed
    over; if all would, the smallest is held out. `changed`: when each file was changed last; then the newest are taken first,
    those that are not in it before all others. Who only measures trains on nothing.
    """
    sides = _sides(keys)
    if len(set(sides.values())) == 1:  # an answer that all give: then what is held out is kept apart one by one, later
        sides = {file: file for file in sides}
    grouped = [key._replace(file=sides[key.file]) for key in with_canonical_digests(keys, signatures)]
    training = purpose is DatasetPurpose.TRAINING
    chosen = _choose(grouped, held_out_fraction, seed, changed or {}, spared=1 if training else 0)
    held_out_files = {file for file, side in sides.items() if side in chosen}
    train = [position for position, key in enumerate(keys) if training and key.file not in held_out_files]
    held_out = [position for position, key in enumerate(keys) if key.file in held_out_files]
    parts = _distinct(keys, signatures, train, held_out)
    if train and held_out and not parts.held_out:
        # A near duplicate of a near duplicate may be trained on for each of them. Then measuring comes first.
        other = _distinct(keys, signatures, held_out, train)
        parts = replace(other, train=other.held_out, held_out=other.train, seen_in_training=0)
    if not training:  # one file may hold any number
        parts = replace(parts, held_out=_evenly(parts.held_out, HELD_OUT_MAX_EXAMPLES))
    return replace(parts, held_out_files=sorted(held_out_files))


def _evenly(positions: list[int], most: int) -> list[int]:
    """At most so many of them, from the first to the last."""
    return [positions[n * len(positions) // most] for n in range(most)] if len(positions) > most else positions


def cap_per_file(keys: Sequence[ExampleKey], train: Sequence[int]) -> list[int]:
    """Without what giant files have too much of; what is kept of them is taken evenly from their beginning to their end."""
    language_of_file: dict[str, list[int]] = defaultdict(list)
    for position in train:
        language_of_file[keys[position].file].append(position)
    tokens = {
        file: sum(keys[position].tokens for position in positions) for file, positions in language_of_file.items()
    }
    limit = file_limit(tokens.values())
    kept: list[int] = []
    for file, positions in language_of_file.items():
        ratio = min(1.0, limit / max(1, tokens[file]))
        # The n-th is kept when the count that should be kept by then has grown by one.
        kept += [position for n, position in enumerate(positions) if int((n + 1) * ratio) > int(n * ratio)]
    return sorted(kept)


def file_limit(tokens: Iterable[int]) -> float:
    """Tokens that a file may give at most: a tenth of what all files give together, when none gives more than that.

    With k files cut to the limit L and the others whole, L = share * (k * L + others). Taken is the first k that leaves no
    larger file whole; from ten on there is none, and what is certain to be given decides.
    """
    largest_first = sorted(tokens, reverse=True)
    others = sum(largest_first)
    for cut, largest in enumerate(largest_first):
        if FILE_SHARE * cut >= 1:
            break
        limit = FILE_SHARE * others / (1 - FILE_SHARE * cut)
        if limit >= largest:
            return max(FILE_MIN_TOKENS, limit)
        others -= largest
    return FILE_MIN_TOKENS


def _distinct(keys: Sequence[ExampleKey], signatures: MinHashIndex, first: list[int], second: list[int]) -> Split:
    """What is kept of the first and of the second part: nothing that is like something that is kept before it."""
    equal: dict[bytes, int] = {}
    copies = {
        position: known
        for position in (*first, *second)
        if (known := equal.setdefault(keys[position].digest, position)) != position
    }
    representatives = signatures.representatives(position for position in (*first, *second) if position not in copies)
    kept_first, kept_second = (
        [position for position in part if representatives.get(position) == position] for part in (first, second)
    )
    in_first = set(first)
    like = [representatives.get(copies.get(position, position)) for position in second]
    return Split(
        train=kept_first,
        held_out=kept_second,
        held_out_files=[],
        duplicates=len(copies),
        near_duplicates=len(representatives) - len(kept_first) - len(kept_second),
        seen_in_training=sum(leader in in_first for leader in like),
    )


def _sides(keys: Sequence[ExampleKey]) -> dict[str, str]:
    """Files that give the same answers go to one side: of each file, the first by name of those that it goes with."""
    representatives = {key.file: key.file for key in keys}

    def leader(file: str) -> str:
        while representatives[file] != file:
            representatives[file] = file = representatives[representatives[file]]
        return file

    first: dict[bytes, str] = {}
    for key in keys:
        if key.answer:
            one, other = sorted((leader(key.file), leader(first.setdefault(key.answer, key.file))))
            representatives[other] = one
    return {file: leader(file) for file in representatives}


def _choose(
    keys: Sequence[ExampleKey],
    fraction: float,
    seed: int,
    changed: Mapping[str, int],
    *,
    spared: int,
) -> set[str]:
    """`spared`: files that are held out in no case."""
    costs: dict[bytes, int] = defaultdict(int)
    for key in keys:  # copies may differ in white space, and then in tokens
        costs[key.digest] = max(costs[key.digest], key.tokens)
    tokens: dict[str, int] = defaultdict(int)
    examples: Counter[str] = Counter()
    # What other files hold as well could not be measured on: it may be trained on there, if anything is.
    owners: Mapping[bytes, str | None] = _owners(keys) if spared else _first_holders(keys)
    for text, file in owners.items():
        if file is not None:
            tokens[file] += costs[text]
            examples[file] += 1
    wanted = fraction * sum(tokens.values())
    order = sorted(tokens, key=lambda file: (-changed.get(file, _NOW), order_key(file, seed)))
    chosen: set[str] = set()
    taken_tokens = taken_examples = 0
    for file in order:
        if taken_tokens >= wanted or taken_examples >= HELD_OUT_MAX_EXAMPLES or len(chosen) == len(order) - spared:
            break
        fits = taken_tokens + tokens[file] <= _OVERSHOOT * wanted
        if fits and taken_examples + examples[file] <= _OVERSHOOT * HELD_OUT_MAX_EXAMPLES:
            chosen.add(file)
            taken_tokens += tokens[file]
            taken_examples += examples[file]
    if chosen or len(order) <= spared:
        return chosen
    return {min(order, key=lambda file: (tokens[file], order.index(file)))}


def _first_holders(keys: Iterable[ExampleKey]) -> dict[bytes, str]:
    """Of the files that hold a text the first by name."""
    first: dict[bytes, str] = {}
    for key in keys:
        first[key.digest] = min(key.file, first.get(key.digest, key.file))
    return first


def _owners(keys: Iterable[ExampleKey]) -> dict[bytes, str | None]:
    """The only file that holds a text, None where several do."""
    owners: dict[bytes, str | None] = {}
    for key in keys:
        owners[key.digest] = key.file if owners.get(key.digest, key.file) == key.file else None
    return owners
