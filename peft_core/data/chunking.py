"""Source text to units: functions, classes, methods, and the statements between them.

One algorithm for all languages: lay the children of a node side by side so that they cover its rows, and open those that
are too long. What differs between languages is a table (`languages.py`). Text that does not parse is cut all the same:
tree-sitter's error nodes are opened like any other.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from peft_core.data.languages import Grammar, Language, is_known_label

if TYPE_CHECKING:
    from tree_sitter import Node, Parser

import io
from dataclasses import field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # tree-sitter is loaded by the first file that needs it
    from tree_sitter import Node

from itertools import accumulate

_HEAD_ROWS = 6  # a longer signature is no reminder any more
_MAX_SCOPES = 8
_MAX_WRAPPERS = 8
_LICENCE = re.compile(rb"copyright|licen[cs]e|SPDX-", re.IGNORECASE)
_COMMENT = re.compile(r"\s*(#|//|--|;|%|/?\*|<!--|$)")  # how a row of a comment begins, whatever the language
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([\w+#.-]*)")
_WORST = 1 << 30


def split_into_units(lines: Sequence[str], language: Language, measure: TokenBudget) -> list[CodeUnit]:
    """Units of a file, in order; only what has no members to be opened may be longer than the measure allows."""
    if language.grammar is not None:
        units = _syntax(lines, language.grammar, measure)
    elif language.name == "markdown":
        units = _fences(lines)
    else:
        units = _paragraphs(lines)
    trimmed = (short for unit in units if (short := without_blank_edges(unit, lines)) is not None)
    return list(merge_small_units(trimmed, measure))


def single_unit(lines: Sequence[str], language: Language, kind: str) -> CodeUnit:
    """All rows as one unit, with its syntax at hand should it have to be split."""
    nodes = () if language.grammar is None else (_parse_lines(lines, language.grammar),)
    return CodeUnit(kind=kind, start=0, end=len(lines), nodes=nodes)


def break_ranks(lines: Sequence[str], unit: CodeUnit, grammar: Grammar | None) -> list[int]:
    """How bad it is to break a unit before each of its rows: the syntactic depth of what begins there."""
    indents = [len(line) - len(line.lstrip()) for line in lines[unit.start : unit.end]]
    if grammar is None or not unit.nodes:
        return _indent_ranks(lines, unit, indents)
    ranks = [_WORST] * len(indents)
    waiting = [(node, 0) for node in unit.nodes]
    while waiting:
        node, rank = waiting.pop()
        row = node.start_point.row - unit.start
        if 0 <= row < len(ranks) and node.start_point.column <= indents[row]:
            ranks[row] = min(ranks[row], rank)
        if node.start_point.row == node.end_point.row:
            continue
        led = -1
        for child in node.named_children:
            # A break behind a comment or a decorator would part it from what it speaks of.
            waiting.append((child, rank + (100 if child.start_point.row == led else 1)))
            led = _end_row(child) if child.type in grammar.leads else -1
    return ranks


def _indent_ranks(lines: Sequence[str], unit: CodeUnit, indents: Sequence[int]) -> list[int]:
    ranks = []
    for row, indent in enumerate(indents, unit.start):
        after_blank = row > 0 and not lines[row - 1].strip()
        ranks.append(indent + (0 if after_blank else 1_000) if lines[row].strip() else _WORST)
    return ranks


def _syntax(lines: Sequence[str], grammar: Grammar, measure: TokenBudget) -> Iterator[CodeUnit]:
    root = _parse_lines(lines, grammar)
    file = CodeUnit(kind="module", start=0, end=len(lines), loose=True, body=root, nodes=(root,))
    # A stack, not recursion: classes may be nested deeper than Python's stack allows.
    waiting = list(reversed(_members(file, grammar)))
    while waiting:
        unit = waiting.pop()
        if unit.body is None or measure.cost(unit.start, unit.end) <= measure.room(unit.scopes):
            yield unit
        else:
            waiting.extend(reversed(_members(unit, grammar)))


@dataclass(slots=True)
class _Group:
    """Sibling nodes that share rows, or follow a comment that speaks of them."""

    start: int
    end: int
    nodes: list[Node]
    main: Node | None  # None: comments only, so far


def _members(parent: CodeUnit, grammar: Grammar) -> list[CodeUnit]:
    """Units that cover the rows of a parent without gap or overlap."""
    body = parent.body
    first_of_file = parent.start == 0 and parent.head is None
    groups = [] if body is None else _groups(body.named_children, grammar, language_of_file=first_of_file)
    if not groups:
        return [replace(parent, body=None)]
    inside = parent.scopes if parent.head is None else (*parent.scopes, parent.head)[-_MAX_SCOPES:]
    units = []
    if groups[0].start > parent.start:
        units.append(replace(parent, end=groups[0].start, body=None, loose=True, opening=True))
    for group, end in zip(groups, [*(group.start for group in groups[1:]), parent.end], strict=True):
        unit = _unit(group, end, grammar, in_class=parent.kind == "class")
        if parent.head is not None and group.start < parent.head.stop:  # on the row of its parent's head
            unit = replace(unit, start=max(unit.start, parent.start), scopes=parent.scopes)
        else:
            unit = replace(unit, scopes=inside)
        units.append(unit)
    return units


def _groups(children: Iterable[Node], grammar: Grammar, *, language_of_file: bool) -> list[_Group]:
    groups: list[_Group] = []
    for child in children:
        start, end = child.start_point.row, _end_row(child)
        main = None if child.type in grammar.leads else child
        last = groups[-1] if groups else None
        if last is not None and (
            start < last.end
            or (last.main is None and start == last.end and not _is_licence(last, main, groups, language_of_file))
        ):
            last.nodes.append(child)
            last.end = max(last.end, end)
            last.main = last.main or main
        else:
            groups.append(_Group(start, end, [child], main))
    return groups


def _is_licence(group: _Group, follower: Node | None, groups: list[_Group], language_of_file: bool) -> bool:
    """A licence at the top of a file stays by itself, so that the copies in other files are seen as copies."""
    return language_of_file and len(groups) == 1 and follower is not None and _speaks_of_licence(group)


def _speaks_of_licence(group: _Group) -> bool:
    return group.main is None and any(_LICENCE.search(node.text or b"") for node in group.nodes)


def _unit(group: _Group, end: int, grammar: Grammar, *, in_class: bool) -> CodeUnit:
    rest = CodeUnit(kind="class" if in_class else "module", start=group.start, end=end, nodes=tuple(group.nodes))
    if group.main is None:
        licence = not in_class and group.start == 0 and _speaks_of_licence(group)
        return replace(rest, kind=LICENCE if licence else rest.kind, loose=True, alone=licence)
    definition = _definition(group.main, grammar)
    if definition.type in grammar.functions:
        return replace(rest, kind="method" if in_class else "function", head=_head(definition))
    if definition.type in grammar.methods:
        return replace(rest, kind="method", head=_head(definition))
    if definition.type in grammar.classes:
        return replace(rest, kind="class", head=_head(definition), body=_body(definition))
    if definition.type in grammar.scopes or definition.is_error:
        return replace(rest, loose=True, head=_head(definition), body=_body(definition) or definition)
    return replace(rest, loose=True)


def _definition(node: Node, grammar: Grammar) -> Node:
    """What is defined behind `export`, decorators, `template <...>` or `const name =`."""
    meant = grammar.functions | grammar.classes | grammar.scopes | grammar.methods | grammar.wrappers
    for _ in range(_MAX_WRAPPERS):
        inner = None
        if node.type in grammar.wrappers:
            inner = next((child for child in node.named_children if child.type in meant), None)
        if inner is None:
            break
        node = inner
    return node


def _body(definition: Node) -> Node | None:
    body = definition.child_by_field_name("body")
    if body is None and definition.named_children:  # some grammars forget the field
        last = definition.named_children[-1]
        body = last if last.type.endswith(("_body", "_list", "block")) else None
    return body


def _head(definition: Node) -> range | None:
    """Rows from the start of a definition to where its body opens."""
    body = _body(definition)
    if body is None:
        return None
    first, opens = definition.start_point.row, body.start_point.row
    end = opens + 1
    if opens != first and not (body.child_count and body.children[0].type == "{"):
        before = body.prev_sibling
        while before is not None and before.type == "comment":
            before = before.prev_sibling
        end = opens if before is None else _end_row(before)
    return range(first, end if end - first <= _HEAD_ROWS else first + 1)


def _end_row(node: Node) -> int:
    """The row behind a node; some nodes hold their line end."""
    row, column = node.end_point
    return max(row if column == 0 else row + 1, node.start_point.row + 1)


def _paragraphs(lines: Sequence[str]) -> Iterator[CodeUnit]:
    """Blocks that begin at the left edge, behind a blank row."""
    start = 0
    for row in (*range(1, len(lines)), len(lines)):
        if row == len(lines) or (not lines[row - 1].strip() and lines[row][:1].strip()):
            licence = start == 0 and _is_licence_text(lines[:row])
            yield CodeUnit(kind=LICENCE if licence else "block", start=start, end=row, alone=licence)
            start = row


def _is_licence_text(lines: Sequence[str]) -> bool:
    return all(map(_COMMENT.match, lines)) and _LICENCE.search("".join(lines).encode()) is not None


def _fences(lines: Sequence[str]) -> Iterator[CodeUnit]:
    """Fenced code blocks of a Markdown text, those whose language is named and known."""
    start, fence, known = -1, "", False
    for row, line in enumerate(lines):
        match = _FENCE.match(line)
        if match is None:
            continue
        mark, label = match.groups()
        if start < 0:
            start, fence, known = row, mark, is_known_label(label)
        elif mark.startswith(fence) and not label:
            if known:
                yield CodeUnit(kind="block", start=start, end=row + 1, alone=True)
            start = -1


def _parse_lines(lines: Sequence[str], grammar: Grammar) -> Node:
    return parse_syntax("".join(lines).encode(), grammar)


def parse_syntax(raw: bytes, grammar: Grammar) -> Node:
    """The root of a text's syntax tree, in UTF-8."""
    return _parser(grammar).parse(raw).root_node


