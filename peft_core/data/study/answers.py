"""The names in an answer that nothing defines: neither the repository, nor what it imports, nor the language, nor the answer.

An answer is Markdown, whose blocks of code in a language of the repository are parsed and whose `code spans` are read as names;
or it is code as a whole.
"""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from markdown_it import MarkdownIt

from peft_core.data.languages import Language, language_named, language_of_file
from peft_core.data.occurrences import (
    Import,
    Occurrence,
    Role,
    first_name,
    import_of,
    is_assigned,
    object_of,
    occurrences,
)
from peft_core.data.study.builtins import builtin_names, standard_modules
from peft_core.data.study.index import RepositoryIndex
from peft_core.data.syntax import parse_syntax
from peft_core.errors import sanitize

if TYPE_CHECKING:
    from markdown_it.token import Token
    from tree_sitter import Node

_MARKDOWN = MarkdownIt("commonmark", {"html": False})  # a fence inside of HTML is a fence
# By CommonMark such a line belongs to the paragraph or the block of code before it, but people and models mean a fence.
_INDENTED_FENCE = re.compile(r"^([ \t]*)(?:`{3,}[^`\n]*|~{3,}.*)$", re.MULTILINE)
_TEXT_LABELS = ("", "markdown", "md")  # of fences that may have others inside
_LABEL = re.compile(r"\s*(?:\{\.?)?([\w+#.-]*)")
_NAME_SPAN = re.compile(r"@?[A-Za-z_$][\w$]*(?:(?:\.|::|->|#)[A-Za-z_$][\w$]*)*(\(.*\))?", re.DOTALL)
_WORD = re.compile(r"[A-Za-z_$][\w$]*")
_DATA_FILES = frozenset("cfg conf csv ini json jsonl lock log md toml txt xml yaml yml".split())  # noqa: SIM905
# What a fragment may stand in, where a grammar wants more than statements at the top of a file.
_ECMA_FRAMES = ("class A {{\n{}\n}}", "const a = {{\n{}\n}}")
_FRAMES = {
    "javascript": _ECMA_FRAMES,
    "typescript": _ECMA_FRAMES,
    "tsx": _ECMA_FRAMES,
    "php": ("<?php\n{}", "<?php\nclass A {{\n{}\n}}"),
    "rust": ("fn f() {{\n{}\n}}", "fn f() {{\n{};\n}}"),
    "java": ("class A {{\n{}\n}}", "class A {{ void f() {{\n{}\n}} }}", "class A {{ void f() {{\n{};\n}} }}"),
    "go": ("package p\nfunc f() {{\n{}\n}}",),
    "c": ("void f() {{\n{}\n}}", "void f() {{\n{};\n}}"),
    "cpp": ("void f() {{\n{}\n}}", "void f() {{\n{};\n}}"),
    "csharp": ("class A {{ void f() {{\n{}\n}} }}", "class A {{\n{}\n}}"),
    "scala": ("object A {{\n{}\n}}",),
    "kotlin": ("fun f() {{\n{}\n}}",),
}
_SELF = frozenset({"self", "cls", "this", "super", "Self", "crate"})
_CHOSEN_IN = ("import_clause", "namespace_import", "import_spec")  # where an imported name is the writer's choice
_BOUND_BY = (("left", "right"), ("name", "value"), ("pattern", "value"), ("pattern", "right"), ("alias", ""))
_TYPED_BY = (("name", "type"), ("pattern", "type"), ("", "type"))


class Parsed(NamedTuple):
    root: Node
    raw: bytes
    language: Language


class BrokenCode(NamedTuple):
    """Code that cannot be read. `problem`: "it does not parse at ...", for the answer."""

    problem: str


class _Block(NamedTuple):
    """A block of code in Markdown."""

    code: str
    label: str = ""  # the language that its fence names
    unclosed: str = ""  # the fence, if it is not closed


@dataclass(slots=True)
class Answer:
    """What an answer consists of."""

    code: list[Parsed] = field(default_factory=list)
    spans: list[str] = field(default_factory=list)
    broken: BrokenCode | None = None


def read_answer(text: str, language: Language, index: RepositoryIndex, *, is_code: bool) -> Answer:
    """Parse an answer. `language` is that of its code where a fence does not name one."""
    answer = Answer()
    blocks, answer.spans = ([_Block(text)], []) if is_code else _read_markdown(text)
    for block in blocks:
        own = language_named(block.label) if block.label else language
        if block.unclosed:
            fence = sanitize(block.unclosed, limit=80)
            answer.broken = answer.broken or BrokenCode(f"its fence {fence!r} is not closed")
        elif own.grammar is not None and own.name in index.languages:
            parsed = _parse(textwrap.dedent(block.code), own)
            if isinstance(parsed, Parsed):
                answer.code.append(parsed)
            elif parsed is not None and (block.label or is_code):  # other blocks may be what a program prints
                answer.broken = answer.broken or parsed
    return answer


