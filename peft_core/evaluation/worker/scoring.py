"""Held-out examples, and how well a model predicts them.

T tokens, N positions with a target, D examples, V vocabulary
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from peft_core.base_models.tokenizer import BaseTokenizer, Tokens
from peft_core.evaluation.summary import ExampleScore, mean_loss, require_finite
from peft_core.evaluation.worker.completion_points import (
    EXPECTED_LINES,
    CompletionPoint,
    Line,
    find_completion_points,
    find_lines,
)
from peft_core.modeling.batches import Document, join, pack, tokenise_segments
from peft_core.modeling.memory import trim_if_above
from peft_core.modeling.mps import sum_dtype
from peft_core.modeling.objective import Objective
from peft_core.schemas.dataset import Example
from peft_core.system.cancellation import StopFlag

_SAMPLE_TOKENS = 8192  # evaluated repeatedly during training


@dataclass(frozen=True, eq=False)
class HeldOutExample:
    """One example to evaluate on. Lines and completion points are positions in the document's tokens."""

    example: Example
    document: Document
    lines: tuple[Line, ...]
    completion_points: tuple[CompletionPoint, ...]


def make_held_out_examples(
    examples: Iterable[Example], tokenizer: BaseTokenizer, max_length: int
) -> list[HeldOutExample]:
    """Tokenise the examples; those without a target token are dropped."""
    tokenised = ((example, *tokenise_segments(example, tokenizer, max_length)) for example in examples)
    return [
        _make_held_out_example(example, document, segments)
        for example, document, segments in tokenised
        if document.targets
    ]


def score_examples(
    objective: Objective,
    examples: Sequence[HeldOutExample],
    tokenizer: BaseTokenizer,
    accelerator: Accelerator,
    stop: StopFlag,
) -> list[ExampleScore]:
    """Score the model in its present state on every example. Processes divide the examples among them.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        Cancelled: on request, but only with a single process: the others would wait for this one.
    """
    sums_D2 = torch.zeros(len(examples), 2, dtype=sum_dtype(accelerator.device))
    ends_line_V = tokens_that_end_a_line(tokenizer)

    def add(index: int, loss_n: torch.Tensor, likeliest_n: torch.Tensor) -> None:
        exact_lines = _count_exact_lines(examples[index], likeliest_n, ends_line_V)
        sums_D2[index] = torch.tensor([float(loss_n.double().sum()), exact_lines])

    predict_documents(objective, [example.document for example in examples], accelerator, stop, add)
    sums_D2 = accelerator.reduce(sums_D2.to(accelerator.device), reduction="sum").cpu()
    scores = [
        ExampleScore(
            file=example.example.path,
            tokens=example.document.targets,
            total_lines=len(example.lines),
            loss=loss,
            lines=round(lines),
        )
        for example, (loss, lines) in zip(examples, sums_D2.tolist(), strict=True)
    ]
    mean_loss(scores)  # raises if it is not finite
    return scores


def predict_documents(
    objective: Objective,
    documents: Sequence[Document],
    accelerator: Accelerator,
    stop: StopFlag,
    add: Callable[[int, torch.Tensor, torch.Tensor], None],
) -> None:
    """Call `add` for each document, in any order. Processes divide the documents among them.

    `add` gets the document's index, -log p [n] of its n targets, and the likeliest token [n] in place of each, on the CPU.

    Raises:
        Cancelled: on request, but only with a single process: the others would wait for this one.
    """
    was_training = objective.model.training
    objective.model.eval()
    order = sorted(range(len(documents)), key=lambda index: (-len(documents[index]), index))
    share = order[accelerator.process_index :: accelerator.num_processes]
    with torch.no_grad(), accelerator.autocast():
        for group in pack([len(documents[index]) for index in share], objective.capacity):
            members = [share[position] for position in group]
            batch = join([documents[index] for index in members], accelerator.device, objective.multiple_of)
            loss_N, likeliest_N = (values.cpu() for values in objective.scores(batch))
            sizes = [documents[index].targets for index in members]
            for index, loss_n, likeliest_n in zip(members, loss_N.split(sizes), likeliest_N.split(sizes), strict=True):
                add(index, loss_n, likeliest_n)
            trim_if_above()
            if accelerator.num_processes == 1:
                stop.check()
    objective.model.train(was_training)