@cache
def _parser(grammar: Grammar) -> Parser:
    from tree_sitter import Language as TreeSitterLanguage  # noqa: PLC0415 - loaded by the first file that needs it
    from tree_sitter import Parser  # noqa: PLC0415

    package = importlib.import_module(grammar.module)
    return Parser(TreeSitterLanguage(getattr(package, grammar.function)()))


# FOLDED FROM peft_core.data.chunking: A unit: rows of a file that belong together. How units are cleaned and joined,
# whatever cut them.
#
# Everything is counted in rows (0-based lines), because whoever writes code thinks in lines: the units of a file never
# overlap, and every row that is not blank lies in exactly one of them.
#

# Neighbours that together stay below this are one unit: a third of max_length, but never more than this many tokens,
# for an example should hold about one thought. Functions of real code have 120 tokens in the median.
MERGE_SHARE = 3
MERGE_MAX_TOKENS = 256
_BARE_HEAD_TOKENS = 32
LICENCE = "licence"


@dataclass(frozen=True, slots=True)
class CodeUnit:
    """Rows [start, end) that belong together."""

    kind: str  # function, class, method, module, block, licence
    start: int
    end: int
    scopes: tuple[range, ...] = ()  # rows of the heads of the definitions around it, outermost first
    head: range | None = None  # rows of its own head: what a continuation of it needs to be understood
    loose: bool = False  # statements that may be gathered, not a definition
    opening: bool = False  # begins with the head of the scope whose members follow
    alone: bool = False  # never merge_small_units
    body: Node | None = field(default=None, repr=False)  # where its own members are
    nodes: tuple[Node, ...] = field(default=(), repr=False)