def _read_markdown(text: str) -> tuple[list[_Block], list[str]]:
    """Return the blocks of code and the code spans of a text."""
    blocks: list[_Block] = []
    spans: list[str] = []
    texts = [text]
    while texts:
        for token in _MARKDOWN.parse(f"{texts.pop()}\n"):
            if token.type == "fence":
                block = _fenced(token)
                blocks.append(block)
                texts += _from_fence(block.code)[1:] if block.label in _TEXT_LABELS else []
            elif token.type == "inline":
                spans += [child.content.strip() for child in token.children or () if child.type == "code_inline"]
                texts += _from_fence(token.content)[1:]
            elif token.type == "code_block":
                before, *fenced = _from_fence(token.content)
                blocks.append(_Block(before))
                texts += fenced
    return blocks, spans


def _fenced(token: Token) -> _Block:
    label = _LABEL.match(token.info)
    first, end = token.map or (0, 0)
    is_closed = end - first == token.content.count("\n") + 2
    return _Block(token.content, label[1] if label else "", "" if is_closed else f"{token.markup}{token.info}")


def _from_fence(text: str) -> list[str]:
    """Return what is before a fence, and from the fence on, without the indentation of the fence, if there is one."""
    fence = _INDENTED_FENCE.search(text)
    if fence is None:
        return [text]
    indentation = re.compile(rf"^[ \t]{{0,{len(fence[1])}}}", re.MULTILINE)
    return [text[: fence.start()], indentation.sub("", text[fence.start() :])]


def _parse(code: str, language: Language) -> Parsed | BrokenCode | None:
    """Return the tree of code, framed if it needs that; None if the grammar is not installed or takes too long."""
    assert language.grammar is not None  # noqa: S101 - for mypy
    first: Node | None = None
    for frame in ("{}", *_FRAMES.get(language.name, ())):
        raw = frame.format(code).encode()
        root = parse_syntax(raw, language.grammar)
        if root is None:
            return None
        if not root.has_error:
            return Parsed(root, raw, language)
        first = first or root
    assert first is not None  # noqa: S101 - for mypy
    row = _first_error(first)
    lines = code.split("\n")
    line = sanitize(lines[min(row, len(lines) - 1)].strip(), limit=80)
    return BrokenCode(f"it does not parse at line {row + 1} of its {language.name} code: {line!r}")


def _first_error(root: Node) -> int:
    stack, rows = [root], []
    while stack:
        node = stack.pop()
        if node.is_error or node.is_missing:
            rows.append(node.start_point.row)
        elif node.has_error:
            stack += node.children
    return min(rows, default=0)


