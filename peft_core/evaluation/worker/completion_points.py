"""Where the lines of a tokenised text begin and end, and at which of them a model may be asked to complete the text.

A prompt includes the indentation of the line to write, as in an editor; the model writes from the first visible character to
the end of the line. Lines are split between tokens and never inside one, because models have not seen text that is split so.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peft_core.data.chunking import split_lines

Offsets = Sequence[tuple[int, int]]  # begin and end of each token in the text, in characters

_MIN_WORD_CHARACTERS = 3  # letters or digits in a line: brackets and `else:` are too easy to predict
_MIN_PROMPT_LINES = 3  # lines of a prompt that are not blank
EXPECTED_LINES = 3  # most lines of a completion


@dataclass(frozen=True)
class Line:
    """Tokens first..last-1 of a text form the visible part of a row; token `last`, if any, ends the row."""

    row: int
    first: int
    last: int
    includes_newline: bool  # the last token also contains the end of the line


@dataclass(frozen=True)
class CompletionPoint:
    """A prompt ends before token `first`; the text continues with `expected`."""

    row: int
    first: int
    expected: str


def find_lines(text: str, offsets: Offsets) -> Iterator[Line]:
    """Yield the lines that have enough word characters and begin at a token of their own. The first line is skipped."""
    token = begin = 0
    for row, line in enumerate(split_lines(text)):
        end = begin + len(line.rstrip("\r\n"))
        visible = begin + len(line) - len(line.lstrip())
        while token < len(offsets) and offsets[token][1] <= min(visible, end):
            token += 1
        last = token
        while last < len(offsets) and offsets[last][0] < end:
            last += 1
        is_complete = last > token and offsets[last - 1][1] >= end
        # A token may include spaces before the first visible character, but no part of the previous row.
        starts_here = token < len(offsets) and offsets[token][0] >= begin
        if row and is_complete and starts_here and sum(map(str.isalnum, line)) >= _MIN_WORD_CHARACTERS:
            yield Line(row, token, last, includes_newline=offsets[last - 1][1] > end)
        begin += len(line)


def find_completion_points(text: str, offsets: Offsets) -> list[CompletionPoint]:
    """Find the points inside an indented block, after some lines of code, and before a line that is no comment."""
    rows = split_lines(text)
    visible_before = [0]
    for row in rows:
        visible_before.append(visible_before[-1] + bool(row.strip()))
    points = []
    for line in find_lines(text, offsets):
        row = rows[line.row]
        is_code = row[:1].isspace() and row.lstrip()[0] not in "#/*\"'"
        if is_code and visible_before[line.row] >= _MIN_PROMPT_LINES:
            expected = "".join(rows[line.row : line.row + EXPECTED_LINES])
            points.append(CompletionPoint(line.row, line.first, expected))
    return points


def sample_completion_points(
    points: Sequence[Sequence[CompletionPoint]], limit: int, seed: int
) -> list[tuple[int, CompletionPoint]]:
    """Choose at most `limit` points at random and return them as (index of the text, point).

    Every text gets a point before any text gets a second one.
    """
    generator = random.Random(f"prompts/{seed}")  # noqa: S311 -- a sample, not a secret
    order = [index for index in range(len(points)) if points[index]]
    generator.shuffle(order)
    shuffled = {index: generator.sample(points[index], len(points[index])) for index in order}
    chosen: list[tuple[int, CompletionPoint]] = []
    for turn in range(max(map(len, points), default=0)):
        for index in order:
            if len(chosen) == limit:
                return chosen
            if turn < len(shuffled[index]):
                chosen.append((index, shuffled[index][turn]))
    return chosen
