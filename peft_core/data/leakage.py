"""What an adapter was trained on, as hashes that are small enough to keep beside it: so that nobody measures on it.

Three visible lines in a row, white space normalised, make one hash. Lines are told whatever was made of them for training
(another cut, a prompt, a middle to fill in); three of them are seldom the same by chance. Of many hashes those are kept
that a number divides: which ones is a property of the text, so both sides keep the same. A short example may have none
among them, so of each the smallest is kept as well.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from peft_core.data.examples import learned_text
from peft_core.data.split import Split
from peft_core.errors import DataError
from peft_core.schemas.dataset import Example

FINGERPRINT_FILE_NAME = "trained_on.bin"
MAX_FINGERPRINT_BYTES = 1 << 20
OVERLAP_THRESHOLD = 0.5  # share of its runs of lines from which on an example counts as trained on
_MOST = 1 << 16  # hashes that are kept
_MOST_SMALLEST = 60_000  # and of the smallest of each example
_ROWS = 3
_HEAD = struct.Struct("<8sQQ")
_MAGIC, _OLD_MAGIC = b"peftsee2", b"peftseen"


@dataclass(frozen=True)
class TrainingFingerprint:
    every: int  # hashes that this number divides are kept
    every_smallest: int  # and of each example the smallest, if this number divides it
    hashes: frozenset[int]

    @classmethod
    def of(cls, texts: Iterable[str]) -> TrainingFingerprint:
        sample, smallest = _Sample(_MOST), _Sample(_MOST_SMALLEST)
        for text in texts:
            found = shingle_hashes([text])
            sample.add(found)
            smallest.add({min(found)})
        return cls(sample.every, smallest.every, frozenset(sample.kept | smallest.kept))

    def share_of(self, text: str) -> float | None:
        """How much of a text was trained on, 0 to 1, as far as the kept hashes tell; None where they tell nothing."""
        every = list(_hashes(text))
        found = [value for value in every if value % self.every == 0]
        found = found or [value for value in (min(every),) if value % self.every_smallest == 0]
        return sum(value in self.hashes for value in found) / len(found) if found else None

    def to_bytes(self) -> bytes:
        head = _HEAD.pack(_MAGIC, self.every, self.every_smallest)
        return head + b"".join(value.to_bytes(8, "little") for value in sorted(self.hashes))

    @classmethod
    def from_bytes(cls, raw: bytes) -> TrainingFingerprint | None:
        """None for what is not such a file. It may come from a stranger: nothing in it is more than a number."""
        if raw[:8] == _OLD_MAGIC:  # of earlier builds, without the smallest: as good as none of them were kept
            raw = _MAGIC + raw[8:16] + b"\xff" * 8 + raw[16:]
        body = raw[_HEAD.size :]
        if len(raw) < _HEAD.size or len(body) % 8:
            return None
        magic, every, every_smallest = _HEAD.unpack_from(raw)
        if magic != _MAGIC or every < 1 or every_smallest < 1:
            return None
        return cls(every, every_smallest, frozenset(struct.unpack(f"<{len(body) // 8}Q", body)))


def shingle_hashes(texts: Iterable[str]) -> set[int]:
    """The hashes of all runs of lines in these texts."""
    return {value for text in texts for value in _hashes(text)}


def shares_a_shingle(text: str, runs: Collection[int]) -> bool:
    return any(value in runs for value in _hashes(text))


def overlap_fraction(measured: Mapping[int, str], trained: Iterable[str]) -> dict[int, float]:
    """How much of each of these texts is among others, 0 to 1. Exact, in memory that follows `measured` alone."""
    runs = {position: shingle_hashes([text]) for position, text in measured.items()}
    wanted = set().union(*runs.values())
    seen = {value for text in trained for value in _hashes(text) if value in wanted}
    return {position: len(found & seen) / len(found) for position, found in runs.items()}


class _Sample:
    """Hashes that a number divides, which doubles as often as there are too many."""

    def __init__(self, most: int) -> None:
        self.every = 1
        self.kept: set[int] = set()
        self._most = most

    def add(self, hashes: Iterable[int]) -> None:
        self.kept.update(value for value in hashes if value % self.every == 0)
        while len(self.kept) > self._most:
            self.every *= 2
            self.kept = {value for value in self.kept if value % self.every == 0}


def _hashes(text: str) -> Iterator[int]:
    """Of every run of three visible lines; of a shorter text as a whole."""
    rows = [" ".join(row.split()) for row in text.splitlines() if row.strip()]
    for start in range(max(1, len(rows) - _ROWS + 1)):
        run = "\n".join(rows[start : start + _ROWS])
        digest = hashlib.blake2b(run.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        yield int.from_bytes(digest, "little")


# FOLDED FROM peft_core.data.leakage: What is measured on, kept apart from what is trained on, by the rule that tells
# later what an adapter was trained on.
#
# Files and copies are apart already. What is left are texts that go on in each other, as chunks of a window that slides over
# a file, and answers that are given to several questions.
#


def remove_overlap(parts: Split, spool: Path) -> Split:
    """Without the held-out examples of which half is trained on. The spool holds examples in the order of the split.

    Where that would be all of them, measuring comes first: whatever shares a run of lines with them is not trained on.

    Raises:
        DataError: 'too_few_examples', all of them hold the same.
    """
    held_out = dict(_texts(spool, parts.held_out))
    seen = overlap_fraction(held_out, (text for _, text in _texts(spool, parts.train)))
    kept = [position for position in parts.held_out if seen[position] < OVERLAP_THRESHOLD]
    if kept:
        return replace(parts, held_out=kept, removed_for_overlap=len(parts.held_out) - len(kept))
    runs = shingle_hashes(held_out.values())
    train = [position for position, text in _texts(spool, parts.train) if not shares_a_shingle(text, runs)]
    if not (train and held_out):
        raise DataError(
            "All examples hold the same lines or the same answer: whatever is held out is trained on as well, and nothing can "
            "be measured.",
            code="too_few_examples",
            suggestions=("Give records that differ in what is to be learned from them",),
        )
    return replace(parts, train=train, removed_for_overlap=len(parts.train) - len(train))


def _texts(spool: Path, positions: Collection[int]) -> Iterator[tuple[int, str]]:
    wanted = set(positions)
    with spool.open("rb") as lines:
        for position, line in enumerate(lines):
            if position in wanted:
                yield position, learned_text(Example.model_validate_json(line))
