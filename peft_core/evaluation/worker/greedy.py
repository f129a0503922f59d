"""Greedy decoding of many prompts: padded batches, which are halved when memory runs out.

B prompts, T tokens
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from peft_core.system.cancellation import StopFlag
from peft_core.system.failures import is_out_of_memory


class Continuation(NamedTuple):
    """What a model wrote after a prompt."""

    ids: list[int]
    has_ended: bool  # with one of the tokens for it; not because of a limit


def write_greedily(
    causal: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    batches: Iterable[Sequence[int]],
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    stop: StopFlag,
    stopping: Callable[[int], StoppingCriteria] | None = None,
) -> list[Continuation]:
    """Continue each prompt with the adapter that is active, if any.

    Args:
        causal: The model. Its own defaults (sampling, repetition penalties) would distort a comparison, so they are replaced.
        prompts: Tokens.
        batches: The indices of the prompts that are continued together.
        max_new_tokens: For each prompt.
        ends: Tokens that end a text; the first one also pads.
        stop: Is looked at before each batch.
        stopping: Returns a further criterion for a batch, given the tokens of its prompts with their padding.
    """
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=list(ends), pad_token_id=ends[0]
    )
    causal.generation_config = GenerationConfig(eos_token_id=ends[0], pad_token_id=ends[0])
    written = [Continuation([], has_ended=False)] * len(prompts)
    queue = deque(batches)
    while queue:
        stop.check()
        batch = queue.popleft()
        try:
            continuations = _write_batch(causal, [prompts[index] for index in batch], config, ends, stopping)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not is_out_of_memory(error):
                raise
            half = len(batch) // 2
            queue.extendleft((batch[half:], batch[:half]))
            continue
        for index, continuation in zip(batch, continuations, strict=True):
            written[index] = continuation
    return written


def _write_batch(
    causal: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    ends: Sequence[int],
    stopping: Callable[[int], StoppingCriteria] | None,
) -> list[Continuation]:
    longest = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), longest), ends[0])
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):  # padded on the left, so that all continuations begin in the same column
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask_BT[row, longest - len(prompt) :] = 1
    with torch.inference_mode():
        out_BT = causal.generate(  # type: ignore[operator]  # defined by a mixin
            input_ids=ids_BT.to(causal.device),
            attention_mask=mask_BT.to(causal.device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([stopping(longest)] if stopping is not None else []),
        )
    rows: list[list[int]] = out_BT[:, longest:].tolist()
    stops = [next((place for place, token in enumerate(row) if token in ends), None) for row in rows]
    return [Continuation(row[:stop], stop is not None) for row, stop in zip(rows, stops, strict=True)]
