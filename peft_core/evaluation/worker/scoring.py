"""Text to measure base and adapter on, and how well a model knows each example of it.

T tokens, N positions with a target, D examples
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from peft_core.errors import NonFiniteError
from peft_core.evaluation.completion_points import (
    EXPECTED_LINES,
    CompletionPoint,
    Line,
    find_completion_points,
    lines_of,
)
from peft_core.evaluation.summary import Score
from peft_core.modeling.batches import Document, join, pack, tokenise
from peft_core.modeling.memory import trim_if_above
from peft_core.modeling.objective import Objective
from peft_core.modeling.tokenizer import BaseTokenizer
from peft_core.schemas.dataset import Example
from peft_core.system.cancellation import StopFlag


@dataclass(frozen=True, eq=False)
class HeldOutExample:
    """One example to measure on."""

    example: Example
    document: Document
    lines: tuple[Line, ...]  # in tokens of the document
    cuts: tuple[CompletionPoint, ...]  # likewise


def held_out_examples_of(
    examples: Iterable[Example],
    tokenizer: BaseTokenizer,
    max_length: int,
) -> list[HeldOutExample]:
    """Those with a token to measure on."""
    found = []
    for example in examples:
        document = tokenise(example, tokenizer, max_length)
        if document.targets:
            found.append(_trial(example, document, tokenizer))
    return found


def measure(
    objective: Objective,
    trials: Sequence[HeldOutExample],
    tokenizer: BaseTokenizer,
    accelerator: Accelerator,
    stop: StopFlag,
) -> list[Score]:
    """How well the model as it is now knows each of these. Each process takes its share.

    Raises:
        NotFinite: the loss.
        Stopped: on request; only where there is one process, as others would wait for this one.
    """
    was_training = objective.model.training
    objective.model.eval()
    sums_D2 = torch.zeros(len(trials), 2, dtype=torch.float64 if accelerator.device.type != "mps" else torch.float32)
    ends_line_V = _ends_line(tokenizer)
    order = sorted(range(len(trials)), key=lambda index: (-len(trials[index].document), index))
    share = order[accelerator.process_index :: accelerator.num_processes]
    with torch.no_grad(), accelerator.autocast():
        for group in pack([len(trials[index].document) for index in share], objective.capacity):
            some = [trials[share[position]] for position in group]
            batch = join([trial.document for trial in some], accelerator.device, objective.multiple_of)
            loss_N, likeliest_N = (values.cpu() for values in objective.scores(batch))
            sizes = [trial.document.targets for trial in some]
            parts = zip(group, some, loss_N.split(sizes), likeliest_N.split(sizes), strict=True)
            for position, trial, loss_n, likeliest_n in parts:
                lines = _lines_written(trial, likeliest_n, ends_line_V)
                sums_D2[share[position]] = torch.tensor([float(loss_n.double().sum()), lines])
            trim_if_above()
            if accelerator.num_processes == 1:
                stop.check()
    objective.model.train(was_training)
    sums_D2 = accelerator.reduce(sums_D2.to(accelerator.device), reduction="sum").cpu()
    scores = [Score(loss=loss, lines=round(lines)) for loss, lines in sums_D2.tolist()]
    mean_loss(trials, scores)  # raises where it is no number
    return scores


def mean_loss(trials: Sequence[HeldOutExample], scores: Sequence[Score]) -> float:
    """Over all target tokens, nats.

    Raises:
        NotFinite: it is none.
    """
    loss = sum(score.loss for score in scores) / sum(trial.document.targets for trial in trials)
    if not abs(loss) < float("inf"):
        raise NonFiniteError(
            f"the loss on the held-out examples is {loss}",
            suggestions=["Lower learning_rate.", "Try device='cpu', which computes in float32."],
        )
    return loss


def _trial(example: Example, document: Document, tokenizer: BaseTokenizer) -> HeldOutExample:
    """Lines and cuts of the segments that are learned, where they lie in the document."""
    lines: list[Line] = []
    cuts: list[CompletionPoint] = []
    encodings = tokenizer.encode(example.segments)
    # `tokenise` puts what the tokenizer begins with before the segments, and the end of the text behind them.
    first = encodings[0].ids if encodings else []
    begin = 0 if tuple(first[: len(tokenizer.beginning)]) == tokenizer.beginning else len(tokenizer.beginning)
    for segment, encoding in zip(example.segments, encodings, strict=True):
        if segment.learn:
            lines += [
                Line(line.row, begin + line.first, begin + line.last, line.holds_end)
                for line in lines_of(segment.text, encoding.offsets)
            ]
            cuts += [
                CompletionPoint(cut.row, begin + cut.first, cut.expected)
                for cut in find_completion_points(segment.text, encoding.offsets)
                # Where the text breaks off, it is not known what comes next, and both models would write on.
                if example.ends or cut.expected.count("\n") == EXPECTED_LINES
            ]
        begin += len(encoding.ids)
    room = len(document)
    return HeldOutExample(
        example,
        document,
        lines=tuple(line for line in lines if line.last - line.holds_end < room),
        cuts=tuple(cut for cut in cuts if cut.first < room),
    )


def _lines_written(trial: HeldOutExample, likeliest_N: torch.Tensor, ends_line_V: torch.Tensor) -> int:
    """Lines of which every token is the likeliest one: what greedy writing would give, line by line.

    The token behind a line must end it; which indentation follows is not the line's matter.
    """
    ids_T = trial.document.ids_T.long()
    likeliest_T = torch.full_like(ids_T, -1)
    likeliest_T[trial.document.learn_T] = likeliest_N
    right_T = likeliest_T == ids_T
    ends_T = right_T | ((likeliest_T >= 0) & ends_line_V[likeliest_T.clamp(min=0)])
    return sum(
        bool(right_T[line.first : line.last].all()) and (line.holds_end or bool(ends_T[line.last]))
        for line in trial.lines
    )


def _ends_line(tokenizer: BaseTokenizer) -> torch.Tensor:
    """Of each token of the vocabulary, whether it begins with the end of a line. [V], padded: bases hold more rows."""
    size = tokenizer.tokenizer.get_vocab_size()
    texts = tokenizer.tokenizer.decode_batch([[token] for token in range(size)], skip_special_tokens=False)
    ends = [text.startswith(("\n", "\r")) for text in texts]
    ends_V = torch.zeros(2 * size + 1024, dtype=torch.bool)
    ends_V[:size] = torch.tensor(ends)
    ends_V[tokenizer.end_of_text] = True
    return ends_V


# FOLDED FROM peft_core.evaluation.worker.scoring: Loss on held-out examples.

_DURING_TRAINING_TOKENS = 8192


def held_out_loss(
    objective: Objective,
    documents: Sequence[Document],
    accelerator: Accelerator,
    stop: StopFlag,
) -> float:
    """Mean over all target tokens of -log p, nats. Each process takes its share of the documents.

    Raises:
        NotFinite: the loss.
        Stopped: on request; only where there is one process, as others would wait for this one.
    """
    share = sorted(documents, key=len, reverse=True)[accelerator.process_index :: accelerator.num_processes]
    was_training = objective.model.training
    objective.model.eval()
    total = torch.zeros((), device=accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        for batch in objective.batches(share, accelerator.device):
            total += objective.loss(batch)
            trim_if_above()
            if accelerator.num_processes == 1:
                stop.check()
    objective.model.train(was_training)
    total = accelerator.reduce(total, reduction="sum")
    loss = float(total.item()) / sum(document.targets for document in documents)
    if not abs(loss) < float("inf"):
        raise NonFiniteError(
            f"the loss on the held-out examples is {loss}",
            suggestions=["Lower learning_rate.", "Try device='cpu', which computes in float32."],
        )
    return loss


def subset(documents: Sequence[Document], seed: int) -> list[Document]:
    """A fixed random subset that is quick enough to measure during training: about 8k tokens."""
    shuffled = list(documents)
    random.Random(f"held-out/{seed}").shuffle(shuffled)  # noqa: S311 -- a sample, not a secret
    chosen: list[Document] = []
    room = _DURING_TRAINING_TOKENS
    for document in shuffled:
        if chosen and len(document) > room:
            break
        chosen.append(document)
        room -= len(document)
    return chosen
