"""A base model in torch, with adapters through PEFT, and its token-by-token generation.

Shape suffixes: T tokens, 1 a batch of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from peft_core.adapters.files import AdapterFiles
from peft_core.base_models.tokenizer import BaseTokenizer
from peft_core.inference.worker.models import Completion, EncodedPrompt, OnToken, first_stop
from peft_core.modeling.adapter_model import ResidentModel
from peft_core.modeling.threads import DecodeThreadTuner
from peft_core.schemas.base_model import Base
from peft_core.schemas.generation import Engine, GenerationRequest
from peft_core.schemas.results import LoadCheck

_GREEDY_BELOW = 0.01  # temperature: dividing by less leaves one candidate anyway, or overflows
_PREFILL_CHUNK = 512  # tokens


@dataclass
class TorchModel:
    """A `LoadedModel` in torch."""

    resident: ResidentModel
    directory: Path  # of the base model
    thread_tuner: DecodeThreadTuner
    engine_reason: str

    @property
    def engine(self) -> Engine:
        return "torch"

    @property
    def base(self) -> Base:
        return self.resident.base

    @property
    def tokenizer(self) -> BaseTokenizer:
        return self.resident.tokenizer

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.directory,)

    @property
    def context_length(self) -> int:
        return self.base.shape.context_length

    def add(self, files: AdapterFiles) -> tuple[str, LoadCheck]:
        return self.resident.add(files)

    def select(self, name: str | None) -> None:
        self.resident.select(name)

    def remove(self, name: str) -> None:
        self.resident.remove(name)

    def complete(self, prompt: EncodedPrompt, request: GenerationRequest, on_token: OnToken) -> Completion:
        return _complete(self.resident, prompt, request, self.thread_tuner, on_token)


def _complete(
    model: ResidentModel,
    prompt: EncodedPrompt,
    request: GenerationRequest,
    thread_tuner: DecodeThreadTuner,
    on_token: OnToken,
) -> Completion:
    free_tokens = model.base.shape.context_length - len(prompt.ids)
    stop_check = _StopCheck(model.tokenizer, prompt, request.stop, thread_tuner, on_token)
    sampling: dict[str, Any] = {"do_sample": False}
    if request.temperature >= _GREEDY_BELOW:
        sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
    ids_1T = torch.tensor([prompt.ids], device=model.causal.device)
    thread_tuner.prompt()
    with torch.inference_mode():
        cache = _prefill(model, ids_1T, on_token)
        torch.manual_seed(request.seed)
        output_1T = model.causal.generate(  # type: ignore[operator]  # a mixin's method
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            generation_config=GenerationConfig(
                max_new_tokens=min(request.max_new_tokens, free_tokens),
                eos_token_id=list(model.ends),
                pad_token_id=model.ends[0],
                **sampling,
            ),
            stopping_criteria=StoppingCriteriaList([stop_check]),
            **({} if cache is None else {"past_key_values": cache}),
        )
    ids = output_1T[0, len(prompt.ids) :].tolist()
    has_end_token = bool(ids) and ids[-1] in model.ends
    text = _text_of(model.tokenizer, prompt, ids[:-1] if has_end_token else ids)
    stop_at = first_stop(text, request.stop)
    if stop_at is not None:
        text = text[:stop_at]
    return Completion(text, len(ids), "stop" if has_end_token or stop_at is not None else "length")


def _text_of(tokenizer: BaseTokenizer, prompt: EncodedPrompt, ids: list[int]) -> str:
    """Return generated tokens as text. A chat's answer is a text of its own; in the other formats it continues the prompt."""
    return tokenizer.text(ids) if prompt.format == "chat_template" else tokenizer.continuation(prompt.ids, ids)


def _prefill(model: ResidentModel, ids_1T: torch.Tensor, on_token: OnToken) -> DynamicCache | None:
    """Read a long prompt in chunks, all but the last, so that a cancelled request does not run to its end."""
    if ids_1T.shape[1] <= _PREFILL_CHUNK:
        return None
    cache = DynamicCache(config=model.causal.config)
    for start in range(0, ids_1T.shape[1] - _PREFILL_CHUNK, _PREFILL_CHUNK):
        on_token(0, str)
        model.causal(
            input_ids=ids_1T[:, start : start + _PREFILL_CHUNK], past_key_values=cache, use_cache=True, logits_to_keep=1
        )
    return cache


class _StopCheck(StoppingCriteria):
    """Counts each new token, and ends the generation at a stop text."""

    def __init__(
        self,
        tokenizer: BaseTokenizer,
        prompt: EncodedPrompt,
        stop: Sequence[str],
        thread_tuner: DecodeThreadTuner,
        on_token: OnToken,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._stop = stop
        # A token has at least one byte, so as many tokens as a stop text has bytes contain it; 4 more in case it ends
        # in the middle of a token.
        self._tail_tokens = max((len(text.encode()) for text in stop), default=0) + 4
        self._thread_tuner = thread_tuner
        self._on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002 -- transformers' signature
        new_ids_T = input_ids[0, len(self._prompt.ids) :]
        # kill-point: inference worker, generate: tokens are being generated (pass 3)
        self._on_token(len(new_ids_T), lambda: _text_of(self._tokenizer, self._prompt, new_ids_T.tolist()))
        self._thread_tuner.token()
        stopped = False
        if self._stop:
            tail = self._tokenizer.text(new_ids_T[-self._tail_tokens :].tolist())
            stopped = first_stop(tail, self._stop) is not None
        return torch.full((input_ids.shape[0],), stopped, dtype=torch.bool, device=input_ids.device)
