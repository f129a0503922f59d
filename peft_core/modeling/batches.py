"""The order of training examples, and sequence packing: documents end to end instead of padded.

T tokens, N positions with a target; 1 is the batch dimension that models expect
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, islice

import torch

from peft_core.base_models.tokenizer import BaseTokenizer, Tokens
from peft_core.schemas.dataset import Example

IGNORED = -100  # marks a position without a target, as in torch
_PACKING_WINDOW = 64  # documents packed at a time, because first-fit is quadratic


@dataclass(frozen=True, eq=False)
class Document:
    """One tokenised example. `learn_T[t]`: token t is a target, predicted from the tokens before it."""

    ids_T: torch.Tensor  # int32
    learn_T: torch.Tensor  # bool; False for the first token, which has no context

    def __len__(self) -> int:
        return self.ids_T.shape[0]

    @cached_property
    def targets(self) -> int:
        """The number of tokens that carry loss."""
        return int(self.learn_T.sum())


def tokenise(example: Example, tokenizer: BaseTokenizer, max_length: int) -> Document:
    """Tokenise the segments in order, then the end-of-text token if the text ends; truncate to `max_length` tokens."""
    return tokenise_segments(example, tokenizer, max_length)[0]


def tokenise_segments(
    example: Example, tokenizer: BaseTokenizer, max_length: int
) -> tuple[Document, list[tuple[int, Tokens]]]:
    """Return the document, and for each segment the index of its first token and its tokens (not truncated)."""
    encodings = tokenizer.encode(example.segments)
    ids = [token for tokens in encodings for token in tokens.ids]
    learn = [segment.learn for segment, tokens in zip(example.segments, encodings, strict=True) for _ in tokens.ids]
    prefix = () if tuple(ids[: len(tokenizer.beginning)]) == tokenizer.beginning else tokenizer.beginning
    starts = accumulate((len(tokens.ids) for tokens in encodings), initial=len(prefix))
    ids, learn = [*prefix, *ids], [False] * len(prefix) + learn
    if example.ends and ids and ids[-1] != tokenizer.end_of_text:  # a chat turn may end with its own
        ids.append(tokenizer.end_of_text)
        learn.append(learn[-1])
    learn[:1] = [False] * len(learn[:1])
    document = Document(
        ids_T=torch.tensor(ids[:max_length], dtype=torch.int32),
        learn_T=torch.tensor(learn[:max_length], dtype=torch.bool),
    )
    return document, list(zip(starts, encodings, strict=False))  # the last start is the end of the last segment


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Documents packed end to end, padded only on devices that need few different shapes."""

    ids_1T: torch.Tensor  # int64
    positions_1T: torch.Tensor  # int64; restart at 0 in each document
    lengths: tuple[int, ...]  # of the documents; sum T
    source_N: torch.Tensor  # int64; positions in T whose next token is a target
    target_N: torch.Tensor  # int64; token ids, or IGNORED

    @property
    def tokens(self) -> int:
        return self.ids_1T.shape[1]


def join(documents: Sequence[Document], device: torch.device, multiple_of: int | None = None) -> MicroBatch:
    """Pack documents end to end.

    `multiple_of`: pad T to a multiple of it, with N equal to T, for devices that need few different shapes. The padding is one
    more document without targets.
    """
    if multiple_of is not None and (rest := -sum(map(len, documents)) % multiple_of):
        padding_T = torch.zeros(rest, dtype=torch.int32)
        documents = [*documents, Document(ids_T=padding_T, learn_T=padding_T.bool())]
    ids_T = torch.cat([document.ids_T for document in documents]).long()
    positions_T = torch.cat([torch.arange(len(document)) for document in documents])
    target_at_N = torch.cat([document.learn_T for document in documents]).nonzero()[:, 0]
    source_N, target_N = target_at_N - 1, ids_T[target_at_N]
    if multiple_of is not None:
        target_N = torch.full_like(ids_T, IGNORED).index_copy_(0, source_N, target_N)
        source_N = torch.arange(len(ids_T))
    return MicroBatch(
        ids_1T=ids_T[None].to(device),
        positions_1T=positions_T[None].to(device),
        lengths=tuple(len(document) for document in documents),
        source_N=source_N.to(device),
        target_N=target_N.to(device),
    )


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Group indices so that the lengths of a group sum to at most `capacity` (first-fit decreasing bin packing).

    An item longer than `capacity` gets a group of its own.
    """
    groups: list[list[int]] = []
    free_tokens: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        for group, free in enumerate(free_tokens):
            if length <= free:
                groups[group].append(index)
                free_tokens[group] -= length
                break
        else:
            groups.append([index])
            free_tokens.append(capacity - length)
    return groups


def micro_batches(
    documents: Iterable[Document], capacity: int, device: torch.device, multiple_of: int | None = None
) -> Iterator[MicroBatch]:
    """Yield all documents, each once, in micro-batches of at most `capacity` tokens, padded as `join` says."""
    stream = iter(documents)
    while window := list(islice(stream, _PACKING_WINDOW)):
        for group in pack([len(document) for document in window], capacity):
            yield join([window[index] for index in group], device, multiple_of)


@dataclass(frozen=True)
class Order:
    """The order of examples: shuffled for each epoch, and a pure function of the seed.

    A step's examples follow from its number, so that a resumed run needs no other state.
    """

    examples: int  # in the training set
    batch_size: int  # examples per step
    shown: int  # examples in all steps together, with repetitions
    seed: int

    @property
    def total_steps(self) -> int:
        return -(-self.shown // self.batch_size)

    def step(self, step: int) -> list[int]:
        """Return the indices of the examples of a step (1-based). The last step may have fewer."""
        first = (step - 1) * self.batch_size
        return [self._at(position) for position in range(first, self.shown_by(step))]

    def shown_by(self, step: int) -> int:
        """Return how many examples the first steps show, with repetitions."""
        return min(step * self.batch_size, self.shown)

    def seen_by(self, step: int) -> list[int]:
        """Return the indices of the examples that the first steps show, each once, in order of their number."""
        shown = self.shown_by(step)
        if shown >= self.examples:
            return list(range(self.examples))
        return sorted(self._at(position) for position in range(shown))

    def tokens(self, lengths: Sequence[int]) -> int:
        """Return the tokens of all steps together, for examples of these lengths."""
        epochs, rest = divmod(self.shown, self.examples)
        last = _shuffled(self.examples, self.seed, epochs)[:rest]
        return epochs * sum(lengths) + sum(lengths[index] for index in last)

    def _at(self, position: int) -> int:
        epoch, offset = divmod(position, self.examples)
        return _shuffled(self.examples, self.seed, epoch)[offset]


def plan_order(*, examples: int, batch_size: int, num_epochs: float | None, max_steps: int | None, seed: int) -> Order:
    """Plan `max_steps` steps, or `num_epochs` passes over the data (default 1; at least one example)."""
    if max_steps is not None:
        shown = max_steps * batch_size
    else:
        shown = max(1, round((1.0 if num_epochs is None else num_epochs) * examples))
    return Order(examples=examples, batch_size=batch_size, shown=shown, seed=seed)


@lru_cache(maxsize=2)  # a step can straddle two epochs
def _shuffled(examples: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)  # noqa: S311 -- an order, not a secret
    return tuple(order)
