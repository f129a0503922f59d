"""Whole held-out files, read in windows: what a model would write at each position, given what precedes it in the file.

One forward pass answers for all positions of a window, because a greedy completion is exact if and only if each of its tokens
is the most likely one after the real tokens before it. A window is what an editor sends: the path header, then the file up to
the budget. Every position has at least half of the budget before it, where the file has as much.

T tokens
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from accelerate import Accelerator

from peft_core.base_models.tokenizer import BaseTokenizer
from peft_core.data.languages import language_named
from peft_core.data.name_uses import read_syntax
from peft_core.evaluation.summary import WindowScore
from peft_core.evaluation.worker.positions import Target, find_targets
from peft_core.evaluation.worker.scoring import (
    find_exact,
    predict_documents,
    tokens_that_end_a_line,
    tokens_whose_text,
)
from peft_core.evaluation.worker.whole_files import TokenisedFile, tokenise_file
from peft_core.modeling.batches import Document
from peft_core.modeling.objective import Objective
from peft_core.schemas.dataset import HeldOutFile
from peft_core.schemas.evaluation import InFileMetric
from peft_core.system.cancellation import StopFlag

WINDOW_TOKENS = 1024  # at most
_SHORT_CONTEXT_ROWS = 20  # as in the literature (Giagnorio et al., arXiv 2503.14201)
_SHORT_ROWS = 5  # of a window with little context are measured; the last one has 24 rows before it
_SHORT_SHARE = 0.25  # of the budget for windows with little context


@dataclass(frozen=True, eq=False)
class Window:
    """A part of a file that is read in one pass. Targets are positions in the document's tokens."""

    path: str
    document: Document
    targets: tuple[Target, ...]


def choose_windows(
    files: Sequence[HeldOutFile],
    names: frozenset[str],
    tokenizer: BaseTokenizer,
    *,
    length: int,
    budget: int,
    seed: int,
) -> list[Window]:
    """Choose windows of at most `length` tokens in all files in turn, together of at most `budget` tokens.

    `names`: of the project, see `names.project_names`.
    """
    generator = random.Random(f"windows/{seed}")  # noqa: S311 -- a sample, not a secret
    beginning = tokenizer.beginning or (tokenizer.end_of_text,)  # the first token is predicted from nothing
    long: list[list[Window]] = []
    short: list[list[Window]] = []
    for file in generator.sample(files, len(files)):
        tokenised = tokenise_file(file, tokenizer, length)
        syntax = read_syntax(file.text, language_named(file.language))
        targets = find_targets(file, tokenised.offsets, syntax, names)
        head = (*beginning, *tokenised.header)
        long.append(_shuffled(_windows(tokenised, targets, head, length), generator))
        short.append(_shuffled(_short_windows(tokenised, targets, beginning, length), generator))
    chosen = _in_turn(short, round(_SHORT_SHARE * budget))
    return [*_in_turn(long, budget - sum(len(window.document) for window in chosen)), *chosen]


def score_windows(
    objective: Objective, windows: Sequence[Window], tokenizer: BaseTokenizer, accelerator: Accelerator, stop: StopFlag
) -> list[WindowScore]:
    """Count in each window what the model in its present state predicts exactly. Processes divide the windows among them.

    Raises:
        Cancelled: on request, but only with a single process: the others would wait for this one.
    """
    starts = list(accumulate((len(window.targets) for window in windows), initial=0))
    right = torch.zeros(starts[-1])  # of all targets of all windows
    ends = _Ends(tokenizer)

    def add(index: int, _loss_n: torch.Tensor, likeliest_n: torch.Tensor) -> None:
        right[starts[index] : starts[index + 1]] = torch.tensor(ends.are_right(windows[index], likeliest_n))

    predict_documents(objective, [window.document for window in windows], accelerator, stop, add)
    counted = accelerator.reduce(right.to(accelerator.device), reduction="sum").tolist()
    return [
        score
        for window, start, stop in zip(windows, starts, starts[1:], strict=False)
        for score in _count(window, counted[start:stop])
    ]