def split_lines(text: str) -> list[str]:
    """Lines with their ends, split at line feeds only, as tree-sitter and editors count them."""
    return io.StringIO(text, newline="\n").readlines()


def without_blank_edges(unit: CodeUnit, lines: Sequence[str]) -> CodeUnit | None:
    """None for a unit that is blank altogether."""
    start, end = unit.start, unit.end
    while start < end and not lines[start].strip():
        start += 1
    while end > start and not lines[end - 1].strip():
        end -= 1
    return replace(unit, start=start, end=end) if start < end else None


def merge_small_units(units: Iterable[CodeUnit], measure: TokenBudget) -> Iterator[CodeUnit]:
    """Small neighbours joined, so that one-line functions do not become thousands of tiny examples."""
    current: CodeUnit | None = None
    for unit in units:
        joined = None if current is None else _joined(current, unit, measure)
        if current is not None and joined is None:
            yield current
        current = joined or unit
    if current is not None:
        yield current


def _joined(first: CodeUnit, second: CodeUnit, measure: TokenBudget) -> CodeUnit | None:
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
    return CodeUnit(
        kind=kind,
        start=first.start,
        end=second.end,
        scopes=first.scopes,
        head=first.head if first.opening else None,
        loose=first.loose and second.loose,
        opening=first.opening,
        nodes=(*first.nodes, *second.nodes),
    )


# FOLDED FROM peft_core.data.chunking: Tokens of rows, by prefix sums: whether a range of rows fits is one subtraction.

CONTEXT_SHARE = 4  # of max_length, at most, for the heads of enclosing definitions


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """What rows cost in tokens, and how many tokens an example may have."""

    max_length: int
    overhead: int  # path header and end-of-text
    totals: Sequence[int]  # tokens of all rows before this one

    @classmethod
    def of(cls, costs: Iterable[int], *, max_length: int, overhead: int) -> TokenBudget:
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
