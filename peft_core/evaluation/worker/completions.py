"""Completion of prompts from held-out text by a model, line by line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, StoppingCriteria

from peft_core.base_models.tokenizer import BaseTokenizer
from peft_core.data.chunking import split_lines
from peft_core.evaluation.summary import Written
from peft_core.evaluation.worker.completion_points import EXPECTED_LINES
from peft_core.evaluation.worker.greedy import Continuation, write_greedily
from peft_core.evaluation.worker.prompts import MAX_NEW_TOKENS, Prompt
from peft_core.planning.cost_model import MICRO_TOKENS
from peft_core.system.cancellation import StopFlag

# Tokens of a batch, prompts and completions together. Caches and activations take 0.1 MB per token with the bundled model. A
# GPU takes as many as in training, because there the time of a batch barely depends on its size.
_BATCH_TOKENS = {"cpu": 2048, "mps": 2048, "cuda": MICRO_TOKENS["cuda"]}


def undo_fusion(model: nn.Module, causal: PreTrainedModel) -> None:
    """Restore the layers' own forward methods: generation needs key-value caches, which the fused ones do not support.

    The model must not be trained afterwards.
    """
    for module in model.modules():
        module.__dict__.pop("forward", None)  # fusion and gradient checkpointing set it on the instance
    causal.set_attn_implementation("sdpa" if causal._supports_sdpa else "eager")  # noqa: SLF001 -- no public name
    model.eval()


def complete(
    causal: PreTrainedModel, prompts: Sequence[Prompt], tokenizer: BaseTokenizer, stop: StopFlag
) -> list[Written]:
    """Return for each prompt as many lines as are expected, written with the adapter that is active, if any.

    In a gap there may be four: only a model that goes beyond the gap writes them.
    """
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))  # needs little padding
    lengths = [len(prompt.ids) + MAX_NEW_TOKENS for prompt in prompts]
    limit = max(map(_line_limit, prompts), default=0)
    continuations = write_greedily(
        causal,
        [prompt.ids for prompt in prompts],
        _batches(by_length, lengths, _BATCH_TOKENS[causal.device.type]),
        max_new_tokens=MAX_NEW_TOKENS,
        ends=_ends(tokenizer),
        stop=stop,
        stopping=lambda prompt_tokens: _StopAfterLines(tokenizer, prompt_tokens, limit),
    )
    return [
        _written(prompt, continuation, tokenizer) for prompt, continuation in zip(prompts, continuations, strict=True)
    ]


def _written(prompt: Prompt, continuation: Continuation, tokenizer: BaseTokenizer) -> Written:
    text, limit = tokenizer.continuation(prompt.ids, continuation.ids), _line_limit(prompt)
    # A completion that reached the limit is padded with the token that others end with.
    has_ended = continuation.has_ended and text.count("\n") < limit
    return Written("".join(text.splitlines(keepends=True)[:limit]), has_ended=has_ended)


def _batches(order: Sequence[int], lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Split the indices, which must be in order of length, into batches of at most `max_tokens` with their padding."""
    batch: list[int] = []
    for index in order:
        if batch and (len(batch) + 1) * lengths[index] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def _ends(tokenizer: BaseTokenizer) -> list[int]:
    """Return the tokens with which a completion ends: end-of-text, and that of a gap."""
    marks = tokenizer.fill_in_the_middle
    end_of_gap = tokenizer.tokenizer.token_to_id(marks.end) if marks is not None and marks.end else None
    return [tokenizer.end_of_text] if end_of_gap is None else [tokenizer.end_of_text, end_of_gap]


def _line_limit(prompt: Prompt) -> int:
    """Without a gap, nothing says where to stop: a model that does is no better than one that writes the next line, too."""
    return EXPECTED_LINES + 1 if prompt.fills_gap else len(split_lines(prompt.quoted.expected))


class _StopAfterLines(StoppingCriteria):
    """Stops a completion at the end of its last line."""

    def __init__(self, tokenizer: BaseTokenizer, prompt_length: int, limit: int) -> None:
        self._tokenizer = tokenizer
        self._limit = limit
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002 -- transformers' signature
        texts = [self._tokenizer.text(row) for row in input_ids[:, self._prompt_length :].tolist()]
        is_done = [text.count("\n") >= self._limit for text in texts]
        return torch.tensor(is_done, dtype=torch.bool, device=input_ids.device)