def _count(window: Window, right: Sequence[float]) -> Iterator[WindowScore]:
    for metric in dict.fromkeys(metric for target in window.targets for metric in target.metrics):
        counted = [round(each) for target, each in zip(window.targets, right, strict=True) if metric in target.metrics]
        yield WindowScore(file=window.path, metric=metric, positions=len(counted), right=sum(counted))


class _Ends:
    """Which tokens end a line or a name."""

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._line_V = tokens_that_end_a_line(tokenizer)
        self._name_V = tokens_whose_text(tokenizer, lambda text: not (text[:1].isalnum() or text[:1] in ("_", "$")))

    def are_right(self, window: Window, likeliest_N: torch.Tensor) -> list[bool]:
        """Return for each target whether greedy decoding would write it exactly, given all tokens before it.

        The token after a line must end it, but may contain any indentation of the next line.
        """
        is_exact_T, ends_line_T, ends_name_T = find_exact(window.document, likeliest_N, self._line_V, self._name_V)
        return [
            bool(is_exact_T[target.first : target.last].all())
            and (target.ends or bool((ends_name_T if target.is_name else ends_line_T)[target.last]))
            for target in window.targets
        ]


def _windows(file: TokenisedFile, targets: Sequence[Target], head: Sequence[int], length: int) -> Iterator[Window]:
    """Yield windows that measure each target once, behind as many tokens as half a window has. `head` precedes each."""
    budget = length - len(head)
    remaining = list(targets)
    while remaining:
        first = remaining[0]
        start = 0 if first.stop <= budget else file.row_start(first.first - budget // 2)
        measured = [target for target in remaining if target.stop <= start + budget]
        if measured:
            yield _window(file, start, measured, head)
        remaining = [target for target in remaining if target.stop > start + budget]
        if not measured:  # it is longer than half a window
            remaining = remaining[1:]


def _short_windows(
    file: TokenisedFile, targets: Sequence[Target], head: Sequence[int], length: int
) -> Iterator[Window]:
    """Yield windows with 20 rows before the first line that is measured."""
    lines = [target for target in targets if not target.is_name and target.row >= _SHORT_CONTEXT_ROWS]
    while lines:
        first = lines[0].row
        measured = [
            replace(target, metrics=(InFileMetric.LINES_AFTER_20,))
            for target in lines
            if target.row < first + _SHORT_ROWS
        ]
        start = file.first_of_row[first - _SHORT_CONTEXT_ROWS]
        if measured[-1].stop - start + len(head) <= length:
            yield _window(file, start, measured, head)
        lines = lines[len(measured) :]


def _window(file: TokenisedFile, start: int, targets: Sequence[Target], head: Sequence[int]) -> Window:
    """Return the tokens from `start` on, as far as the targets need them."""
    stop, shift = max(target.stop for target in targets), len(head) - start
    ids_T = torch.tensor([*head, *file.ids[start:stop]], dtype=torch.int32)
    learn_T = torch.zeros(len(ids_T), dtype=torch.bool)
    for target in targets:
        learn_T[target.first + shift : target.stop + shift] = True
    shifted = tuple(replace(target, first=target.first + shift, last=target.last + shift) for target in targets)
    return Window(file.file.path, Document(ids_T=ids_T, learn_T=learn_T), shifted)


def _shuffled(windows: Iterator[Window], generator: random.Random) -> list[Window]:
    made = list(windows)
    generator.shuffle(made)
    return made


def _in_turn(windows: Sequence[Sequence[Window]], budget: int) -> list[Window]:
    """Take a window of each file, then a second one of each, as long as the budget lasts."""
    chosen: list[Window] = []
    for turn in range(max(map(len, windows), default=0)):
        for each in windows:
            if turn < len(each) and len(each[turn].document) <= budget:
                chosen.append(each[turn])
                budget -= len(each[turn].document)
    return chosen