@dataclass
class NameCheck:
    """Finds the names of one answer that nothing defines."""

    answer: Answer
    index: RepositoryIndex
    language: Language
    own: set[str] = field(default_factory=set)  # defined, bound or assigned in the answer
    foreign: set[str] = field(default_factory=set)  # names of dependencies, and of what they return
    unknown: dict[str, None] = field(default_factory=dict)  # in order
    used: set[str] = field(default_factory=set)  # definitions of the repository

    def run(self) -> None:
        """Fill in `unknown` and `used`."""
        self.foreign |= self.index.dependencies
        found = [(parsed, list(occurrences(parsed.root, parsed.raw))) for parsed in self.answer.code]
        for parsed, names in found:
            self._add_own(parsed, names)
            for each in names:
                if each.role is Role.IMPORT:
                    self._add_import(each, parsed)
        for parsed, _ in found * 2:  # a second time: a name may be bound to one that is bound further down
            self._add_foreign(parsed)
        for parsed, names in found:
            for each in names:
                self._check(each, parsed)
        for span in self.answer.spans:
            self._check_span(span)

    @cached_property
    def _builtins(self) -> frozenset[str]:
        languages = {self.language.name, *(parsed.language.name for parsed in self.answer.code)}
        return frozenset().union(*map(builtin_names, languages))

    @cached_property
    def _standard(self) -> frozenset[str]:
        languages = {self.language.name, *(parsed.language.name for parsed in self.answer.code)}
        return frozenset().union(*map(standard_modules, languages))

    def _add_own(self, parsed: Parsed, names: list[Occurrence]) -> None:
        for each in names:
            assigned = each.role is Role.ACCESS and is_assigned(each.node, parsed.raw)
            if assigned or each.role is Role.DEFINITION or (each.role is Role.PLAIN and not each.called):
                self.own.add(each.name)

    def _is_foreign(self, name: str | None) -> bool:
        return name is None or (name in self.foreign and not self.index.defines(name)) or self._is_outside(name)

    def _is_outside(self, name: str) -> bool:
        return not self._is_of_repository(name) and (name in self._builtins or name in self._standard)

    def _is_of_repository(self, name: str) -> bool:
        """Return whether a name that an expression or an import begins with is the repository's.

        `logging` is the language's module even if the repository has a `logging` somewhere inside.
        """
        if name in self.index.packages or name in self.index.own_imports or name in _SELF:
            return True
        return name not in self._standard and (name in self.index.modules or self.index.defines(name))

    def _add_import(self, found: Occurrence, parsed: Parsed) -> None:
        """Sort an imported name: one of the repository has to exist there, another one of a known package is foreign."""
        statement = import_of(found.node, parsed.raw)
        name, root = found.name, statement.root
        if not self._is_ours(statement):
            is_known = (
                root in self.index.import_roots or root in self._standard or statement.node.type == "preproc_include"
            )
            if parsed.language.name == "go" and "." not in "".join(statement.texts).split("/")[0]:
                is_known = True  # packages of its own library have no domain
            if not is_known:
                self.unknown[root] = None
            self.foreign.add(name)
            return
        self.own.add(name)
        if self.index.defines(name):
            self.used.add(name)
        parent = found.node.parent
        is_chosen = found.node.type == "import_spec" or (
            parent is not None and (parent.type in _CHOSEN_IN or parent.child_by_field_name("alias") == found.node)
        )
        if not is_chosen and name not in self.index.words and name not in self.index.modules and name not in _SELF:
            self.unknown[name] = None

    def _is_ours(self, statement: Import) -> bool:
        packages = self.index.packages
        if any(text in packages or any(text.startswith(f"{each}/") for each in packages) for text in statement.texts):
            return True
        return statement.root == "." or self._is_of_repository(statement.root)

    def _add_foreign(self, parsed: Parsed) -> None:
        """Follow names that are bound to something of a dependency or of the language: their attributes cannot be known."""
        stack = [parsed.root]
        while stack:
            node = stack.pop()
            stack += reversed(node.named_children)
            if not node.named_children:
                continue
            for name_field, value_field in (*_BOUND_BY, *_TYPED_BY):
                target = node.child_by_field_name(name_field) if name_field else node.named_children[0]
                value = node.child_by_field_name(value_field) if value_field else node.named_children[0]
                if target is None or value is None or target == value:
                    continue
                root = first_name(value, parsed.raw)
                if root is not None and self._is_foreign(root):
                    bound = (each for each in occurrences(target, parsed.raw) if each.role is not Role.ACCESS)
                    self.foreign.update(each.name for each in bound if each.name not in ("self", "this"))

    def _check(self, found: Occurrence, parsed: Parsed) -> None:
        name = found.name
        if self.index.defines(name) and found.role is not Role.DEFINITION:
            self.used.add(name)
        if found.role is Role.CALL:
            if name not in self.own and name not in self.foreign and not self._exists(name):
                self.unknown[name] = None
        elif found.role is Role.ACCESS:
            if (
                name not in self.own
                and not self._exists(name)
                and not self._is_foreign(object_of(found.node, parsed.raw))
            ):
                self.unknown[name] = None
        elif found.role is Role.KEYWORD and name not in self.index.words and name not in self.own:
            arguments = found.node.parent.parent if found.node.parent is not None else None
            called = _callee(arguments, parsed.raw)
            if called is not None and self.index.defines(called) and not self.index.takes_any_keyword(called):
                self.unknown[f"{called}({name}=…)"] = None

    def _exists(self, name: str) -> bool:
        return name in self.index.names or name in self._builtins

    def _check_span(self, span: str) -> None:
        match = _NAME_SPAN.fullmatch(span)
        if match is None or language_of_file(span) is not None:
            return
        parts = _WORD.findall(span.split("(", maxsplit=1)[0])
        self.used.update(part for part in parts if self.index.defines(part))
        is_call = match[1] is not None
        if (len(parts) == 1 and not is_call) or parts[-1].lower() in _DATA_FILES:
            return  # a plain word may be a parameter, a value, or a word of another language
        if len(parts) > 1 and self._is_foreign(parts[0]):
            return
        for part in parts[1:] or parts:
            known = self._exists(part) or part in self.own or part in self.foreign or part in self.index.modules
            if not known and part not in self.index.words:
                self.unknown[part] = None


def _callee(arguments: Node | None, raw: bytes) -> str | None:
    """Return the last name of what is called with these arguments."""
    call = None if arguments is None else arguments.parent
    function = None if call is None else call.child_by_field_name("function")
    if function is None:
        return None
    names = _WORD.findall(raw[function.start_byte : function.end_byte].decode("utf-8", "replace"))
    return names[-1] if names else None
