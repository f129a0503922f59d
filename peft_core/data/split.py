"""Held out or trained on: whole files, chosen by a hash of their name.

A file keeps its place in the order whatever else is added or removed, so that the next training of a project measures on
nearly the same files. Of exact copies one is kept; a copy that is trained on is never measured on.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# Measuring base and adapter on more examples costs minutes and moves the figure by less than its noise.
HELD_OUT_MAX_EXAMPLES = 200
MIN_EXAMPLES = 8  # fewer teach nothing that could be measured
MIN_FILES = 2  # one to train on, one to measure on
_OVERSHOOT = 1.25  # of what is asked for: a file that leads beyond that is trained on


class Key(NamedTuple):
    """What the split needs to know of an example."""

    file: str
    digest: bytes  # of the body, white space normalised
    tokens: int


@dataclass(frozen=True, slots=True)
class Split:
    train: list[int]  # positions in the sequence of keys
    held_out: list[int]
    held_out_files: list[str]
    duplicates: int


def digest(text: str) -> bytes:
    """Equal for texts that differ in white space only."""
    return hashlib.blake2b(" ".join(text.split()).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def usable(keys: Iterable[Key]) -> tuple[int, int]:
    """Distinct examples, and files that hold an example that no other file holds."""
    owners = _owners(keys)
    return len(owners), len({file for file in owners.values() if file is not None})


def split(keys: Sequence[Key], *, held_out_fraction: float, seed: int) -> Split:
    """About that fraction of the tokens in whole files; at least one file on either side if there are two.

    Files are taken in the order of their hash until enough is held out. A file that would lead far beyond that is passed
    over; if all would, the smallest is held out.
    """
    held_out_files = _choose(keys, held_out_fraction, seed)
    seen: set[bytes] = set()
    train: list[int] = []
    held_out: list[int] = []
    for chosen, keep in ((False, train), (True, held_out)):
        for position, key in enumerate(keys):
            if (key.file in held_out_files) is chosen and key.digest not in seen:
                seen.add(key.digest)
                keep.append(position)
    return Split(train, held_out, sorted(held_out_files), len(keys) - len(train) - len(held_out))


def _choose(keys: Sequence[Key], fraction: float, seed: int) -> set[str]:
    costs: dict[bytes, int] = defaultdict(int)
    for key in keys:  # copies may differ in white space, and then in tokens
        costs[key.digest] = max(costs[key.digest], key.tokens)
    tokens: dict[str, int] = defaultdict(int)
    examples: Counter[str] = Counter()
    for text, file in _owners(keys).items():
        # What other files hold as well could not be measured on: it may be trained on there.
        if file is not None:
            tokens[file] += costs[text]
            examples[file] += 1
    wanted = fraction * sum(tokens.values())
    order = sorted(tokens, key=lambda file: hashlib.sha256(f"{seed}\0{file}".encode("utf-8", "surrogatepass")).digest())
    chosen: set[str] = set()
    taken_tokens = taken_examples = 0
    for file in order:
        if taken_tokens >= wanted or taken_examples >= HELD_OUT_MAX_EXAMPLES or len(chosen) == len(order) - 1:
            break
        fits = taken_tokens + tokens[file] <= _OVERSHOOT * wanted
        if fits and taken_examples + examples[file] <= _OVERSHOOT * HELD_OUT_MAX_EXAMPLES:
            chosen.add(file)
            taken_tokens += tokens[file]
            taken_examples += examples[file]
    return chosen or ({min(order, key=lambda file: (tokens[file], order.index(file)))} if len(order) > 1 else set())


def _owners(keys: Iterable[Key]) -> dict[bytes, str | None]:
    """The only file that holds a text, None where several do."""
    owners: dict[bytes, str | None] = {}
    for key in keys:
        owners[key.digest] = key.file if owners.get(key.digest, key.file) == key.file else None
    return owners
