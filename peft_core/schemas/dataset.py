"""What a training learns from, before it is tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

from peft_core.schemas.frozen import FrozenModel


class SourceSummary(FrozenModel):
    """What a data source holds, found without tokenising: cheap enough to answer a tool call with."""

    kind: Literal["repository", "jsonl", "records"]
    path: Path | None
    files: int  # that would be trained on
    examples: int | None  # exact for records, None for a repository (known after preparation)
    estimated_tokens: int
    languages: dict[str, int]  # files by language
    left_out: dict[str, int]  # files or records by reason
    needs_chat_template: bool = False


class DatasetSummary(FrozenModel):
    """What was prepared, in figures."""

    train_examples: int
    held_out_examples: int
    train_tokens: int
    held_out_tokens: int
    files: int
    left_out: dict[str, int]
    secrets_removed: int = 0
    # Training examples by format: plain text, fill_in_the_middle, instruction.
    told: dict[str, int] = {}  # noqa: RUF012 -- pydantic copies defaults
    sha256: str = ""


class Segment(FrozenModel):
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


class Example(FrozenModel):
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


# FOLDED FROM peft_core.schemas.dataset: What data is prepared for: to train on a part of it and measure on the rest,
# or to measure on all of it.


class Purpose(NamedTuple):
    """How much it takes, and how a request for it is worded."""

    field: str  # of the request, which messages name
    tool: str  # to call again
    examples: int  # fewer teach, or show, nothing
    files: int
    parts: str  # what they are needed for, in words

    @property
    def trains(self) -> bool:
        return self == TRAINING


TRAINING = Purpose("training_data", "train_adapter", 8, 2, ", one to train on and one to measure on")
MEASURING = Purpose("evaluation_data", "evaluate_adapter", 5, 1, " to measure on")
