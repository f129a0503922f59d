"""What a training learns from, before it is tokens."""

from __future__ import annotations

from typing import NamedTuple

from peft_core.spec import Frozen


class Segment(Frozen):
    """A stretch of text. `learn=False`: context that carries no loss (a prompt)."""

    text: str
    learn: bool = True
    literal: bool = False
    """Whether what looks like a special token in it is text all the same, as in source code. Otherwise it is one, as in a
    rendered conversation."""


class FillInTheMiddle(NamedTuple):
    """Special tokens that ask for the text between two others."""

    prefix: str
    suffix: str
    middle: str  # empty: the suffix comes first, and the gap follows the prefix
    end: str = ""  # what ends the gap, where that is not the end of the text

    def prompt(self, before: str, after: str) -> tuple[str, ...]:
        """The pieces to tokenise, in the order in which the family was trained."""
        if not self.middle:
            return (self.suffix, after, self.prefix, before)
        return (self.prefix, before, self.suffix, after, self.middle)


class Example(Frozen):
    """One training document: segments that are tokenised in order, then end-of-text where the text ends."""

    segments: tuple[Segment, ...]
    path: str  # relative to the source; "record 3" for inline records without a path
    language: str  # "python", "text", ...
    kind: str  # "function", "class", "method", "module", "block", "record", ...
    start_line: int = 0  # 1-based; 0 when unknown
    end_line: int = 0
    tokens: int = 0  # of all segments, with the end-of-text token where there is one
    ends: bool = True
    """False for what breaks off in the middle of a longer text, as a unit does that is too long for one example. Nothing is
    learned of an end there: the model would learn to stop within functions."""

    @property
    def text(self) -> str:
        return "".join(segment.text for segment in self.segments)
