"""From a request to text: the prompt in the base's own form, then token by token.

T tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList

from peft_core.errors import InvalidArgument
from peft_core.modeling.adapter_model import ResidentModel
from peft_core.modeling.threads import DecodeThreadTuner
from peft_core.modeling.tokenizer import BaseTokenizer
from peft_core.schemas.generation import GenerationRequest

_GREEDY_BELOW = 0.01  # of temperature: such a division leaves one token anyway, or overflows
_PIECE = 512  # tokens of a prompt that are read at once

PromptFormat = Literal["text", "chat_template", "fill_in_the_middle"]


@dataclass(frozen=True)
class EncodedPrompt:
    ids: list[int]
    format: PromptFormat


@dataclass(frozen=True)
class Completion:
    text: str
    tokens: int
    finish_reason: Literal["stop", "length"]


def encode(request: GenerationRequest, tokenizer: BaseTokenizer, base_name: str, context_length: int) -> EncodedPrompt:
    """Write the request as the base expects it.

    Raises:
        InvalidArgument: longer than the base's context, or a form that this base does not know.
        DataError: no chat template, or it refuses these messages.
    """
    field: str
    if request.messages is not None:
        rendered = tokenizer.render_prompt([message.model_dump() for message in request.messages])
        field, prompt = "messages", EncodedPrompt(tokenizer.ids(rendered), "chat_template")
    elif request.prompt is not None:
        field, prompt = "prompt", EncodedPrompt(tokenizer.ids(request.prompt), "text")
    else:
        tokens = tokenizer.fill_in_the_middle
        if tokens is None:
            raise InvalidArgument(
                "prefix",
                request.prefix,
                f"{base_name} has no tokens for filling in the middle; it takes prompt or messages",
                suggestions=["Give the code before the cursor as prompt", "Or use a base such as Qwen2.5-Coder"],
            )
        pieces = tokens.prompt(request.prefix or "", request.suffix or "")
        field, prompt = "prefix", EncodedPrompt(tokenizer.ids(*pieces), "fill_in_the_middle")
    if len(prompt.ids) >= context_length:
        raise InvalidArgument(
            field,
            f"{len(prompt.ids)} tokens",
            f"{base_name} sees {context_length} tokens, of which one at least must be left for the answer",
            suggestions=["Shorten it: for code, what is nearest to the cursor matters most"],
        )
    return prompt


def complete(
    model: ResidentModel,
    prompt: EncodedPrompt,
    request: GenerationRequest,
    pace: DecodeThreadTuner,
    on_token: Callable[[int], None],
) -> Completion:
    """Write with whatever adapter is selected. `on_token(n)` after each token, and with 0 while
    a long prompt is read; what it raises ends the writing.
    """
    room = model.base.shape.context_length - len(prompt.ids)
    watch = _Watch(model.tokenizer, len(prompt.ids), request.stop, pace, on_token)
    sampling: dict[str, Any] = {"do_sample": False}
    if request.temperature >= _GREEDY_BELOW:
        sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
    ids_1T = torch.tensor([prompt.ids], device=model.causal.device)
    pace.prompt()
    with torch.inference_mode():
        read = _read(model, ids_1T, on_token)
        torch.manual_seed(request.seed)
        written_1T = model.causal.generate(  # type: ignore[operator]  # a mixin's method
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            generation_config=GenerationConfig(
                max_new_tokens=min(request.max_new_tokens, room),
                eos_token_id=list(model.ends),
                pad_token_id=model.ends[0],
                **sampling,
            ),
            stopping_criteria=StoppingCriteriaList([watch]),
            **({} if read is None else {"past_key_values": read}),
        )
    ids = written_1T[0, len(prompt.ids) :].tolist()
    ended = bool(ids) and ids[-1] in model.ends
    said = ids[:-1] if ended else ids
    is_turn = prompt.format == "chat_template"  # which begins anew; anything else goes on
    text = model.tokenizer.text(said) if is_turn else model.tokenizer.continuation(prompt.ids, said)
    cut = earliest(text, request.stop)
    stopped = ended or cut is not None
    return Completion(text if cut is None else text[:cut], len(ids), "stop" if stopped else "length")


def _read(model: ResidentModel, ids_1T: torch.Tensor, on_token: Callable[[int], None]) -> DynamicCache | None:
    """Read a long prompt piece by piece, all but the last one: whoever called it off need not wait for the end."""
    if ids_1T.shape[1] <= _PIECE:
        return None
    cache = DynamicCache(config=model.causal.config)
    for start in range(0, ids_1T.shape[1] - _PIECE, _PIECE):
        on_token(0)
        model.causal(  # a forward pass
            input_ids=ids_1T[:, start : start + _PIECE],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    return cache


def earliest(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of these begins in the text."""
    return min((at for wanted in stop if (at := text.find(wanted)) >= 0), default=None)


class _Watch(StoppingCriteria):
    """Looks at every new token: counts it, and ends the writing at a stop text."""

    def __init__(
        self,
        tokenizer: BaseTokenizer,
        prompt_tokens: int,
        stop: Sequence[str],
        pace: DecodeThreadTuner,
        on_token: Callable[[int], None],
    ) -> None:
        self._tokenizer = tokenizer
        self._start = prompt_tokens
        self._stop = stop
        # A token has one byte at least, so a stop text lies within as many of the last ones; some more for its middle.
        self._tail = max((len(text.encode()) for text in stop), default=0) + 4
        self._pace = pace
        self._on_token = on_token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:  # noqa: ARG002 -- transformers' signature
        written = input_ids[0, self._start :]
        self._on_token(len(written))
        self._pace.token()
        found = False
        if self._stop:
            found = earliest(self._tokenizer.text(written[-self._tail :].tolist()), self._stop) is not None
        return torch.full((input_ids.shape[0],), found, dtype=torch.bool, device=input_ids.device)
