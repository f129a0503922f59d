"""Where the lines of a tokenised text begin and end, and at which of them to let a model write on.

A line is given with its indentation, as an editor would: what has to be written are the tokens from its first visible
character to its end. Lines are told by token, never cut inside one, for a model has not seen text that is cut so.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Offsets = Sequence[tuple[int, int]]  # begin and end of each token in the text, in characters

_MIN_WORDY = 3  # letters or digits: brackets and `else:` prove nothing
_LINES_BEFORE = 3  # visible ones that a prompt has at least
EXPECTED_LINES = 3  # that a completion may have


@dataclass(frozen=True)
class Line:
    """Tokens first..last-1 of a text write the visible part of a row; token `last` (if any) ends it."""

    row: int
    first: int
    last: int
    holds_end: bool  # the last token is the line's end as well


@dataclass(frozen=True)
class CompletionPoint:
    """A prompt ends before token `first`; what follows in the text is `expected`."""

    row: int
    first: int
    expected: str


def lines_of(text: str, offsets: Offsets) -> Iterator[Line]:
    """Lines with something to say that begin at a token of their own, the first one of the text left out."""
    token = begin = 0
    for row, line in enumerate(text.splitlines(keepends=True)):
        end = begin + len(line.rstrip("\r\n"))
        visible = begin + len(line) - len(line.lstrip())
        while token < len(offsets) and offsets[token][1] <= min(visible, end):
            token += 1
        last = token
        while last < len(offsets) and offsets[last][0] < end:
            last += 1
        whole = last > token and offsets[last - 1][1] >= end
        # A token may carry spaces before the first visible character, but no part of the row above.
        starts_here = token < len(offsets) and offsets[token][0] >= begin
        if row and whole and starts_here and sum(map(str.isalnum, line)) >= _MIN_WORDY:
            yield Line(row, token, last, holds_end=offsets[last - 1][1] > end)
        begin += len(line)


def find_completion_points(text: str, offsets: Offsets) -> list[CompletionPoint]:
    """Places to write on from: within a block (indented), behind some lines of code, before a line of code."""
    rows = text.splitlines(keepends=True)
    visible_before = [0]
    for row in rows:
        visible_before.append(visible_before[-1] + bool(row.strip()))
    cuts = []
    for line in lines_of(text, offsets):
        row = rows[line.row]
        if visible_before[line.row] < _LINES_BEFORE or not row[:1].isspace() or row.lstrip()[0] in "#/*\"'":
            continue
        expected = "".join(rows[line.row : line.row + EXPECTED_LINES])
        cuts.append(CompletionPoint(line.row, line.first, expected))
    return cuts


def choose(cuts: Sequence[Sequence[CompletionPoint]], most: int, seed: int) -> list[tuple[int, CompletionPoint]]:
    """At most so many cuts (index of the text, cut): one of each text in turn, in an order that the seed decides."""
    generator = random.Random(f"prompts/{seed}")  # noqa: S311 -- a sample, not a secret
    order = [index for index in range(len(cuts)) if cuts[index]]
    generator.shuffle(order)
    shuffled = {index: generator.sample(cuts[index], len(cuts[index])) for index in order}
    chosen: list[tuple[int, CompletionPoint]] = []
    for turn in range(max(map(len, cuts), default=0)):
        for index in order:
            if len(chosen) == most:
                return chosen
            if turn < len(shuffled[index]):
                chosen.append((index, shuffled[index][turn]))
    return chosen
