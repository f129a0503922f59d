"""What an adapter was trained on, as hashes that are small enough to keep beside it: so that nobody measures on it.

Three visible lines in a row, white space normalised, make one hash. Lines are told whatever was made of them for training
(another cut, a prompt, a middle to fill in); three of them are seldom the same by chance. Of many hashes those are kept
that a number divides: which ones is a property of the text, so both sides keep the same.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

FILE_NAME = "trained_on.bin"
MAX_BYTES = 1 << 20
SEEN = 0.5  # share of its runs of lines from which on an example counts as trained on
_MOST = 1 << 16  # hashes that are kept
_ROWS = 3
_HEAD = struct.Struct("<8sQ")
_MAGIC = b"peftseen"


@dataclass(frozen=True)
class TrainedOn:
    every: int  # hashes that this number divides are kept
    hashes: frozenset[int]

    @classmethod
    def of(cls, texts: Iterable[str]) -> TrainedOn:
        every, kept = 1, set[int]()
        for text in texts:
            kept.update(found for found in _hashes(text) if found % every == 0)
            while len(kept) > _MOST:
                every *= 2
                kept = {found for found in kept if found % every == 0}
        return cls(every, frozenset(kept))

    def share_of(self, text: str) -> float:
        """How much of a text was trained on, 0 to 1, as far as the kept hashes tell."""
        found = [value for value in _hashes(text) if value % self.every == 0]
        return sum(value in self.hashes for value in found) / len(found) if found else 0.0

    def to_bytes(self) -> bytes:
        return _HEAD.pack(_MAGIC, self.every) + b"".join(value.to_bytes(8, "little") for value in sorted(self.hashes))

    @classmethod
    def from_bytes(cls, raw: bytes) -> TrainedOn | None:
        """None for what is not such a file. It may come from a stranger: nothing in it is more than a number."""
        body = raw[_HEAD.size :]
        if len(raw) < _HEAD.size or len(body) % 8:
            return None
        magic, every = _HEAD.unpack_from(raw)
        if magic != _MAGIC or every < 1:
            return None
        return cls(every, frozenset(struct.unpack(f"<{len(body) // 8}Q", body)))


def _hashes(text: str) -> Iterator[int]:
    """Of every run of three visible lines; of a shorter text as a whole."""
    rows = [" ".join(row.split()) for row in text.splitlines() if row.strip()]
    for start in range(max(1, len(rows) - _ROWS + 1)):
        run = "\n".join(rows[start : start + _ROWS])
        digest = hashlib.blake2b(run.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        yield int.from_bytes(digest, "little")
