"""Parse text with a tree-sitter grammar, within a limit of time: texts may be hostile."""

from __future__ import annotations

import importlib
import time
import warnings
from functools import cache
from typing import TYPE_CHECKING

from peft_core.data.grammars import Grammar

if TYPE_CHECKING:  # tree-sitter is loaded by the first file that needs it
    from tree_sitter import Node, Parser

_PARSE_LIMIT_S = 3.0  # CPU time for one text; a megabyte of ordinary code takes a second
_MAX_REFUSALS = 3  # a grammar that exceeds the limit so often is not used any more by this process
_READ_BYTES = 16_384


def parse_syntax(raw: bytes, grammar: Grammar) -> Node | None:
    """Return the root of the syntax tree of UTF-8 text; None if the grammar is not installed or takes too long."""
    parser = _parser(grammar)
    return None if parser is None else parser.parse(raw)


class _LimitedParser:
    """A parser with a time limit: a grammar's error recovery may take quadratic time, and files may be hostile."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._refusals = 0

    def parse(self, raw: bytes) -> Node | None:
        """Return the root, or None if parsing takes too long, or took too long for several texts before."""
        if self._refusals >= _MAX_REFUSALS:
            return None
        started: float | None = time.monotonic()
        cpu_started = time.thread_time()
        expired = False

        def read(offset: int, _point: object) -> bytes:
            nonlocal expired
            # The clock of the CPU time is a system call; a machine that is busy must not change how a file is split.
            if started is not None and time.monotonic() - started > _PARSE_LIMIT_S:
                expired = expired or time.thread_time() - cpu_started > _PARSE_LIMIT_S
            return (
                b"" if expired and started is not None else raw[offset : offset + _READ_BYTES]
            )  # an end ends the parse

        root = self._parser.parse(read).root_node
        self._refusals += expired
        started = None  # nodes read their text through the same function
        return None if expired else root


@cache
def _parser(grammar: Grammar) -> _LimitedParser | None:
    """Return the parser of a grammar, or None if its package is not installed or does not suit the tree-sitter that is."""
    from tree_sitter import Language as TreeSitterLanguage  # noqa: PLC0415 - loaded by the first file that needs it
    from tree_sitter import Parser  # noqa: PLC0415

    try:
        package = importlib.import_module(grammar.module)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # older packages return an int, which is deprecated
            return _LimitedParser(Parser(TreeSitterLanguage(getattr(package, grammar.function)())))
    except (ImportError, ValueError):
        return None
