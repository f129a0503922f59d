"""What a repository defines, uses and imports, by the syntax trees of all its files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from peft_core.data.classification import NOTEBOOK
from peft_core.data.examples import FileResult, parts_of_file, printable_path
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.occurrences import Occurrence, Role, import_of, occurrences
from peft_core.data.secrets import redact_secrets
from peft_core.data.study.definitions import Definition, components, definitions_of, module_of
from peft_core.data.syntax import parse_syntax
from peft_core.data.walk import File
from peft_core.errors import HeaderError
from peft_core.system.files import read_small

if TYPE_CHECKING:
    from tree_sitter import Node

_RECEIVER = re.compile(rb"(?<![.\w])(\w+)(?:\?\.|\.|->|::)$")
_MAX_RECEIVER = 64  # bytes
_MEMBER_TYPES = re.compile(r"^(property|field|type|shorthand_property|shorthand_field)_identifier$|^constant$|_name$")
_MANIFESTS = {
    "package.json": re.compile(r'"name"\s*:\s*"([^"\s]+)"'),
    "pyproject.toml": re.compile(r'^name\s*=\s*"([^"\s]+)"', re.MULTILINE),
    "Cargo.toml": re.compile(r'^name\s*=\s*"([^"\s]+)"', re.MULTILINE),
    "go.mod": re.compile(r"^module\s+(\S+)", re.MULTILINE),
}
MAX_MANIFEST_BYTES = 1 << 20
MAX_REFERENCES = 400_000  # that are kept; a repository with more is large enough to rank by these


@dataclass(slots=True)
class Reference:
    """A call of a name somewhere in the repository."""

    path: str
    row: int
    receiver: str = ""  # the name before the dot


@dataclass
class RepositoryIndex:
    """The names of a repository. `names` are those that code can use; `words` also holds local variables."""

    definitions: dict[str, Definition] = field(default_factory=dict)  # by qualified name
    by_name: defaultdict[str, list[Definition]] = field(default_factory=lambda: defaultdict(list))
    names: set[str] = field(default_factory=set)
    words: set[str] = field(default_factory=set)
    imports: set[tuple[str, str]] = field(default_factory=set)  # what an import begins with, and a name in it
    modules: set[str] = field(default_factory=set)  # parts of the paths of files, and `packages`
    packages: set[str] = field(default_factory=set)  # names under which others import the repository
    languages: set[str] = field(default_factory=set)
    calls: defaultdict[str, list[Reference]] = field(default_factory=lambda: defaultdict(list))
    in_file: defaultdict[str, list[Definition]] = field(default_factory=lambda: defaultdict(list))
    unread: int = 0  # files that time did not suffice for, or that cannot be parsed
    _references: int = 0

    def add_file(self, file: File) -> None:
        """Read a file in a language with a grammar; others hold no names that could be checked."""
        path = printable_path(file.name)
        if file.language is NOTEBOOK or file.language.grammar is None or redact_secrets([path])[1]:
            return
        parts = parts_of_file(file, path, FileResult())
        if isinstance(parts, ExclusionReason):
            return
        for part in parts:
            raw = "".join(part.lines).encode()
            grammar = part.language.grammar
            root = None if grammar is None else parse_syntax(raw, grammar)
            if root is None or grammar is None:
                self.unread += grammar is not None
                continue
            self.languages.add(part.language.name)
            self.modules.update(path.split("/")[:-1], module_of(path))
            for definition in definitions_of(root, grammar, path):
                if self.definitions.setdefault(definition.qualified, definition) is definition:
                    self.by_name[definition.name].append(definition)
                    self.in_file[path].append(definition)
            self._add_names(root, raw, path)

    def _add_names(self, root: Node, raw: bytes, path: str) -> None:
        for found in occurrences(root, raw):
            self.words.add(found.name)
            if found.role is Role.IMPORT:
                self.imports.add((import_of(found.node, raw).root, found.name))
            if found.role is not Role.PLAIN or _MEMBER_TYPES.search(found.node.type) or _is_member(found.node):
                self.names.add(found.name)
            if found.called and found.role is not Role.DEFINITION and self._references < MAX_REFERENCES:
                self._references += 1
                self.calls[found.name].append(Reference(path, found.row, _receiver(found, raw)))

    def defines(self, name: str) -> bool:
        return name in self.by_name

    @cached_property
    def import_roots(self) -> frozenset[str]:
        """What the imports of the repository begin with."""
        return frozenset(root for root, _ in self.imports)

    @cached_property
    def dependencies(self) -> frozenset[str]:
        """The names that the repository imports from elsewhere."""
        outside = {name for root, name in self.imports if root != "." and root not in self.modules}
        return frozenset(name for name in outside if name not in self.by_name and name not in self.modules)

    @cached_property
    def own_imports(self) -> frozenset[str]:
        """The names that the repository imports from itself."""
        return frozenset(name for root, name in self.imports if root == "." or root in self.packages)

    def takes_any_keyword(self, name: str) -> bool:
        """Return whether something of this name may be called with keywords that it does not name."""
        found = self.by_name.get(name, [])
        made_by = [self.definitions.get(f"{each.qualified}.__init__") for each in found if each.kind == "class"]
        return any("**" in each.signature for each in (*found, *filter(None, made_by)))

    def find(self, name: str) -> list[Definition]:
        """Return the definitions that a name can mean; whatever leads to it may be left out, as in `Client.fetch`."""
        parts = components(name.split("(", maxsplit=1)[0])
        if not parts:
            return []
        candidates = [(each, components(each.qualified)) for each in self.by_name.get(parts[-1], [])]
        if whole := [each for each, own in candidates if own == parts]:
            return whole
        exact = [each for each, own in candidates if own[-len(parts) :] == parts]
        inside = (
            parts[1:] if len(parts) > 1 and parts[0] in self.packages else parts
        )  # the package may be the directory itself
        return exact or [each for each, own in candidates if _leads_to(parts, own) or _leads_to(inside, own)]

    def calls_of(self, name: str) -> list[Reference]:
        """Return the calls of a name, without those of a dependency's, such as `json.loads`."""
        return [each for each in self.calls.get(name, ()) if each.receiver not in self.dependencies]

    def enclosing(self, reference: Reference) -> Definition | None:
        """Return the innermost definition around a call."""
        around = [each for each in self.in_file.get(reference.path, ()) if each.start <= reference.row < each.end]
        return max(around, key=lambda each: each.start, default=None)


