"""Detect data leakage: text that is evaluated on although it was trained on.

Two checks use one measure, the share of an example's shingles (three consecutive visible lines, white space normalised, hashed
to 64 bits) that were trained on. Lines survive what training does to a text (another chunking, a prompt around it, a middle to
fill in), and three lines are seldom equal by chance.

- `remove_overlap` drops held-out examples that overlap the training set of the same dataset.
- `TrainingFingerprint` is a sample of the shingle hashes of a training set, small enough to be stored with the adapter
  (trained_on.bin, at most 1 MiB), so that a later evaluation can exclude what the adapter was trained on. Hashes that are
  divisible by a certain number are sampled: that is a property of the text, so training and evaluation sample the same ones. A
  short example may have no such hash, so the smallest hash of each example is sampled as well.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peft_core.data.examples import learned_text
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.split import Split
from peft_core.errors import DataError, HeaderError
from peft_core.schemas.dataset import Example
from peft_core.system.files import read_small

FINGERPRINT_FILE_NAME = "trained_on.bin"
MAX_FINGERPRINT_BYTES = 1 << 20
OVERLAP_THRESHOLD = 0.5  # an example counts as trained on if at least this share of its shingles was
_MAX_HASHES = 1 << 16
_MAX_SMALLEST_HASHES = 60_000
_MIN_COMPARED_HASHES = 20  # of a training set, to estimate what it shares with another one
_SHINGLE_LINES = 3
# Magic, divisor, divisor_of_smallest. The hashes follow, 8 bytes each, in ascending order.
_HEADER = struct.Struct("<8sQQ")
_MAGIC = b"peftsee2"


@dataclass(frozen=True)
class TrainingFingerprint:
    """A sample of the shingle hashes of a training set."""

    divisor: int  # hashes that are divisible by it are sampled
    divisor_of_smallest: int  # the smallest hash of each example is sampled if it is divisible by this
    hashes: frozenset[int]

    @classmethod
    def of(cls, texts: Iterable[str]) -> TrainingFingerprint:
        sample, smallest = _HashSample(_MAX_HASHES), _HashSample(_MAX_SMALLEST_HASHES)
        for text in texts:
            hashes = shingle_hashes([text])
            sample.add(hashes)
            smallest.add({min(hashes)})
        return cls(sample.divisor, smallest.divisor, frozenset(sample.hashes | smallest.hashes))

    def __or__(self, other: TrainingFingerprint) -> TrainingFingerprint:
        """Return the fingerprint of both training sets: what is evidence in one of them only is left out."""
        sample, smallest = _HashSample(_MAX_HASHES), _HashSample(_MAX_SMALLEST_HASHES)
        sample.divisor = max(self.divisor, other.divisor)  # powers of two, so one divides the other
        smallest.divisor = max(self.divisor_of_smallest, other.divisor_of_smallest)
        hashes = self.hashes | other.hashes
        sample.add(hashes)
        smallest.add(value for value in hashes if value % sample.divisor)
        return TrainingFingerprint(sample.divisor, smallest.divisor, frozenset(sample.hashes | smallest.hashes))

    def share_of(self, text: str) -> float | None:
        """Return the share of a text that was trained on, 0 to 1, estimated from the sample; None if it holds no evidence."""
        hashes = list(_shingle_hashes(text))
        sampled = [value for value in hashes if value % self.divisor == 0]
        sampled = sampled or [value for value in (min(hashes),) if value % self.divisor_of_smallest == 0]
        return sum(value in self.hashes for value in sampled) / len(sampled) if sampled else None

    def overlap(self, other: TrainingFingerprint) -> float | None:
        """Return the share of the smaller training set that the other one has too, 0 to 1; None if too little is sampled."""
        divisor = math.lcm(self.divisor, other.divisor)
        own, others = ({value for value in each.hashes if value % divisor == 0} for each in (self, other))
        smaller = min(len(own), len(others))
        return len(own & others) / smaller if smaller >= _MIN_COMPARED_HASHES else None

    def to_bytes(self) -> bytes:
        header = _HEADER.pack(_MAGIC, self.divisor, self.divisor_of_smallest)
        return header + b"".join(value.to_bytes(8, "little") for value in sorted(self.hashes))

    @classmethod
    def from_bytes(cls, raw: bytes) -> TrainingFingerprint | None:
        """Parse a fingerprint of unknown origin, which is only numbers. Return None if the bytes are not a fingerprint."""
        body = raw[_HEADER.size :]
        if len(raw) < _HEADER.size or len(body) % 8:
            return None
        magic, divisor, divisor_of_smallest = _HEADER.unpack_from(raw)
        if magic != _MAGIC or divisor.bit_count() != 1 or divisor_of_smallest.bit_count() != 1:  # powers of two
            return None
        return cls(divisor, divisor_of_smallest, frozenset(struct.unpack(f"<{len(body) // 8}Q", body)))


def why_excluded(text: str, known: Sequence[TrainingFingerprint | None]) -> ExclusionReason | None:
    """Return the reason why a text cannot be evaluated on; None if it can.

    `known` has, for each adapter that is evaluated, what it was trained on; None: that is not recorded.
    """
    shares = [0.0 if fingerprint is None else fingerprint.share_of(text) for fingerprint in known]
    trained = [share is not None and share >= OVERLAP_THRESHOLD for share in shares]
    if any(trained):
        if all(trained):
            return ExclusionReason.TRAINED_ON
        return ExclusionReason.TRAINED_ON_BY_A if trained[0] else ExclusionReason.TRAINED_ON_BY_B
    return ExclusionReason.MAYBE_TRAINED_ON if None in shares else None


def read_fingerprint(adapter: Path) -> TrainingFingerprint | None:
    """Return the record of what an adapter was trained on, or None if it has none."""
    try:
        return TrainingFingerprint.from_bytes(read_small(adapter / FINGERPRINT_FILE_NAME, MAX_FINGERPRINT_BYTES))
    except HeaderError:
        return None


class _HashSample:
    """Hashes that are divisible by a number, which doubles whenever there are too many of them."""

    def __init__(self, max_hashes: int) -> None:
        self.divisor = 1
        self.hashes: set[int] = set()
        self._max_hashes = max_hashes

    def add(self, hashes: Iterable[int]) -> None:
        self.hashes.update(value for value in hashes if value % self.divisor == 0)
        while len(self.hashes) > self._max_hashes:
            self.divisor *= 2
            self.hashes = {value for value in self.hashes if value % self.divisor == 0}


def shingle_hashes(texts: Iterable[str]) -> set[int]:
    """Return the hashes of all shingles of these texts."""
    return {value for text in texts for value in _shingle_hashes(text)}


def shares_a_shingle(text: str, hashes: Collection[int]) -> bool:
    return any(value in hashes for value in _shingle_hashes(text))


def overlap_fraction(held_out: Mapping[int, str], train: Iterable[str]) -> dict[int, float]:
    """Return, for each held-out text, the share of its shingles that training texts hold, 0 to 1.

    The result is exact, and memory grows with the held-out texts only.
    """
    hashes = {position: shingle_hashes([text]) for position, text in held_out.items()}
    held_out_hashes = set().union(*hashes.values())
    trained_on = {value for text in train for value in _shingle_hashes(text) if value in held_out_hashes}
    return {position: len(own & trained_on) / len(own) for position, own in hashes.items()}


def _shingle_hashes(text: str) -> Iterator[int]:
    """Yield a hash for every three consecutive visible lines, or one hash for a text of fewer lines."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    for start in range(max(1, len(lines) - _SHINGLE_LINES + 1)):
        shingle = "\n".join(lines[start : start + _SHINGLE_LINES])
        digest = hashlib.blake2b(shingle.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        yield int.from_bytes(digest, "little")


def remove_overlap(parts: Split, spool: Path) -> Split:
    """Remove the held-out examples of which half or more is trained on. The spool holds all examples, in order.

    The split has already separated files and duplicates. What remains are texts that continue each other, such as the chunks of
    a window that slides over a file, and answers that are given to several questions. If all held-out examples overlap the
    training set, evaluation takes precedence: every training example that shares a shingle with them is removed instead.

    Raises:
        DataError: 'too_few_examples', if all examples share their text.
    """
    held_out = dict(_learned_texts(spool, parts.held_out))
    overlap = overlap_fraction(held_out, (text for _, text in _learned_texts(spool, parts.train)))
    clean = [position for position in parts.held_out if overlap[position] < OVERLAP_THRESHOLD]
    if clean:
        return replace(parts, held_out=clean, removed_for_overlap=len(parts.held_out) - len(clean))
    hashes = shingle_hashes(held_out.values())
    train = [position for position, text in _learned_texts(spool, parts.train) if not shares_a_shingle(text, hashes)]
    if not (train and held_out):
        raise DataError(
            "All examples share the same lines or the same answer, so nothing can be held out that is not also trained on.",
            code="too_few_examples",
            suggestions=("Give records that differ in what is to be learned from them",),
        )
    return replace(parts, train=train, removed_for_overlap=len(parts.train) - len(train))


def _learned_texts(spool: Path, positions: Collection[int]) -> Iterator[tuple[int, str]]:
    selected = set(positions)
    with spool.open("rb") as lines:
        for position, line in enumerate(lines):
            if position in selected:
                yield position, learned_text(Example.model_validate_json(line))
