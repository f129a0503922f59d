"""Find near duplicates: texts that have most of their words in common, in the same order.

In: texts, one at a time. Out: for each text, the first one that it is a near duplicate of.

A text is the set of its shingles: runs of five words, white space ignored. Two texts are near duplicates if the Jaccard
similarity of their sets is at least 0.8: in a function of a hundred words, one word changed at two places. The similarity is
estimated by MinHash signatures of 64 numbers (standard error 0.05 at the threshold). Locality-sensitive hashing selects the
pairs to compare: only texts whose signatures agree in a band of four numbers. All but one in five thousand pairs at the
threshold do.

The rensa library computes the signatures. The LSH index is our own: rensa's takes 1.7 kB per example and this one 0.2 kB, and
it is queried twice, in different orders.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence

from rensa import RMinHash

THRESHOLD = 0.8
_SHINGLE_WORDS = 5
NEAR_DUPLICATE_RULE = (
    f"Jaccard similarity of their runs of {_SHINGLE_WORDS} words is at least {THRESHOLD}, estimated by MinHash"
)
_WORD = re.compile(r"\w+|[^\w\s]")
_SIGNATURE_SIZE = 64
_BAND_SIZE = 4
_BANDS = _SIGNATURE_SIZE // _BAND_SIZE
_SEED = 1
# A bucket with more texts that are not near duplicates of each other is an accident, or was made on purpose.
_MAX_COMPARED = 64


class MinHashIndex:
    """Signatures of texts: half a kilobyte for each text, however long it is."""

    def __init__(self) -> None:
        self._signatures: list[RMinHash | None] = []
        self._band_hashes = array("q")  # _BANDS hashes for each signature
        self._buckets: dict[int, list[int]] | None = None  # position -> buckets that it shares with another text

    def __len__(self) -> int:
        return len(self._signatures)

    def add(self, text: str | None) -> None:
        """Add the next text. None stands in for a text that must not be a near duplicate of any other."""
        self._buckets = None
        shingles = _shingles(text) if text is not None else ()
        if not shingles:
            self._signatures.append(None)
            self._band_hashes.extend([0] * _BANDS)
            return
        signature = RMinHash(_SIGNATURE_SIZE, _SEED)
        signature.update(shingles)
        numbers = signature.digest()
        self._signatures.append(signature)
        bands = (tuple(numbers[start : start + _BAND_SIZE]) for start in range(0, _SIGNATURE_SIZE, _BAND_SIZE))
        self._band_hashes.extend(hash(band) for band in bands)

    def representatives(self, order: Iterable[int]) -> dict[int, int]:
        """Map each position to its representative: the first one in this order that it is a near duplicate of, or itself.

        Representatives are not near duplicates of each other.
        """
        if self._buckets is None:
            self._buckets = self._shared_buckets()
        representatives: dict[int, int] = {}
        representatives_in_bucket: dict[int, list[int]] = defaultdict(list)
        for position in order:
            buckets = self._buckets.get(position, ())
            representative = self._representative(position, buckets, representatives_in_bucket)
            representatives[position] = representative
            if representative == position:
                for bucket in buckets:
                    representatives_in_bucket[bucket].append(position)
        return representatives

    def _representative(
        self, position: int, buckets: Sequence[int], representatives_in_bucket: dict[int, list[int]]
    ) -> int:
        signature = self._signatures[position]
        candidates = {
            candidate for bucket in buckets for candidate in representatives_in_bucket[bucket][:_MAX_COMPARED]
        }
        for candidate in sorted(candidates):
            other = self._signatures[candidate]
            if signature is not None and other is not None and signature.jaccard(other) >= THRESHOLD:
                return candidate
        return position

    def _shared_buckets(self) -> dict[int, list[int]]:
        """Return the buckets of each text whose signature agrees with another one in a band."""
        buckets: dict[int, list[int]] = defaultdict(list)
        bucket = 0
        for band in range(_BANDS):
            members: dict[int, list[int]] = defaultdict(list)
            for position, signature in enumerate(self._signatures):
                if signature is not None:
                    members[self._band_hashes[position * _BANDS + band]].append(position)
            for positions in members.values():
                if len(positions) > 1:
                    for position in positions:
                        buckets[position].append(bucket)
                    bucket += 1
        return dict(buckets)


def _shingles(text: str) -> list[str]:
    words = _WORD.findall(text)
    if len(words) <= _SHINGLE_WORDS:
        return [" ".join(words)] if words else []
    return [" ".join(words[start : start + _SHINGLE_WORDS]) for start in range(len(words) - _SHINGLE_WORDS + 1)]
