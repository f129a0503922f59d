"""The names in a syntax tree, and what each is used for.

The rules hold for all grammars: they look at leaves and their neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import Enum, auto
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tree_sitter import Node

NAME_TYPE = re.compile(r"(?:^|_)(?:identifier|name|constant|alias|word)$")  # types of leaves that are names
_IMPORT = re.compile(
    r"(future_)?import(_from)?(_statement|_declaration)?|use_declaration|using_directive|preproc_include|namespace_use_declaration"
)
_NAMES_ITSELF = re.compile(r"definition|declarat|_item$|_spec|function|^method|^class|signature|binding|parameter")
_NOT_A_DEFINITION = re.compile(r"call|invocation|access|expression$|argument")
_TEXT = re.compile(rb"[\"'<`]([^\"'>`\s]+)[\"'>`]")
_ASSIGNED = re.compile(rb"\s*(?::[^=\n(){}]+)?=(?![=>~])")


class Role(Enum):
    """What a name is used for."""

    PLAIN = auto()
    CALL = auto()  # of a plain name
    ACCESS = auto()  # behind a dot, an arrow or a double colon
    KEYWORD = auto()  # of an argument
    IMPORT = auto()
    DEFINITION = auto()


class Occurrence(NamedTuple):
    name: str
    role: Role
    row: int
    called: bool  # what follows it is an argument list
    node: Node


@cache
def _is_name(kind: str) -> bool:
    return NAME_TYPE.search(kind) is not None


@cache
def is_import(kind: str) -> bool:
    return _IMPORT.fullmatch(kind) is not None


def occurrences(root: Node, raw: bytes) -> Iterator[Occurrence]:
    """Yield the names in a tree in order. `raw` is the text that was parsed; strings and comments hold no names."""
    cursor = root.walk()
    imported_to = 0  # the byte at which the last import ends
    while True:
        node = cursor.node
        assert node is not None  # noqa: S101 - for mypy
        if is_import(node.type):
            imported_to = max(imported_to, node.end_byte)
        if node.type == "import_spec" and (name := _package_of(node)):  # of Go, where the path says the name
            yield Occurrence(name, Role.IMPORT, node.start_point.row, called=False, node=node)
        elif _is_name(node.type) and node.named_child_count == 0:
            yield _occurrence(node, cursor.field_name, raw, imported=node.start_byte < imported_to)
        if cursor.goto_first_child():
            continue
        while not cursor.goto_next_sibling():
            if not cursor.goto_parent():
                return


def _package_of(node: Node) -> str:
    if node.child_by_field_name("name") is not None:
        return ""
    return (node.text or b"").decode("utf-8", "replace").strip('"`').rpartition("/")[2]


def _occurrence(node: Node, field: str | None, raw: bytes, *, imported: bool) -> Occurrence:
    start, end = node.start_byte, node.end_byte
    called = raw[end : end + 1] == b"(" or raw[end : end + 2] == b"!("
    role = Role.PLAIN
    if imported:
        role = Role.IMPORT
    elif _follows_connector(raw, start):
        role = Role.ACCESS
    else:
        parent = node.parent
        kind = "" if parent is None else parent.type
        if kind == "method_index_expression" and field == "method":  # Lua's object:method()
            role = Role.ACCESS
        elif kind == "keyword_argument" and field == "name":
            role = Role.KEYWORD
        elif field in ("name", "declarator") and _NAMES_ITSELF.search(kind) and not _NOT_A_DEFINITION.search(kind):
            role = Role.DEFINITION
        elif called:
            role = Role.CALL
    return Occurrence(raw[start:end].decode("utf-8", "replace"), role, node.start_point.row, called, node)


def _follows_connector(raw: bytes, start: int) -> bool:
    before = raw[max(0, start - 2) : start]
    return before in (b"->", b"::") or (before.endswith(b".") and before != b"..")


class Import(NamedTuple):
    """One imported module, with what is imported from it."""

    root: str  # the first part of its name; "." for a relative path
    texts: tuple[str, ...]  # the strings in the statement, such as paths
    node: Node


def import_of(node: Node, raw: bytes) -> Import:
    """Return the import that a name belongs to: `import a, b` imports two modules."""
    while node.parent is not None and not is_import(node.type):
        if node.type == "import_spec":
            break
        if node.parent.type == "import_statement" and node.type in ("dotted_name", "aliased_import"):
            break
        node = node.parent
    texts = tuple(text.decode("utf-8", "replace") for text in _TEXT.findall(node.text or b""))
    root = _root_of(texts[0]) if texts else next((each.name for each in occurrences(node, raw)), "")
    return Import(root, texts, node)


def _root_of(path: str) -> str:
    """Return the first part of a path: `@scope/package/deep` begins with `@scope`, `node:fs` with `node`."""
    return "." if path.startswith(".") else re.split(r"[./:\\]", path, maxsplit=1)[0]


def is_assigned(node: Node, raw: bytes) -> bool:
    """Return whether a value is assigned to what a name stands for."""
    return _ASSIGNED.match(raw, node.end_byte) is not None


def object_of(node: Node, raw: bytes) -> str | None:
    """Return the first name of the expression that an accessed name belongs to: `a` of `a.b().c`; None for a literal."""
    while node.parent is not None and node.parent.start_byte == node.start_byte:
        node = node.parent
    parent = node.parent
    if parent is None:
        return None
    while parent.parent is not None and parent.start_byte == node.start_byte:
        parent = parent.parent
    return first_name(parent, raw)


def first_name(node: Node | None, raw: bytes) -> str | None:
    """Return the name that an expression begins with; None if it begins with anything else."""
    while node is not None:
        if node.named_child_count == 0:
            is_name = _is_name(node.type) or node.type in ("this", "self", "super")
            return raw[node.start_byte : node.end_byte].decode("utf-8", "replace") if is_name else None
        if "string" in node.type or node.type in ("list", "dictionary", "array", "object"):
            return None
        node = node.named_children[0]
    return None
