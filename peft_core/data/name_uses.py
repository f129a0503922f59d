"""Where a file uses names, and which of its rows are prose.

Both come from the syntax tree: a language without a grammar has neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from peft_core.data.languages import Language
from peft_core.data.occurrences import Occurrence, Role, is_assigned, occurrences
from peft_core.data.syntax import parse_syntax

if TYPE_CHECKING:  # tree-sitter is loaded by the first file that needs it
    from tree_sitter import Node

_STATEMENT = ("expression_statement", "block", "module", "class_body")  # a string that is one is a docstring


class NameUse(NamedTuple):
    """An identifier in a text, in characters."""

    start: int
    end: int
    is_definition: bool  # here the name is chosen: nothing before it says what it will be


class FileSyntax(NamedTuple):
    """What the syntax tree of a file says."""

    uses: list[NameUse]  # in order
    prose: frozenset[int]  # rows, from 0, that begin with or in a comment, a docstring, or a string of several rows


def read_syntax(text: str, language: Language) -> FileSyntax:
    """Return the identifiers of a file, without those in comments and strings, and its rows of prose."""
    raw = text.encode()
    root = None if language.grammar is None else parse_syntax(raw, language.grammar)
    if root is None:
        return FileSyntax([], frozenset())
    at = _character_offsets(raw) if len(raw) != len(text) else range(len(raw) + 1)
    uses, seen = [], set[str]()
    for found in occurrences(root, raw):
        start, end = found.node.start_byte, found.node.end_byte
        if end > start:  # empty: the parser missed one
            uses.append(NameUse(at[start], at[end], _is_chosen(found, raw, is_first=found.name not in seen)))
            seen.add(found.name)
    return FileSyntax(uses, frozenset(_prose_rows(root, raw)))


def _is_chosen(found: Occurrence, raw: bytes, *, is_first: bool) -> bool:
    """Return whether a name is defined where it stands: a definition, a parameter, or what is assigned first in the file."""
    node, parent = found.node, found.node.parent
    if parent is None or found.role not in (Role.DEFINITION, Role.PLAIN, Role.ACCESS):
        return False
    if found.role is Role.DEFINITION:  # but `struct frame *f` of C only uses `frame`
        return not parent.type.endswith("_specifier") or parent.child_by_field_name("body") is not None
    if "type" in node.type or parent.type == "type":
        return False
    if found.role is Role.PLAIN and "param" in parent.type:
        return parent.child_by_field_name("value") != node
    is_left = parent.type == "assignment" and parent.child_by_field_name("left") == node  # `field: int` too
    return is_first and (is_left or is_assigned(node, raw))


def _prose_rows(root: Node, raw: bytes) -> Iterator[int]:
    cursor = root.walk()
    while True:
        node = cursor.node
        assert node is not None  # noqa: S101 - for mypy
        if "comment" in node.type or "string" in node.type:
            first, last = node.start_point.row, node.end_point.row
            line = raw[raw.rfind(b"\n", 0, node.start_byte) + 1 : node.start_byte]
            is_prose = "comment" in node.type or (node.parent is not None and node.parent.type in _STATEMENT)
            if is_prose and not line.strip():
                yield first
            yield from range(first + 1, last + (node.end_point.column > 0))
        elif cursor.goto_first_child():
            continue
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                return


def _character_offsets(raw: bytes) -> list[int]:
    """Return for each byte of UTF-8 text the number of characters before it, and their total at the end."""
    offsets, characters = [], 0
    for byte in raw:
        offsets.append(characters)
        characters += byte & 0xC0 != 0x80
    # A continuation byte has the offset of the next character, which no identifier begins or ends with.
    return [*offsets, characters]
