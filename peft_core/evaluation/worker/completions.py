"""Completion of prompts from held-out text by a model: greedy decoding, several prompts in a batch.

B prompts, T tokens
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from peft_core.base_models.tokenizer import BaseTokenizer
from peft_core.evaluation.completion_points import EXPECTED_LINES, CompletionPoint, sample_completion_points
from peft_core.evaluation.summary import QuotedPrompt
from peft_core.evaluation.worker.scoring import HeldOutExample
from peft_core.planning.cost_model import MICRO_TOKENS
from peft_core.system.cancellation import StopFlag
from peft_core.system.failures import is_out_of_memory

MAX_NEW_TOKENS = 32
_PROMPT_TOKENS = 192  # the last ones before the completion point
# Tokens of a batch, prompts and completions together. Caches and activations take 0.1 MB per token with the bundled model. A
# GPU takes as many as in training, because there the time of a batch barely depends on its size.
_BATCH_TOKENS = {"cpu": 1024, "mps": 1024, "cuda": MICRO_TOKENS["cuda"]}
_QUOTED_PROMPT_LINES = 6  # in the report


@dataclass(frozen=True)
class Prompt:
    example: HeldOutExample
    point: CompletionPoint
    ids: tuple[int, ...]

    def quote(self, tokenizer: BaseTokenizer) -> QuotedPrompt:
        """Return the last lines of the prompt, for people."""
        example, text = self.example.example, tokenizer.text(self.ids)
        visible = text.rstrip(" \t")
        return QuotedPrompt(
            file=example.path,
            line=example.start_line + self.point.row if example.start_line else 0,
            text="\n".join(visible.splitlines()[-_QUOTED_PROMPT_LINES:]),
            indentation=text[len(visible) :],
            expected=self.point.expected,
        )


def choose_prompts(
    examples: Sequence[HeldOutExample], limit: int, max_tokens: int, seed: int, tokenizer: BaseTokenizer
) -> list[Prompt]:
    """Choose at most `limit` prompts that one model can complete within `max_tokens`, prompts included."""
    prompts: list[Prompt] = []
    for index, point in sample_completion_points([example.completion_points for example in examples], limit, seed):
        ids = examples[index].document.ids_T[: point.first].tolist()
        if len(ids) > _PROMPT_TOKENS:
            ids = [*tokenizer.beginning, *ids[-_PROMPT_TOKENS:]]
        max_tokens -= len(ids) + MAX_NEW_TOKENS
        if max_tokens < 0:
            break
        prompts.append(Prompt(examples[index], point, tuple(ids)))
    return prompts


def undo_fusion(model: nn.Module, causal: PreTrainedModel) -> None:
    """Restore the layers' own forward methods: generation needs key-value caches, which the fused ones do not support.

    The model must not be trained afterwards.
    """
    for module in model.modules():
        module.__dict__.pop("forward", None)  # fusion and gradient checkpointing set it on the instance
    causal.set_attn_implementation("sdpa" if causal._supports_sdpa else "eager")  # noqa: SLF001 -- no public name
    model.eval()


def complete(causal: PreTrainedModel, prompts: Sequence[Prompt], tokenizer: BaseTokenizer, stop: StopFlag) -> list[str]:
    """Return up to three lines for each prompt, written with the adapter that is active, if any."""
    end = tokenizer.end_of_text
    # The base model's own defaults (sampling, repetition penalties) would distort the comparison.
    causal.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    texts = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))  # needs little padding
    lengths = [len(prompt.ids) + MAX_NEW_TOKENS for prompt in prompts]
    batches = deque(_batches(by_length, lengths, _BATCH_TOKENS[causal.device.type]))
    while batches:
        stop.check()
        batch = batches.popleft()
        try:
            completions = _complete_batch(causal, [prompts[index].ids for index in batch], tokenizer)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            half = len(batch) // 2
            batches.extendleft((batch[half:], batch[:half]))
            continue
        for index, ids in zip(batch, completions, strict=True):
            text = tokenizer.continuation(prompts[index].ids, ids)
            texts[index] = "".join(text.splitlines(keepends=True)[:EXPECTED_LINES])
    return texts


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


def _complete_batch(
    causal: PreTrainedModel, prompts: Sequence[Sequence[int]], tokenizer: BaseTokenizer
) -> list[list[int]]:
    device, end = causal.device, tokenizer.end_of_text
    longest = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), longest), end, device=device)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all completions begin in the same column
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask_BT[row, longest - len(prompt) :] = 1
    with torch.inference_mode():
        out_BT = causal.generate(  # type: ignore[operator]  # defined by a mixin
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=GenerationConfig(
                max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end
            ),
            stopping_criteria=StoppingCriteriaList([_StopAfterLines(tokenizer, longest)]),
        )
    rows: list[list[int]] = out_BT[:, longest:].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


class _StopAfterLines(StoppingCriteria):
    """Stops a completion at the end of its third line."""

    def __init__(self, tokenizer: BaseTokenizer, prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002 -- transformers' signature
        texts = [self._tokenizer.text(row) for row in input_ids[:, self._prompt_length :].tolist()]
        is_done = [text.count("\n") >= EXPECTED_LINES for text in texts]
        return torch.tensor(is_done, dtype=torch.bool, device=input_ids.device)
