"""The functions, methods and classes of a file, with their names: what a study item can be about."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from peft_core.data.grammars import Grammar
from peft_core.data.occurrences import NAME_TYPE

if TYPE_CHECKING:  # tree-sitter is loaded by the first file that needs it
    from tree_sitter import Node

MAX_SIGNATURE = 240  # characters
_MAX_SCOPES = 8
_MAX_DECLARATORS = 8
_OUTER_DIRECTORIES = ("src", "lib", "source", "sources")
_INDEX_FILES = ("__init__", "index")
_HOLDS_NAME = ("name", "left", "property", "key")
_MAY_BE_NAMELESS = ("function", "function_expression", "class", "definition")  # named by what they are assigned to
_SEPARATORS = re.compile(r"[^\w$!?@-]+|->")


class Definition(NamedTuple):
    """A function, method or class. Rows are 0-based, ranges end-exclusive."""

    name: str
    qualified: str  # the path without its extension and the enclosing classes, joined by dots
    kind: str  # function, method, class
    path: str
    start: int
    end: int
    signature: str  # on one line
    documented: bool

    @property
    def is_public(self) -> bool:
        own = self.qualified.split(".")[len(module_of(self.path)) :]
        return not any(part.startswith("_") for part in own)


def module_of(path: str) -> tuple[str, ...]:
    """Return the components of a path as a name begins with them.

    >>> module_of("src/pkg/client.py"), module_of("pkg/__init__.py")
    (('pkg', 'client'), ('pkg',))
    """
    parts = path.split("/")
    parts[-1] = parts[-1].split(".")[0]
    if len(parts) > 1 and parts[0] in _OUTER_DIRECTORIES:
        del parts[0]
    if len(parts) > 1 and parts[-1] in _INDEX_FILES:
        del parts[-1]
    return tuple(parts)


def components(name: str) -> tuple[str, ...]:
    """Return the parts of a name that is written with any language's separators.

    >>> components("pkg::Client->fetch()")
    ('pkg', 'Client', 'fetch')
    """
    return tuple(part for part in _SEPARATORS.split(name.replace("->", ".")) if part)


def definitions_of(root: Node, grammar: Grammar, path: str) -> Iterator[Definition]:
    """Yield the definitions of a file; functions that are local to another one are no API."""
    stack: list[tuple[Node, tuple[str, ...]]] = [(root, ())]
    while stack:
        node, scopes = stack.pop()
        kind = _kind(node, grammar, in_class=bool(scopes))
        name = _name(node, grammar) if kind else ""
        if kind and name and node.type != "impl_item":
            qualified = ".".join((*module_of(path), *scopes, name))
            yield Definition(
                name,
                qualified,
                kind,
                path,
                node.start_point.row,
                node.end_point.row + 1,
                _signature(node),
                _documented(node, grammar),
            )
        if kind in ("function", "method"):
            continue
        inner = (*scopes, name)[-_MAX_SCOPES:] if name else scopes
        stack += [(child, inner) for child in reversed(node.named_children)]


def _kind(node: Node, grammar: Grammar, *, in_class: bool) -> str:
    kind = node.type
    if kind in grammar.keyed and node.named_children:
        kind = f"{kind}:{(node.named_children[0].text or b'')[:40].decode('utf-8', 'replace')}"
    if kind in grammar.classes:
        return "class"
    if kind in grammar.functions or kind in grammar.methods:
        return "method" if in_class or kind in grammar.methods else "function"
    return ""


def _name(node: Node, grammar: Grammar) -> str:
    named = node.child_by_field_name("name")
    if named is None and (declared := node.child_by_field_name("declarator")) is not None:
        named = _innermost_declarator(declared)
    if named is None and node.type == "impl_item":
        named = node.child_by_field_name("type")
    if named is None and node.parent is not None and node.type.endswith(_MAY_BE_NAMELESS):
        holder = node.parent
        named = next((field for each in _HOLDS_NAME if (field := holder.child_by_field_name(each)) is not None), None)
        if named is None and node.type in ("arrow_function", "function_expression"):
            return ""  # an argument of a call: it has no name
    if named is None and node.type in grammar.keyed and len(node.named_children) > 1:
        named = node.named_children[1]
    leaf = _last_leaf(named) if named is not None else _first_leaf(node)
    return "" if leaf is None or leaf.text is None else leaf.text.decode("utf-8", "replace")


def _innermost_declarator(node: Node) -> Node:
    for _ in range(_MAX_DECLARATORS):
        inner = node.child_by_field_name("declarator")
        if inner is None:
            break
        node = inner
    return node


def _first_leaf(node: Node) -> Node | None:
    stack = [node]
    while stack:
        node = stack.pop()
        if not node.named_child_count and NAME_TYPE.search(node.type):
            return node
        stack += reversed(node.named_children)
    return None


def _last_leaf(node: Node) -> Node | None:
    """Return the last name of a dotted one, without the arguments of a generic type or of a call."""
    if not node.named_child_count:
        return node if NAME_TYPE.search(node.type) or node.type == "operator" else None
    named = [child for child in node.named_children if "argument" not in child.type and "parameter" not in child.type]
    return next((leaf for child in reversed(named) if (leaf := _last_leaf(child)) is not None), None)


def _signature(node: Node) -> str:
    body = node.child_by_field_name("body")
    text = node.text or b""
    head = text[: body.start_byte - node.start_byte] if body is not None else text.split(b"\n", 1)[0]
    words = " ".join(head[: 4 * MAX_SIGNATURE].decode("utf-8", "replace").split()).rstrip(" {:=>")
    return words if len(words) <= MAX_SIGNATURE else words[: MAX_SIGNATURE - 1] + "…"


def _documented(node: Node, grammar: Grammar) -> bool:
    body = node.child_by_field_name("body")
    if grammar.module == "tree_sitter_python":
        first = body.named_children[0] if body is not None and body.named_children else None
        return first is not None and "string" in (first.type, *(child.type for child in first.named_children[:1]))
    while node.parent is not None and node.parent.type in grammar.wrappers:
        node = node.parent
    before = node.prev_named_sibling
    while before is not None and before.type in grammar.leads:
        if node.start_point.row - before.end_point.row > 1:
            return False
        if "attribute" not in before.type and "decorator" not in before.type:
            return True
        node, before = before, before.prev_named_sibling
    return False
