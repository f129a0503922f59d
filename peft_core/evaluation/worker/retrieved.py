"""Positions in held-out files that every column of the table predicts, plainly and behind similar code of the training.

At each position a model sees the path header and the file above, as much as the length allows, and predicts the next rows of
the held-out example. What is searched for are the last lines above: no column knows the lines that are measured.

T tokens
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, zip_longest
from pathlib import Path

import torch

from peft_core.base_models.families import FIM_TOKENS
from peft_core.base_models.tokenizer import BaseTokenizer
from peft_core.data.chunking import split_lines
from peft_core.evaluation.columns import MIN_POSITIONS
from peft_core.evaluation.worker.completion_points import Line, find_lines
from peft_core.evaluation.worker.scoring import HeldOutExample
from peft_core.evaluation.worker.whole_files import tokenise_file
from peft_core.modeling.batches import Document
from peft_core.retrieval.context import CANDIDATES, compose, last_lines
from peft_core.retrieval.units import read_units
from peft_core.schemas.dataset import Example, HeldOutFile, Segment

POSITION_TOKENS = 832  # of a document, at most
_CONTEXT_SHARE, _MEASURED_SHARE = 0.5, 0.2  # of the tokens; the rest is the file above
_KNOWN_ROWS = 2  # of a held-out example, such as its signature
_MIN_ROWS = 3  # that are measured


@dataclass(frozen=True)
class Positions:
    """The same positions twice. `note`: why it is empty."""

    plain: tuple[HeldOutExample, ...] = ()
    retrieved: tuple[HeldOutExample, ...] = ()
    note: str = ""

    @property
    def tokens(self) -> int:
        return sum(len(example.document) for example in (*self.plain, *self.retrieved))


@dataclass(frozen=True)
class _Position:
    path: str
    language: str
    above: str  # the text that the model sees
    ids: tuple[int, ...]  # of the header and that text, then of what is measured
    measured: int  # the first token that is
    lines: tuple[Line, ...]

    def example(self, beginning: Sequence[int], context: Sequence[int] = ()) -> HeldOutExample:
        """Return the position behind the tokens of a context."""
        shift = len(beginning) + len(context)
        ids_T = torch.tensor([*beginning, *context, *self.ids], dtype=torch.int32)
        learn_T = torch.arange(len(ids_T)) >= shift + self.measured
        lines = tuple(replace(line, first=line.first + shift, last=line.last + shift) for line in self.lines)
        shown = Example(segments=(), path=self.path, language=self.language, kind="position")
        return HeldOutExample(shown, Document(ids_T=ids_T, learn_T=learn_T), lines, ())


def choose_positions(
    files: Sequence[HeldOutFile],
    training_code: Sequence[Path],
    tokenizer: BaseTokenizer,
    *,
    length: int,
    budget: int,
    seed: int,
) -> Positions:
    """Choose positions in all files in turn.

    Args:
        files: Held-out files; none if it was trained on records.
        training_code: The files of training examples that are searched.
        tokenizer: Of the base model.
        length: Tokens of a document.
        budget: Tokens of all documents together.
        seed: Of the sample.

    Raises:
        DataError: the dataset of the training is damaged.
    """
    if not files or not training_code:
        return Positions()
    generator = random.Random(f"positions/{seed}")  # noqa: S311 -- a sample, not a secret
    of_files = [list(_positions(file, tokenizer, length)) for file in files]
    for each in of_files:
        generator.shuffle(each)
    generator.shuffle(of_files)
    found = [position for turn in zip_longest(*of_files) for position in turn if position is not None]
    affordable = int(budget // ((2 - _CONTEXT_SHARE) * length))
    if min(affordable, len(found)) < MIN_POSITIONS:
        limit = f"there are {len(found)} positions in the held-out files, and there was time for {affordable}"
        return Positions(note=f"Whether retrieval does as well was not measured: {limit}; {MIN_POSITIONS} are needed.")
    return _with_contexts(found[:affordable], training_code, tokenizer, round(_CONTEXT_SHARE * length))


def _with_contexts(
    positions: Sequence[_Position], training_code: Sequence[Path], tokenizer: BaseTokenizer, budget: int
) -> Positions:
    from peft_core.retrieval.worker.index import UnitIndex  # noqa: PLC0415 -- not for evaluations without positions

    index = UnitIndex(read_units(training_code, FIM_TOKENS))
    retrieved = []
    for position in positions:
        context = compose(
            index.best(last_lines(position.above), CANDIDATES),
            prompt=position.above,
            count=lambda text: tokenizer.count([text])[0],
            budget=budget,
        )
        ids = _ids(tokenizer, context.text)[:budget] if context.text else []
        retrieved.append(position.example(tokenizer.beginning, ids))
    plain = tuple(position.example(tokenizer.beginning) for position in positions)
    return Positions(plain, tuple(retrieved))


def _positions(file: HeldOutFile, tokenizer: BaseTokenizer, length: int) -> Iterator[_Position]:
    """Yield a position in each held-out example that has enough rows."""
    tokenised = tokenise_file(file, tokenizer, length)
    header, first_of_row = tokenised.header, tokenised.first_of_row
    starts = list(accumulate(map(len, split_lines(file.text)), initial=0))
    lines = list(find_lines(file.text, tokenised.offsets))
    above_tokens = round((1 - _CONTEXT_SHARE - _MEASURED_SHARE) * length) - len(header)
    for first, stop in file.rows:
        row = first + _KNOWN_ROWS
        begin = first_of_row[min(row, len(first_of_row) - 1)]
        fitting = [end for end in range(row, stop + 1) if first_of_row[end] - begin <= _MEASURED_SHARE * length]
        if len(fitting) <= _MIN_ROWS or above_tokens <= 0:
            continue
        end = first_of_row[fitting[-1]]
        top = next(token for token in first_of_row if token >= begin - above_tokens)
        shift = len(header) - top
        measured = tuple(
            replace(line, first=line.first + shift, last=line.last + shift)
            for line in lines
            if begin <= line.first and line.last + (not line.includes_newline) <= end
        )
        if end > begin and measured:
            above = file.text[tokenised.offsets[top][0] : starts[row]]
            shown = (*header, *tokenised.ids[top:end])
            yield _Position(file.path, file.language, tokenised.path_comment + above, shown, begin + shift, measured)


def _ids(tokenizer: BaseTokenizer, text: str) -> list[int]:
    return list(tokenizer.encode([Segment(text=text, literal=True)])[0].ids) if text else []
