"""Near duplicates: texts that have most of their words in common, in the same surroundings.

A text is the set of its runs of five words; white space plays no part. Two texts are near duplicates when their sets overlap by
four fifths (Jaccard): in a function of a hundred words, one word changed at two places. Sets are compared by MinHash
signatures of 64 numbers (standard error 0.05 at the threshold), and only those that agree in a band of four are compared
at all: of pairs at the threshold that is all but one in five thousand.

rensa computes the signatures. The index is our own, for rensa's takes 1.7 kB an example where this takes 0.2, and it is
asked twice, in different orders.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence

from rensa import RMinHash

THRESHOLD = 0.8
_RUN = 5  # words
NEAR_DUPLICATE_RULE = f"Jaccard similarity of their runs of {_RUN} words is at least {THRESHOLD}, estimated by MinHash"
_WORD = re.compile(r"\w+|[^\w\s]")
_NUMBERS = 64
_BAND = 4
_BANDS = _NUMBERS // _BAND
_SEED = 1
# Of texts in one bucket that are no near duplicates of each other: more than a handful is an accident, or made on purpose.
_MAX_COMPARED = 64


class MinHashIndex:
    """What is remembered of texts: half a kilobyte each, however long they are."""

    def __init__(self) -> None:
        self._signatures: list[RMinHash | None] = []
        self._bands = array("q")  # a hash of each band of each signature
        self._buckets: dict[int, list[int]] | None = None

    def __len__(self) -> int:
        return len(self._signatures)

    def add(self, text: str | None) -> None:
        """The next text; None: one that is like no other."""
        self._buckets = None
        runs = _runs(text) if text is not None else ()
        if not runs:
            self._signatures.append(None)
            self._bands.extend([0] * _BANDS)
            return
        signature = RMinHash(_NUMBERS, _SEED)
        signature.update(runs)
        numbers = signature.digest()
        self._signatures.append(signature)
        self._bands.extend(hash(tuple(numbers[start : start + _BAND])) for start in range(0, _NUMBERS, _BAND))

    def representatives(self, order: Iterable[int]) -> dict[int, int]:
        """Of each text, the first one in this order that it is a near duplicate of; itself where there is none.

        Leaders are near duplicates of no other leader.
        """
        if self._buckets is None:
            self._buckets = self._shared_buckets()
        representatives: dict[int, int] = {}
        of_bucket: dict[int, list[int]] = defaultdict(list)  # leaders
        for position in order:
            buckets = self._buckets.get(position, ())
            representatives[position] = leader = self._leader(position, buckets, of_bucket)
            if leader == position:
                for bucket in buckets:
                    of_bucket[bucket].append(position)
        return representatives

    def _leader(self, position: int, buckets: Sequence[int], of_bucket: dict[int, list[int]]) -> int:
        own = self._signatures[position]
        candidates = {candidate for bucket in buckets for candidate in of_bucket[bucket][:_MAX_COMPARED]}
        for candidate in sorted(candidates):
            other = self._signatures[candidate]
            if own is not None and other is not None and own.jaccard(other) >= THRESHOLD:
                return candidate
        return position

    def _shared_buckets(self) -> dict[int, list[int]]:
        """Where several texts agree in a band: the buckets of each of them."""
        found: dict[int, list[int]] = defaultdict(list)
        bucket = 0
        for band in range(_BANDS):
            members: dict[int, list[int]] = defaultdict(list)
            for position, signature in enumerate(self._signatures):
                if signature is not None:
                    members[self._bands[position * _BANDS + band]].append(position)
            for positions in members.values():
                if len(positions) > 1:
                    for position in positions:
                        found[position].append(bucket)
                    bucket += 1
        return dict(found)


def _runs(text: str) -> list[str]:
    words = _WORD.findall(text)
    if len(words) <= _RUN:
        return [" ".join(words)] if words else []
    return [" ".join(words[start : start + _RUN]) for start in range(len(words) - _RUN + 1)]