def index_files(
    files: Iterable[File], roots: Iterable[Path], *, is_over: Callable[[], bool] = lambda: False
) -> RepositoryIndex:
    """Return the names of the files of repositories.

    Args:
        files: All files.
        roots: The directories of the repositories.
        is_over: Returns whether the time is over: the files after that are counted as unread.
    """
    index = RepositoryIndex()
    for root in roots:
        index.packages.update(_package_names(root))
    index.modules.update(index.packages)
    for file in files:
        if is_over():
            index.unread += file.language.grammar is not None
        else:
            index.add_file(file)
    return index


def _package_names(root: Path) -> Iterator[str]:
    """Yield the names under which others import a repository: that of its directory, and those in its manifests."""
    yield root.name
    for name, pattern in _MANIFESTS.items():
        with suppress(HeaderError):
            found = pattern.search(read_small(root / name, MAX_MANIFEST_BYTES).decode("utf-8", "replace"))
            if found is not None:
                yield found[1]
                yield found[1].replace("-", "_")


def _receiver(found: Occurrence, raw: bytes) -> str:
    if found.role is not Role.ACCESS:
        return ""
    before = _RECEIVER.search(raw[max(0, found.node.start_byte - _MAX_RECEIVER) : found.node.start_byte])
    return before[1].decode("utf-8", "replace") if before is not None else ""


def _is_member(node: Node) -> bool:
    """Return whether a plain name is assigned in the body of a module or class, as fields are."""
    depth = 0
    while node.parent is not None and depth < 5:
        node, depth = node.parent, depth + 1
        if node.type in ("function_definition", "argument_list", "arguments", "lambda"):
            return False
        if node.type in ("assignment", "enum_assignment", "enum_variant", "enum_constant", "enumerator"):
            statement = node.parent
            block = statement.parent if statement is not None else None
            owner = block.parent if block is not None else None
            return owner is None or "class" in owner.type or "enum" in node.type
    return False


def _leads_to(parts: tuple[str, ...], own: tuple[str, ...]) -> bool:
    """Return whether `own` ends as `parts` do and has all of them in this order."""
    if own[-1] != parts[-1]:
        return False
    remaining = iter(own)
    return all(part in remaining for part in parts)