def held_out_loss(
    objective: Objective, documents: Sequence[Document], accelerator: Accelerator, stop: StopFlag
) -> float:
    """Return the mean of -log p over all target tokens, in nats. Processes divide the documents among them.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
        Cancelled: on request, but only with a single process: the others would wait for this one.
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
    return require_finite(float(total.item()) / sum(document.targets for document in documents))


def sample_for_training(documents: Sequence[Document], seed: int) -> list[Document]:
    """Choose a fixed random sample, of about 8k tokens, that is fast enough to evaluate during training."""
    shuffled = list(documents)
    random.Random(f"held-out/{seed}").shuffle(shuffled)  # noqa: S311 -- a sample, not a secret
    sample: list[Document] = []
    free_tokens = _SAMPLE_TOKENS
    for document in shuffled:
        if sample and len(document) > free_tokens:
            break
        sample.append(document)
        free_tokens -= len(document)
    return sample


def _make_held_out_example(
    example: Example, document: Document, segments: Sequence[tuple[int, Tokens]]
) -> HeldOutExample:
    """Find the lines and completion points in the segments that carry loss."""
    lines: list[Line] = []
    points: list[CompletionPoint] = []
    for segment, (begin, encoding) in zip(example.segments, segments, strict=True):
        if segment.learn:
            lines += [
                Line(line.row, begin + line.first, begin + line.last, line.includes_newline)
                for line in find_lines(segment.text, encoding.offsets)
            ]
            points += [
                CompletionPoint(point.row, begin + point.first, point.expected)
                for point in find_completion_points(segment.text, encoding.offsets)
                # If the text is cut off, its continuation is unknown, and a model would rightly write more lines.
                if example.ends or point.expected.count("\n") == EXPECTED_LINES
            ]
    length = len(document)
    return HeldOutExample(
        example,
        document,
        lines=tuple(line for line in lines if line.last - line.includes_newline < length),
        completion_points=tuple(point for point in points if point.first < length),
    )


def _count_exact_lines(example: HeldOutExample, likeliest_N: torch.Tensor, ends_line_V: torch.Tensor) -> int:
    """Count the lines that greedy decoding would write exactly, each given all lines before it.

    The token after a line must end it, but may contain any indentation of the next line.
    """
    is_exact_T, ends_line_T = find_exact(example.document, likeliest_N, ends_line_V)
    return sum(
        bool(is_exact_T[line.first : line.last].all()) and (line.includes_newline or bool(ends_line_T[line.last]))
        for line in example.lines
    )


def find_exact(document: Document, likeliest_N: torch.Tensor, *ends_V: torch.Tensor) -> list[torch.Tensor]:
    """Return where the likeliest token is the document's [T], and for each mask of ends, where it is that or an end [T]."""
    ids_T = document.ids_T.long()
    likeliest_T = torch.full_like(ids_T, -1)
    likeliest_T[document.learn_T] = likeliest_N
    is_exact_T = likeliest_T == ids_T
    return [is_exact_T, *(is_exact_T | (likeliest_T >= 0) & end_V[likeliest_T.clamp(min=0)] for end_V in ends_V)]


def tokens_that_end_a_line(tokenizer: BaseTokenizer) -> torch.Tensor:
    """Return a mask over the vocabulary, see `tokens_whose_text`."""
    return tokens_whose_text(tokenizer, lambda text: text.startswith(("\n", "\r")))


def tokens_whose_text(tokenizer: BaseTokenizer, is_meant: Callable[[str], bool]) -> torch.Tensor:
    """Return a mask over the vocabulary: tokens whose text is meant, and the end-of-text token.

    It is longer than the vocabulary, because embedding matrices have unused rows at the end.
    """
    size = tokenizer.tokenizer.get_vocab_size()
    texts = tokenizer.tokenizer.decode_batch([[token] for token in range(size)], skip_special_tokens=False)
    meant_V = torch.zeros(2 * size + 1024, dtype=torch.bool)
    meant_V[:size] = torch.tensor([is_meant(text) for text in texts])
    meant_V[tokenizer.end_of_text] = True
    return meant_V
