"""Tokens of rows, by prefix sums: whether a range of rows fits is one subtraction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

CONTEXT_SHARE = 4  # of max_length, at most, for the heads of enclosing definitions


@dataclass(frozen=True, slots=True)
class Measure:
    """What rows cost in tokens, and how many tokens an example may have."""

    max_length: int
    overhead: int  # path header and end-of-text
    totals: Sequence[int]  # tokens of all rows before this one

    @classmethod
    def of(cls, costs: Iterable[int], *, max_length: int, overhead: int) -> Measure:
        return cls(max_length, overhead, [0, *accumulate(costs)])

    def cost(self, start: int, end: int) -> int:
        return self.totals[end] - self.totals[start]

    def context(self, scopes: Sequence[range]) -> tuple[range, ...]:
        """The innermost heads, as many as may stand before a unit."""
        kept: list[range] = []
        room = self.max_length // CONTEXT_SHARE
        for scope in reversed(scopes):
            room -= self.cost(scope.start, scope.stop)
            if room < 0:
                break
            kept.append(scope)
        return tuple(reversed(kept))

    def room(self, scopes: Sequence[range]) -> int:
        """Tokens left for the rows of a unit with this context; at least one."""
        heads = sum(self.cost(scope.start, scope.stop) for scope in self.context(scopes))
        return max(1, self.max_length - self.overhead - heads)
