"""Which pieces of code are worth learning.

Files that are generated, minified or no text never come this far (`classify.py`, `file_text.py`). What remains are the parts of
good files that teach no code: the licence at the top, and tables of data.
"""

from __future__ import annotations

import re

from peft_core.data.classify import Reason
from peft_core.data.units import LICENCE, Unit

# Of Python's standard library, tests included, these leave out a sixth of the code that stands outside of functions and classes
# (1091 of 6560 pieces: encodings, entities, tables of the tests), 11 of 3869 functions and 351 of 29 935 methods (test data).
_MIN_WORDS = 40
_MIN_ROWS = 12
_NUMBERS = 0.5  # share of words that begin with a digit
_LITERAL_ROWS = 0.8  # share of rows that begin with a literal
_LONGEST_WORD = 200  # characters: encoded bytes, not a name
_WORD = re.compile(r"\w+")
_LITERAL = re.compile(r"""\s*[bruf]{0,2}["'`\d([{}\])+-]""", re.IGNORECASE)
_UNBROKEN = re.compile(rf"[A-Za-z0-9+/=\\]{{{_LONGEST_WORD},}}")


def trouble(unit: Unit, body: str) -> Reason | None:
    """Why a piece of a file should not be learned from."""
    if unit.kind == LICENCE:
        return Reason.LICENCE
    return Reason.DATA if is_data(body) else None


def is_data(text: str) -> bool:
    """A table of numbers or literals, or bytes written as text."""
    if _UNBROKEN.search(text):
        return True
    words = _WORD.findall(text)
    if len(words) >= _MIN_WORDS and sum(word[0].isdigit() for word in words) > _NUMBERS * len(words):
        return True
    rows = [row for row in text.split("\n") if row.strip()]
    return len(rows) >= _MIN_ROWS and sum(_LITERAL.match(row) is not None for row in rows) > _LITERAL_ROWS * len(rows)
