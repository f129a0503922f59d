"""The code units that an adapter was trained on, from the examples of its dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft_core.schemas.dataset import Example, FillInTheMiddle, Segment


@dataclass(frozen=True, slots=True)
class CodeUnit:
    """A function, a class or another piece of a file."""

    path: str
    language: str
    start_line: int  # 1-based
    end_line: int  # inclusive
    text: str


def units_of(examples: Iterable[Example], fill_in_the_middle: FillInTheMiddle | None) -> list[CodeUnit]:
    """Return the code in training examples, each text once; records, such as conversations, have none.

    `fill_in_the_middle`: the base model's tokens, with which some examples were reordered.
    """
    units: dict[str, CodeUnit] = {}
    for example in examples:
        segments = _in_file_order(example.segments, fill_in_the_middle)
        text = "".join(segment.text for segment in segments if segment.learn and segment.literal)
        if text.strip() and example.start_line:
            unit = CodeUnit(example.path, example.language, example.start_line, example.end_line, text)
            units.setdefault(text, unit)
    return list(units.values())


def _in_file_order(segments: Sequence[Segment], tokens: FillInTheMiddle | None) -> Sequence[Segment]:
    """Return the segments as in the file. See `FillInTheMiddle.prompt` for the order in which they are trained on."""
    marks = {segment.text: position for position, segment in enumerate(segments) if not segment.literal}
    if tokens is None or tokens.prefix not in marks or tokens.suffix not in marks:
        return segments
    if not tokens.middle:
        border = marks[tokens.prefix]
        return (*segments[border:], *segments[:border])
    suffix, middle = marks[tokens.suffix], marks.get(tokens.middle, len(segments))
    return (*segments[:suffix], *segments[middle:], *segments[suffix:middle])
