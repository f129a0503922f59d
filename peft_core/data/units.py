"""A unit: rows of a file that belong together. How units are cleaned and joined, whatever cut them.

Everything is counted in rows (0-based lines), because whoever writes code thinks in lines: the units of a file never
overlap, and every row that is not blank lies in exactly one of them.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from peft_core.data.measure import Measure

if TYPE_CHECKING:  # tree-sitter is loaded by the first file that needs it
    from tree_sitter import Node

# Neighbours that together stay below this are one unit: a third of max_length, but never more than this many tokens,
# for an example should hold about one thought. Functions of real code have 120 tokens in the median.
MERGE_SHARE = 3
MERGE_MAX_TOKENS = 256
_BARE_HEAD_TOKENS = 32
LICENCE = "licence"


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows [start, end) that belong together."""

    kind: str  # function, class, method, module, block, licence
    start: int
    end: int
    scopes: tuple[range, ...] = ()  # rows of the heads of the definitions around it, outermost first
    head: range | None = None  # rows of its own head: what a continuation of it needs to be understood
    loose: bool = False  # statements that may be gathered, not a definition
    opening: bool = False  # begins with the head of the scope whose members follow
    alone: bool = False  # never merged
    body: Node | None = field(default=None, repr=False)  # where its own members are
    nodes: tuple[Node, ...] = field(default=(), repr=False)


def rows(text: str) -> list[str]:
    """Lines with their ends, split at line feeds only, as tree-sitter and editors count them."""
    return io.StringIO(text, newline="\n").readlines()


def without_blank_edges(unit: Unit, lines: Sequence[str]) -> Unit | None:
    """None for a unit that is blank altogether."""
    start, end = unit.start, unit.end
    while start < end and not lines[start].strip():
        start += 1
    while end > start and not lines[end - 1].strip():
        end -= 1
    return replace(unit, start=start, end=end) if start < end else None


def merged(units: Iterable[Unit], measure: Measure) -> Iterator[Unit]:
    """Small neighbours joined, so that one-line functions do not become thousands of tiny examples."""
    current: Unit | None = None
    for unit in units:
        joined = None if current is None else _joined(current, unit, measure)
        if current is not None and joined is None:
            yield current
        current = joined or unit
    if current is not None:
        yield current


def _joined(first: Unit, second: Unit, measure: Measure) -> Unit | None:
    inside = (*first.scopes, first.head) if first.opening and first.head is not None else first.scopes
    if first.alone or second.alone or second.opening or second.scopes not in (first.scopes, inside):
        return None
    room = measure.room(first.scopes)
    limit = min(room, measure.max_length // MERGE_SHARE, MERGE_MAX_TOKENS)
    bare_head = first.opening and first.loose and measure.cost(first.start, first.end) <= _BARE_HEAD_TOKENS
    if second.scopes == inside and first.loose and (second.loose or bare_head):
        limit = room
    if measure.cost(first.start, second.end) > limit:
        return None
    kind = first.kind
    if second.kind != first.kind:
        kind = "class" if second.kind == "method" or first.kind == "method" or first.opening else "module"
    return Unit(
        kind=kind,
        start=first.start,
        end=second.end,
        scopes=first.scopes,
        head=first.head if first.opening else None,
        loose=first.loose and second.loose,
        opening=first.opening,
        nodes=(*first.nodes, *second.nodes),
    )
