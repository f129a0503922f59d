"""Split source text into code units: functions, classes, methods, and the statements between them.

In: the lines of one file, its language, and a `TokenBudget` (how many tokens an example may have, and what each line costs).
Out: `CodeUnit`s in file order. Units never overlap, and every line that is not blank is in exactly one of them (in Markdown:
every line of a fenced code block in a known language). Positions are rows: 0-based line numbers, ranges end-exclusive.

1. Split. Files in a language with a grammar are split at the nodes of their syntax tree: sibling nodes are laid side by side so
   that they cover all rows, and a node that exceeds the budget is opened and replaced by its children. Everything specific to
   a language is in the table in `languages.py`. Text with syntax errors is split too, since tree-sitter's error nodes can be
   opened like any other node. Other files are split at blank lines, Markdown at its fences.
2. Merge. Small neighbouring units are joined, so that one-line functions do not become thousands of tiny examples.

Only a unit that has no members to open may exceed the budget; `examples.py` breaks such a unit into several chunks.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from peft_core.data.grammars import Grammar, embedded_grammar
from peft_core.data.languages import Language, is_known_label
from peft_core.data.syntax import parse_syntax

if TYPE_CHECKING:  # tree-sitter is loaded by the first file that needs it
    from tree_sitter import Node

LICENCE = "licence"  # the kind of a unit that is a licence header
CONTEXT_SHARE = 4  # the headers of enclosing definitions take at most 1/4 of max_length
# Merged units have at most 1/3 of max_length, and at most 256 tokens: an example should hold about one thought. The median
# function of real code has 120 tokens.
MERGE_SHARE = 3
MERGE_MAX_TOKENS = 256
_BARE_HEADER_TOKENS = 32
_MAX_HEADER_ROWS = 6  # a longer signature is cut to its first row
_MAX_SCOPES = 8
_MAX_WRAPPERS = 8
_MAX_KEYWORD = 40
_NEVER_BREAK = 1 << 30  # rank of a row that no break should precede
_LICENCE = re.compile(rb"copyright|licen[cs]e|SPDX-", re.IGNORECASE)
_COMMENT_LINE = re.compile(
    r"\s*(#|//|--|;|%|'|!|\"|/?\*|\(\*|<!--|<%#|<%--|\{#|\{\{!|@\*|REM\b|$)"
)  # how a comment line begins, in any language
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*(?:\{\.?)?([\w+#.-]*)")


class UnitRole(Enum):
    """How a unit may be merged with its neighbours; `_MERGED_ROLE` is the decision table."""

    DEFINITION = auto()  # a function, a class, a paragraph, or a mixture
    STATEMENTS = auto()  # only statements and comments between definitions
    SCOPE_OPENING = auto()  # the header of a scope whose members follow, and only statements after it
    SCOPE_OPENING_WITH_MEMBERS = auto()  # the header of a scope and some of the definitions in it
    STANDALONE = auto()  # never merged


@dataclass(frozen=True, slots=True)
class CodeUnit:
    """Rows [start, end) of a file that belong together."""

    kind: str  # function, class, method, module, block, licence
    start: int
    end: int
    role: UnitRole = UnitRole.DEFINITION
    scopes: tuple[range, ...] = ()  # rows of the headers of the enclosing definitions, outermost first
    header: range | None = None  # rows of the unit's own header, which give context to a continuation of it
    body: Node | None = field(default=None, repr=False)  # the node whose children are the unit's members
    main: Node | None = field(
        default=None, repr=False
    )  # the body, if it is the definition itself: header rows are no members
    nodes: tuple[Node, ...] = field(default=(), repr=False)
    grammar: Grammar | None = field(default=None, repr=False)  # of the body


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """What each row costs in tokens, and how many tokens an example may have."""

    max_length: int
    overhead: int  # tokens of the path header and end-of-text
    tokens_before: Sequence[int]  # tokens of all rows before this one: the cost of a range is one subtraction

    @classmethod
    def of(cls, costs: Iterable[int], *, max_length: int, overhead: int) -> TokenBudget:
        return cls(max_length, overhead, [0, *accumulate(costs)])

    def cost(self, start: int, end: int) -> int:
        return self.tokens_before[end] - self.tokens_before[start]

    def context(self, scopes: Sequence[range]) -> tuple[range, ...]:
        """Return the innermost of these headers, as many as fit into the share for context."""
        fitting: list[range] = []
        free_tokens = self.max_length // CONTEXT_SHARE
        for scope in reversed(scopes):
            free_tokens -= self.cost(scope.start, scope.stop)
            if free_tokens < 0:
                break
            fitting.append(scope)
        return tuple(reversed(fitting))

    def free_tokens(self, scopes: Sequence[range]) -> int:
        """Return how many tokens are left for the rows of a unit in these scopes; at least one."""
        context_tokens = sum(self.cost(scope.start, scope.stop) for scope in self.context(scopes))
        return max(1, self.max_length - self.overhead - context_tokens)


class SplitFile(NamedTuple):
    units: list[CodeUnit]
    definitions: int  # functions, methods and classes, or paragraphs where there is no grammar; at least one


def split_lines(text: str) -> list[str]:
    """Return the lines with their ends, split at line feeds only, as tree-sitter and editors count them."""
    return io.StringIO(text, newline="\n").readlines()


def split_into_units(lines: Sequence[str], language: Language, budget: TokenBudget) -> SplitFile:
    """Return the units of a file, in order. Only units without members may exceed the budget."""
    root = _parse_lines(lines, language.grammar)
    if root is not None and language.grammar is not None:
        units = _syntax_units(root, len(lines), language.grammar, budget)
        definitions = _count_definitions(root, language.grammar)
    else:
        units = iter([*(_fenced_blocks(lines) if language.name == "markdown" else _paragraphs(lines))])
        definitions = None
    trimmed = [unit for untrimmed in units if (unit := _without_blank_edges(untrimmed, lines)) is not None]
    if definitions is None:
        definitions = sum(unit.kind != LICENCE for unit in trimmed)
    return SplitFile(list(_merge_small_units(trimmed, budget)), max(definitions, 1 if trimmed else 0))


def split_finely(lines: Sequence[str], language: Language) -> list[CodeUnit]:
    """Return the finest units of a file, in order: each function and method, and runs of statements without a blank line.

    They depend on the text alone, not on a token budget, and an edit changes only the units that hold its lines: this is what
    two versions of a file are compared by. Licence headers are left out.
    """
    opens_everything = TokenBudget(max_length=1, overhead=0, tokens_before=range(0, 2 * len(lines) + 2, 2))
    root = _parse_lines(lines, language.grammar)
    if root is not None and language.grammar is not None:
        units = _syntax_units(root, len(lines), language.grammar, opens_everything)
    else:
        units = iter([*(_fenced_blocks(lines) if language.name == "markdown" else _paragraphs(lines))])
    found: list[CodeUnit] = []
    for untrimmed in units:
        unit = _without_blank_edges(untrimmed, lines)
        if unit is None or unit.kind == LICENCE:
            continue
        if found and _continues(found[-1], unit):
            found[-1] = replace(found[-1], end=unit.end)
        else:
            found.append(unit)
    return found


def _continues(first: CodeUnit, second: CodeUnit) -> bool:
    """Return whether both units are statements of one scope, or of a scope and its header, without a blank line between."""
    follows = first.role in (UnitRole.STATEMENTS, UnitRole.SCOPE_OPENING) and second.role is UnitRole.STATEMENTS
    return follows and first.end == second.start


def single_unit(lines: Sequence[str], language: Language, kind: str) -> CodeUnit:
    """Return all rows as one unit, with the syntax tree that `break_ranks` needs if the unit is too long."""
    root = _parse_lines(lines, language.grammar)
    return CodeUnit(kind=kind, start=0, end=len(lines), nodes=() if root is None else (root,), grammar=language.grammar)


def break_ranks(lines: Sequence[str], unit: CodeUnit) -> list[int]:
    """Return for each row of a unit how bad a break before it would be: the syntactic depth of what begins in the row."""
    indents = [len(line) - len(line.lstrip()) for line in lines[unit.start : unit.end]]
    if unit.grammar is None or not unit.nodes:
        return _indent_ranks(lines, unit, indents)
    ranks = [_NEVER_BREAK] * len(indents)
    stack = [(node, 0) for node in unit.nodes]
    while stack:
        node, rank = stack.pop()
        row = node.start_point.row - unit.start
        if 0 <= row < len(ranks) and node.start_point.column <= indents[row]:
            ranks[row] = min(ranks[row], rank)
        if node.start_point.row == node.end_point.row:
            continue
        annotated_row = -1
        for child in node.named_children:
            # A break after a comment or a decorator would separate it from the code that it describes.
            stack.append((child, rank + (100 if child.start_point.row == annotated_row else 1)))
            annotated_row = _end_row(child) if child.type in unit.grammar.leads else -1
    return ranks


def _indent_ranks(lines: Sequence[str], unit: CodeUnit, indents: Sequence[int]) -> list[int]:
    ranks = []
    for row, indent in enumerate(indents, unit.start):
        after_blank = row > 0 and not lines[row - 1].strip()
        ranks.append(indent + (0 if after_blank else 1_000) if lines[row].strip() else _NEVER_BREAK)
    return ranks


# Splitting at the syntax tree.


def _parse_lines(lines: Sequence[str], grammar: Grammar | None) -> Node | None:
    return None if grammar is None else parse_syntax("".join(lines).encode(), grammar)


def _syntax_units(root: Node, rows: int, grammar: Grammar, budget: TokenBudget) -> Iterator[CodeUnit]:
    # A stack instead of recursion: classes may be nested deeper than Python's stack allows.
    stack = list(reversed(_members(_file_unit(root, rows, grammar))))
    while stack:
        unit = stack.pop()
        if unit.body is None or budget.cost(unit.start, unit.end) <= budget.free_tokens(unit.scopes):
            yield unit
        else:
            stack.extend(reversed(_members(unit)))


def _file_unit(root: Node, rows: int, grammar: Grammar) -> CodeUnit:
    return CodeUnit(
        kind="module", start=0, end=rows, role=UnitRole.STATEMENTS, body=root, nodes=(root,), grammar=grammar
    )


def _count_definitions(root: Node, grammar: Grammar) -> int:
    """Return the number of functions, methods and classes, without functions that are local to another one."""
    count = 0
    stack = [_file_unit(root, root.end_point.row + 1, grammar)]
    while stack:
        parent = stack.pop()
        body, grammar_of_body = _members_node(parent)
        if body is None or grammar_of_body is None:
            continue
        previous: Node | None = None
        for child in _children(parent, body, grammar_of_body):
            if child.type in grammar_of_body.leads:
                continue
            kind = _type(node := _unwrapped(child, grammar_of_body), grammar_of_body)
            if kind in grammar_of_body.definitions:
                count += not _is_continued_by(previous, child, grammar_of_body)
            if node.is_error or kind in grammar_of_body.openable:
                stack.append(_unit(_Group(0, 0, [child], child), 0, grammar_of_body, in_class=False))
            previous = child
    return count


@dataclass(slots=True)
class _Group:
    """Sibling nodes that share rows, and the comments and decorators directly before them."""

    start: int
    end: int
    nodes: list[Node]
    main: Node | None  # the first node that is no comment or decorator; None: there is none yet


def _members(parent: CodeUnit) -> list[CodeUnit]:
    """Open a unit: return units that cover its rows without gap or overlap."""
    body, grammar = _members_node(parent)
    if body is None or grammar is None:
        return [replace(parent, body=None)]
    groups = _groups(parent, body, grammar)
    if not groups:
        return [replace(parent, body=None)]
    member_scopes = parent.scopes if parent.header is None else (*parent.scopes, parent.header)[-_MAX_SCOPES:]
    units = []
    if groups[0].start > parent.start:
        units.append(replace(parent, end=groups[0].start, body=None, role=UnitRole.SCOPE_OPENING))
    for group, end in zip(groups, [*(group.start for group in groups[1:]), parent.end], strict=True):
        unit = _unit(group, end, grammar, in_class=parent.kind == "class")
        if parent.header is not None and group.start < parent.header.stop:  # a member on the row of its parent's header
            unit = replace(unit, start=max(unit.start, parent.start), scopes=parent.scopes)
        else:
            unit = replace(unit, scopes=member_scopes)
        units.append(unit)
    return units


def _members_node(parent: CodeUnit) -> tuple[Node | None, Grammar | None]:
    """Return the node whose children are the members of a unit, and its grammar: a script in HTML is parsed for it."""
    if parent.body is None or parent.grammar is None or parent.body.type not in parent.grammar.embeds:
        return parent.body, parent.grammar
    tag = parent.body.named_children[0].text or b""
    grammar = embedded_grammar(parent.body.type, tag)
    text = next((child for child in parent.body.named_children if child.type == "raw_text"), None)
    if grammar is None or text is None or text.text is None:
        return None, None
    return parse_syntax(b"\n" * text.start_point.row + text.text, grammar), grammar  # rows are those of the file


def _children(parent: CodeUnit, body: Node, grammar: Grammar) -> Iterator[Node]:
    """Yield the children of a body, with what leads the first of them: some grammars put it before the body."""
    header = parent.header
    leads: list[Node] = []
    before = None if header is None or body.parent is None else body.prev_named_sibling
    while header is not None and before is not None and before.type in grammar.leads:
        if before.start_point.row >= header.stop:
            leads.append(before)
        before = before.prev_named_sibling
    yield from reversed(leads)
    first_row = header.stop if header is not None and body == parent.main else 0
    stack = list(reversed(body.named_children))
    while stack:
        child = stack.pop()
        if child.type in grammar.transparent:
            stack.extend(reversed(child.named_children))
        elif child.start_point.row >= first_row:
            yield child


def _groups(parent: CodeUnit, body: Node, grammar: Grammar) -> list[_Group]:
    groups: list[_Group] = []
    starts_file = parent.start == 0 and parent.header is None
    for child in _children(parent, body, grammar):
        start, end = child.start_point.row, _end_row(child)
        main = None if child.type in grammar.leads else child
        last = groups[-1] if groups else None
        if last is not None and (
            start < last.end
            or _is_annotated_by(last, start, main, groups, starts_file)
            or _is_continued_by(last.main, main, grammar)
        ):
            last.nodes.append(child)
            last.end = max(last.end, end)
            last.main = last.main or main
        else:
            groups.append(_Group(start, end, [child], main))
    return groups


def _is_continued_by(first: Node | None, second: Node | None, grammar: Grammar) -> bool:
    """Return whether a node is one more equation of the function that the node before it defines."""
    if first is None or second is None or not {first.type, second.type} <= grammar.equations:
        return False
    name, other = first.child_by_field_name("name"), second.child_by_field_name("name")
    return name is not None and other is not None and name.text == other.text


def _is_annotated_by(group: _Group, start: int, main: Node | None, groups: list[_Group], starts_file: bool) -> bool:
    """Return whether a group of comments describes the node that starts in the row after it.

    A licence at the top of a file describes no node. It stays a unit of its own, so that deduplication finds its copies.
    """
    if group.main is not None or start != group.end:
        return False
    heads_file = starts_file and len(groups) == 1
    return not (heads_file and main is not None and _mentions_licence(group))


def _mentions_licence(group: _Group) -> bool:
    return group.main is None and any(_LICENCE.search(node.text or b"") for node in group.nodes)


def _unit(group: _Group, end: int, grammar: Grammar, *, in_class: bool) -> CodeUnit:
    statements = CodeUnit(
        kind="class" if in_class else "module",
        start=group.start,
        end=end,
        role=UnitRole.STATEMENTS,
        nodes=tuple(group.nodes),
        grammar=grammar,
    )
    if group.main is None:
        is_licence = not in_class and group.start == 0 and _mentions_licence(group)
        return replace(statements, kind=LICENCE, role=UnitRole.STANDALONE) if is_licence else statements
    return _classified(_unwrapped(group.main, grammar), statements, grammar, in_class=in_class)


def _classified(node: Node, statements: CodeUnit, grammar: Grammar, *, in_class: bool) -> CodeUnit:
    """Return the unit of a node as what the node is: a definition, a scope, or still statements."""
    kind = _type(node, grammar)
    definition = UnitRole.DEFINITION
    if kind in grammar.functions or kind in grammar.methods:
        name = "method" if in_class or kind in grammar.methods else "function"
        return replace(statements, kind=name, role=definition, header=_header(node))
    if kind in grammar.classes:
        body = _body(node)
        if body is not None:
            return replace(statements, kind="class", role=definition, header=_header(node), body=body)
        header = _first_rows(node, grammar)
        return replace(statements, kind="class", role=definition, header=header, body=node, main=node)
    if kind in grammar.embeds:
        return replace(statements, header=range(node.start_point.row, _end_row(node.named_children[0])), body=node)
    if kind in grammar.scopes or node.is_error:
        return replace(statements, header=_header(node), body=_body(node) or node)
    return statements


def _type(node: Node, grammar: Grammar) -> str:
    """Return the type of a node, with its first word where that decides the meaning."""
    if node.type not in grammar.keyed or not node.named_children:
        return node.type
    word = node.named_children[0].text or b""
    return f"{node.type}:{word[:_MAX_KEYWORD].decode('utf-8', 'replace')}"


def _unwrapped(node: Node, grammar: Grammar) -> Node:
    """Return what `export`, decorators, `template <...>` or `const name =` wrap."""
    for _ in range(_MAX_WRAPPERS):
        inner = None
        if node.type in grammar.wrappers:
            inner = next((child for child in node.named_children if child.type in grammar.unwrapped), None)
        if inner is None:
            break
        node = inner
    return node


def _body(definition: Node) -> Node | None:
    body = definition.child_by_field_name("body")
    if body is None and definition.named_children:  # some grammars do not name the field
        last = definition.named_children[-1]
        body = last if last.type.endswith(("_body", "_list", "block")) else None
    if body is None:
        following = definition.next_named_sibling
        body = following if following is not None and following.type == "function_body" else None
    return body


def _first_rows(definition: Node, grammar: Grammar) -> range:
    """Return the rows of the header of a definition whose members are its own children."""
    first = definition.start_point.row
    end = first + 1
    for child in definition.named_children:
        if child.start_point.row >= end:
            break
        if child.type not in grammar.transparent:
            end = max(end, _end_row(child))
    return range(first, end)


def _header(definition: Node) -> range | None:
    """Return the rows from the start of a definition to the row in which its body opens."""
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
    return range(first, end if end - first <= _MAX_HEADER_ROWS else first + 1)


def _end_row(node: Node) -> int:
    """Return the row after a node; the text of some nodes includes their line end."""
    row, column = node.end_point
    return max(row if column == 0 else row + 1, node.start_point.row + 1)


# Splitting without a grammar.


def _paragraphs(lines: Sequence[str]) -> Iterator[CodeUnit]:
    """Yield blocks that begin at the left edge, after a blank line."""
    start = 0
    for row in (*range(1, len(lines)), len(lines)):
        if row == len(lines) or (not lines[row - 1].strip() and lines[row][:1].strip()):
            is_licence = start == 0 and _is_licence_comment(lines[:row])
            role = UnitRole.STANDALONE if is_licence else UnitRole.DEFINITION
            yield CodeUnit(kind=LICENCE if is_licence else "block", start=start, end=row, role=role)
            start = row


def _is_licence_comment(lines: Sequence[str]) -> bool:
    return all(map(_COMMENT_LINE.match, lines)) and _LICENCE.search("".join(lines).encode()) is not None


def _fenced_blocks(lines: Sequence[str]) -> Iterator[CodeUnit]:
    """Yield the fenced code blocks of a Markdown text whose label names a known language."""
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
                yield CodeUnit(kind="block", start=start, end=row + 1, role=UnitRole.STANDALONE)
            start = -1


# Trimming and merging.


def _without_blank_edges(unit: CodeUnit, lines: Sequence[str]) -> CodeUnit | None:
    """Return a unit without the blank rows at its edges, or None if all its rows are blank."""
    start, end = unit.start, unit.end
    while start < end and not lines[start].strip():
        start += 1
    while end > start and not lines[end - 1].strip():
        end -= 1
    return replace(unit, start=start, end=end) if start < end else None


def _merge_small_units(units: Iterable[CodeUnit], budget: TokenBudget) -> Iterator[CodeUnit]:
    current: CodeUnit | None = None
    for unit in units:
        merged = None if current is None else _merged(current, unit, budget)
        if current is not None and merged is None:
            yield current
        current = merged or unit
    if current is not None:
        yield current


# (role of a unit, role of the next unit) -> role of the merged unit. Pairs that are missing are never merged.
_MERGED_ROLE = {
    (UnitRole.STATEMENTS, UnitRole.STATEMENTS): UnitRole.STATEMENTS,
    (UnitRole.STATEMENTS, UnitRole.DEFINITION): UnitRole.DEFINITION,
    (UnitRole.DEFINITION, UnitRole.STATEMENTS): UnitRole.DEFINITION,
    (UnitRole.DEFINITION, UnitRole.DEFINITION): UnitRole.DEFINITION,
    (UnitRole.SCOPE_OPENING, UnitRole.STATEMENTS): UnitRole.SCOPE_OPENING,
    (UnitRole.SCOPE_OPENING, UnitRole.DEFINITION): UnitRole.SCOPE_OPENING_WITH_MEMBERS,
    (UnitRole.SCOPE_OPENING_WITH_MEMBERS, UnitRole.STATEMENTS): UnitRole.SCOPE_OPENING_WITH_MEMBERS,
    (UnitRole.SCOPE_OPENING_WITH_MEMBERS, UnitRole.DEFINITION): UnitRole.SCOPE_OPENING_WITH_MEMBERS,
}
_OPENS_SCOPE = {UnitRole.SCOPE_OPENING, UnitRole.SCOPE_OPENING_WITH_MEMBERS}


def _merged(first: CodeUnit, second: CodeUnit, budget: TokenBudget) -> CodeUnit | None:
    """Return two neighbouring units as one, or None if they must stay separate."""
    role = _MERGED_ROLE.get((first.role, second.role))
    opens_scope = first.role in _OPENS_SCOPE
    member_scopes = (*first.scopes, first.header) if opens_scope and first.header is not None else first.scopes
    if role is None or second.scopes not in (first.scopes, member_scopes):
        return None
    limit = _merge_limit(first, second, budget, is_member=second.scopes == member_scopes)
    if budget.cost(first.start, second.end) > limit:
        return None
    kind = first.kind
    if second.kind != first.kind:
        kind = "class" if (opens_scope and first.kind == "class") or "method" in (first.kind, second.kind) else "module"
    return CodeUnit(
        kind=kind,
        start=first.start,
        end=second.end,
        role=role,
        scopes=first.scopes,
        header=first.header if opens_scope else None,
        nodes=(*first.nodes, *second.nodes),
        grammar=first.grammar,
    )


def _merge_limit(first: CodeUnit, second: CodeUnit, budget: TokenBudget, *, is_member: bool) -> int:
    """Return how many tokens a merged unit may have.

    Statements of one scope may fill an example, and so may the first member of a scope together with a short header: such a
    header would teach little by itself. Other units are merged only while they stay small.
    """
    free_tokens = budget.free_tokens(first.scopes)
    small = min(free_tokens, budget.max_length // MERGE_SHARE, MERGE_MAX_TOKENS)
    if not is_member or first.role not in (UnitRole.STATEMENTS, UnitRole.SCOPE_OPENING):
        return small
    if second.role is UnitRole.STATEMENTS:
        return free_tokens
    is_bare_header = first.role is UnitRole.SCOPE_OPENING and budget.cost(first.start, first.end) <= _BARE_HEADER_TOKENS
    return free_tokens if is_bare_header else small
