"""What a model writes where held-out text goes on: greedy, some prompts at a time.

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

from peft_core.evaluation.completion_points import EXPECTED_LINES, CompletionPoint, choose
from peft_core.evaluation.worker.scoring import HeldOutExample
from peft_core.modeling.tokenizer import BaseTokenizer
from peft_core.planning.cost_model import MICRO_TOKENS
from peft_core.system.cancellation import StopFlag
from peft_core.system.failures import is_out_of_memory

MAX_NEW_TOKENS = 32
_PROMPT_TOKENS = 192  # nearest to the cut
# Read and written; caches and what is computed from prompts take 0.1 MB a token of the bundled base. A GPU takes as many as
# it trains on: each further group takes it as long as the first.
_TOKENS_AT_ONCE = {"cpu": 1024, "mps": 1024, "cuda": MICRO_TOKENS["cuda"]}
_SHOWN_LINES = 6  # of a prompt, in the report


@dataclass(frozen=True)
class Prompt:
    trial: HeldOutExample
    cut: CompletionPoint
    ids: tuple[int, ...]

    @property
    def line(self) -> int:
        start = self.trial.example.start_line
        return start + self.cut.row if start else 0

    def shown(self, tokenizer: BaseTokenizer) -> tuple[str, str]:
        """(the last lines, the indentation at which the next one begins)."""
        text = tokenizer.text(self.ids)
        visible = text.rstrip(" \t")
        return "\n".join(visible.splitlines()[-_SHOWN_LINES:]), text[len(visible) :]


def choose_prompts(
    trials: Sequence[HeldOutExample],
    most: int,
    max_tokens: int,
    seed: int,
    tokenizer: BaseTokenizer,
) -> list[Prompt]:
    """At most so many prompts, and no more than cost `max_tokens`, read and written by one model."""
    prompts: list[Prompt] = []
    for index, cut in choose([trial.cuts for trial in trials], most, seed):
        ids = trials[index].document.ids_T[: cut.first].tolist()
        if len(ids) > _PROMPT_TOKENS:
            ids = [*tokenizer.beginning, *ids[-_PROMPT_TOKENS:]]
        max_tokens -= len(ids) + MAX_NEW_TOKENS
        if max_tokens < 0:
            break
        prompts.append(Prompt(trials[index], cut, tuple(ids)))
    return prompts


def undo_fusion(model: nn.Module, causal: PreTrainedModel) -> None:
    """Undo what training did to the layers: writing wants caches, which theirs do without. Not to be trained on after."""
    for module in model.modules():
        module.__dict__.pop("forward", None)  # fused layers and such that compute twice are of the instance alone
    causal.set_attn_implementation("sdpa" if causal._supports_sdpa else "eager")  # noqa: SLF001 -- no public name
    model.eval()


def write(causal: PreTrainedModel, prompts: Sequence[Prompt], tokenizer: BaseTokenizer, stop: StopFlag) -> list[str]:
    """Up to three lines behind each prompt, by whatever adapter is on."""
    end = tokenizer.end_of_text
    # The base's own defaults (sampling, repetition penalties) would mix into what is compared.
    causal.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    texts = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))  # little padding
    lengths = [len(prompt.ids) + MAX_NEW_TOKENS for prompt in prompts]
    groups = deque(_groups(order, lengths, _TOKENS_AT_ONCE[causal.device.type]))
    while groups:
        stop.check()
        some = groups.popleft()
        try:
            written = _write_some(causal, [prompts[index].ids for index in some], tokenizer)
        except (RuntimeError, MemoryError) as error:
            if len(some) == 1 or not is_out_of_memory(error):
                raise
            groups.extendleft((some[len(some) // 2 :], some[: len(some) // 2]))
            continue
        for index, ids in zip(some, written, strict=True):
            text = tokenizer.continuation(prompts[index].ids, ids)
            texts[index] = "".join(text.splitlines(keepends=True)[:EXPECTED_LINES])
    return texts


def _groups(order: Sequence[int], lengths: Sequence[int], at_once: int) -> Iterator[list[int]]:
    """Texts that are written together, in this order, in which none is shorter than the one before."""
    group: list[int] = []
    for index in order:
        if group and (len(group) + 1) * lengths[index] > at_once:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def _write_some(causal: PreTrainedModel, prompts: Sequence[Sequence[int]], tokenizer: BaseTokenizer) -> list[list[int]]:
    device, end = causal.device, tokenizer.end_of_text
    longest = max(map(len, prompts))
    ids_BT = torch.full((len(prompts), longest), end, device=device)
    mask_BT = torch.zeros_like(ids_BT)
    for row, prompt in enumerate(prompts):  # padded on the left: all go on from the same column
        ids_BT[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
        mask_BT[row, longest - len(prompt) :] = 1
    with torch.inference_mode():
        written_BT = causal.generate(  # type: ignore[operator]  # a mixin's method
            input_ids=ids_BT,
            attention_mask=mask_BT,
            generation_config=GenerationConfig(
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                eos_token_id=end,
                pad_token_id=end,
            ),
            stopping_criteria=StoppingCriteriaList([_Lines(tokenizer, longest)]),
        )
    rows: list[list[int]] = written_BT[:, longest:].tolist()
    return [row[: row.index(end)] if end in row else row for row in rows]


class _Lines(StoppingCriteria):
    """Ends a text at its third line end."""

    def __init__(self, tokenizer: BaseTokenizer, start: int) -> None:
        self._tokenizer = tokenizer
        self._start = start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002 -- transformers' signature
        texts = [self._tokenizer.text(row) for row in input_ids[:, self._start :].tolist()]
        ended = [text.count("\n") >= EXPECTED_LINES for text in texts]
        return torch.tensor(ended, dtype=torch.bool, device=input_ids.device)
