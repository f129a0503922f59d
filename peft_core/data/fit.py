"""Units to examples of at most max_length tokens: a path header, the heads around the unit, its text.

Header and context are given, not learned (`learn=False`): they say where the text stands, and a head that is repeated over
each of twenty methods must not be learned twenty times.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peft_core.data.codec import Codec
from peft_core.data.cut import break_ranks, cut, whole
from peft_core.data.languages import Language
from peft_core.data.measure import Measure
from peft_core.data.units import Unit
from peft_core.example import Example, Segment

MIN_TOKENS = 8  # of a text that is worth learning
RESERVED = 2  # end-of-text, and the beginning-of-text token that some bases want
_HEADER_SHARE = 4  # of max_length, at most, for the path


@dataclass(frozen=True, slots=True)
class Piece:
    """A unit, or the part of it that fits; the bodies of a unit's pieces, joined, are the unit."""

    unit: Unit
    context: str
    body: str
    start: int  # row
    end: int
    body_tokens: int
    tokens: int  # of everything, with end-of-text where the unit ends
    ends: bool  # whether this is the last of the unit

    def example(self, path: str, language: Language, *, first_line: int = 1, literal: bool = True) -> Example:
        given = (Segment(text=self.context, learn=False, literal=literal),) if self.context else ()
        return Example(
            segments=(*given, Segment(text=self.body, literal=literal)),
            path=path,
            language=language.name,
            kind=self.unit.kind,
            start_line=first_line + self.start,
            end_line=first_line + self.end - 1,
            tokens=self.tokens,
            ends=self.ends,
        )


def file_pieces(lines: Sequence[str], *, path: str, language: Language, codec: Codec, max_length: int) -> list[Piece]:
    """Cut a file into pieces that fit, header and end-of-text counted."""
    header, measure = _measured(lines, path, language, codec, max_length)
    return fitted(lines, cut(lines, language, measure), measure, language, codec, header=header)


def whole_pieces(
    lines: Sequence[str], *, path: str, language: Language, kind: str, codec: Codec, max_length: int
) -> list[Piece]:
    """A text that somebody else has cut already: one piece, unless it is too long."""
    header, measure = _measured(lines, path, language, codec, max_length)
    return fitted(lines, [whole(lines, language, kind)], measure, language, codec, header=header)


def _measured(
    lines: Sequence[str], path: str, language: Language, codec: Codec, max_length: int
) -> tuple[str, Measure]:
    header = path_header(path, language, codec, max_length)
    header_cost, *costs = codec.count([header, *lines])
    return header, Measure.of(costs, max_length=max_length, overhead=header_cost + RESERVED)


def fitted(
    lines: Sequence[str], units: Sequence[Unit], measure: Measure, language: Language, codec: Codec, *, header: str
) -> list[Piece]:
    """Pieces of units; what rows cost one by one is near enough to split by, the last word is a count of the whole."""
    drafts: list[tuple[Unit, str, range]] = []
    for unit in units:
        for part in _parts(lines, unit, measure, language):
            scopes = unit.scopes
            if unit.head is not None and part.start >= unit.head.stop:
                scopes = (*scopes, unit.head)
            heads = "".join("".join(lines[head.start : head.stop]) for head in measure.context(scopes))
            drafts.append((unit, header + heads, part))
    bodies = ["".join(lines[part.start : part.stop]) for _, _, part in drafts]
    counts = codec.count([*(context for _, context, _ in drafts), *bodies])
    result: list[Piece] = []
    for (unit, context, part), body, context_tokens, body_tokens in zip(
        drafts, bodies, counts, counts[len(drafts) :], strict=False
    ):
        row, rest = part.start, len(body)
        for text, tokens in _halved(body, body_tokens, max(1, measure.max_length - context_tokens - RESERVED), codec):
            end = row + text.count("\n") + (not text.endswith("\n"))
            rest -= len(text)
            ends = part.stop == unit.end and rest == 0
            result.append(Piece(unit, context, text, row, end, tokens, context_tokens + tokens + ends, ends))
            row = end if text.endswith("\n") else end - 1
    return result


def path_header(path: str, language: Language, codec: Codec, max_length: int) -> str:
    """The path as a comment; the last parts of it where the whole would take too much room."""
    if not path:
        return ""
    opens, closes = language.comment
    printable = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in path)
    for mark in ("-->", "*/"):
        printable = printable.replace(mark, "\N{REPLACEMENT CHARACTER}")
    parts = printable.split("/")
    candidates = [f"{opens}{printable}{closes}\n"]
    candidates += [
        f"{opens}\N{HORIZONTAL ELLIPSIS}/{'/'.join(parts[start:])}{closes}\n" for start in range(1, len(parts))
    ]
    candidates += [f"{opens}\N{HORIZONTAL ELLIPSIS}{parts[-1][-keep:]}{closes}\n" for keep in (24, 8)]
    allowed = max_length // _HEADER_SHARE
    return next((header for header in candidates if codec.count([header])[0] <= allowed), "")


def _parts(lines: Sequence[str], unit: Unit, measure: Measure, language: Language) -> Iterator[range]:
    """Row ranges that fit, broken at the best place in the second half of what would fit."""
    if measure.cost(unit.start, unit.end) <= measure.room(unit.scopes):
        yield range(unit.start, unit.end)
        return
    room = measure.room(unit.scopes if unit.head is None else (*unit.scopes, unit.head))
    ranks = break_ranks(lines, unit, language.grammar)
    start = unit.start
    while measure.cost(start, unit.end) > room:
        furthest = bisect_right(measure.totals, measure.totals[start] + room, lo=start) - 1
        middle = bisect_right(measure.totals, measure.totals[start] + room // 2, lo=start)
        end = start + 1
        if furthest > start:
            late = range(max(middle, start + 1), furthest + 1) or range(start + 1, furthest + 1)
            end = min(late, key=lambda row: (ranks[row - unit.start], -row))
        if end >= unit.end:
            break
        yield range(start, end)
        start = end
    yield range(start, unit.end)


def _halved(text: str, tokens: int, room: int, codec: Codec) -> Iterator[tuple[str, int]]:
    """Text in stretches that fit by an exact count: halved at a line end, a line that is too long by itself anywhere."""
    waiting = [(text, tokens)]
    while waiting:
        text, tokens = waiting.pop()
        if tokens <= room or len(text) == 1:
            yield text, tokens
            continue
        middle = len(text) // 2
        line_end = text.rfind("\n", 0, middle) + 1 or text.find("\n", middle) + 1
        at = line_end if 0 < line_end < len(text) else middle
        parts = (text[:at], text[at:])
        waiting.extend(zip(reversed(parts), reversed(codec.count(parts)), strict=True))
