"""The names of a code base: which ones it defines, and which occur in it at all.

Definitions are recognised by patterns, which is fast and works for every language: they may miss some, and take a parameter
for a field. A single word in lower case does not count. Where a file uses names: `name_uses.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from peft_core.schemas.dataset import CodeNames

MIN_CHARACTERS = 3  # shorter names are loop variables and the like
_MAX_CHARACTERS = 80
_MAX_NAMES = 500_000  # of a code base; a text that is no code may consist of random words

_NAME = r"([A-Za-z_$][\w$]*)"
# Repetitions are limited: a hostile text must not take quadratic time.
_MODIFIERS = r"(?:[a-z]{1,20}(?:\([a-z]*\))?[ \t]{1,8}){0,5}?"  # export default async, pub(crate) unsafe, public static
_KEYWORDS = (
    "def|defp|defmodule|class|func|fun|fn|function|sub|struct|enum|union|trait|interface|type|protocol|record|object|module|"
    "namespace|mod|macro_rules!"
)
_AFTER_NAME = r"(?:[ \t]*[(\[<{:=;!?]|[ \t]*$|[ \t]+\w)"
_ARGUMENTS = r"[ \t]*\([^;{}\n]{0,400}\)[^;{}()\n]{0,80}\{[ \t]*$"
_DEFINITIONS = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        # The keyword comes first, with a receiver in Go. What follows the name distinguishes it from prose.
        rf"^[ \t]*{_MODIFIERS}(?:{_KEYWORDS})[ \t]+(?:\([^()\n]{{0,80}}\)[ \t]*)?\*?{_NAME}{_AFTER_NAME}",
        # Methods of C, Java, JavaScript and their relatives: arguments and an opening brace follow the name.
        rf"^[ \t]*(?:[\w<>\[\],.*&?:~@]{{1,80}}[ \t]{{1,8}}){{0,6}}[*&~]?{_NAME}{_ARGUMENTS}",
        # Constants of a module: assigned at the left edge.
        rf"^{_MODIFIERS}{_NAME}[ \t]*(?::[^=\n]{{0,200}})?=(?!=)",
        # Fields: a type follows the name at the beginning of a line.
        rf"^[ \t]+{_MODIFIERS}{_NAME}\??[ \t]*:[ \t]*[\w\[\"'{{(&*]",
        # Attributes that a method assigns.
        rf"\b(?:self|this)\.{_NAME}[ \t]*(?::[^=\n]{{0,200}})?=(?!=)",
    )
)
_ORDINARY = re.compile(r"_*[a-z]+|__\w+__")  # `read`, `name`, `_value`: any code has them
_WORD = re.compile(r"[^\W\d][\w$]*")


@dataclass(slots=True)
class NameCollector:
    """Collects the names of a code base, file by file."""

    defined: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)

    def add(self, text: str) -> None:
        """Add the names of a file. Secrets must have been removed from the text."""
        if len(self.used) > _MAX_NAMES:
            return
        self.used.update(_usable(_WORD.findall(text)))
        for pattern in _DEFINITIONS:
            self.defined.update(name for name in _usable(pattern.findall(text)) if not _ORDINARY.fullmatch(name))

    def names(self) -> CodeNames:
        return CodeNames(defined=frozenset(self.defined), used=frozenset(self.used))


def words(text: str) -> frozenset[str]:
    """Return all words of a text that could be names."""
    return frozenset(_WORD.findall(text))


def _usable(names: Iterable[str]) -> set[str]:
    return {name for name in names if MIN_CHARACTERS <= len(name) <= _MAX_CHARACTERS}
