"""A base model in memory with adapters on it, in either engine: what the handlers use of it, and which engine is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from peft_core.adapters.files import AdapterFiles
from peft_core.base_models.families import LLAMA_CPP
from peft_core.base_models.tokenizer import BaseTokenizer
from peft_core.errors import InferenceError, InvalidArgument
from peft_core.llamacpp import runtime
from peft_core.llamacpp.worker.base_file import can_write_base
from peft_core.modeling.device import DevicePlan
from peft_core.schemas.base_model import Base
from peft_core.schemas.generation import Engine, EngineChoice, GenerationRequest
from peft_core.schemas.results import LoadCheck
from peft_core.system.packages import install_extra

AUTOMATIC_UP_TO = 3_000_000_000  # parameters: a larger base model is written in F16 only when llamacpp is asked for

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


OnToken = Callable[[int, Callable[[], str]], None]
"""Takes the number of generated tokens, 0 while a long prompt is read, and a function that returns the text so far.

What it raises ends the generation.
"""


class LoadedModel(Protocol):
    """A base model and its adapters. Adapters never change the base model."""

    @property
    def base(self) -> Base: ...

    @property
    def tokenizer(self) -> BaseTokenizer: ...

    @property
    def engine(self) -> Engine: ...

    @property
    def engine_reason(self) -> str:
        """Why this engine was chosen."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files or directories of the base model that it reads, the model's own or converted ones."""
        ...

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together."""
        ...

    def add(self, files: AdapterFiles) -> tuple[str, LoadCheck]:
        """Add a verified adapter and select it. Returns its name in this model, and what it changes.

        Raises:
            InferenceError: It has no effect, cannot be applied, or gives NaN or Inf. It is removed again.
        """
        ...

    def select(self, name: str | None) -> None:
        """Use this adapter from now on; None: the base model without an adapter."""
        ...

    def remove(self, name: str) -> None:
        """Remove an adapter; afterwards none is selected."""
        ...

    def complete(self, prompt: EncodedPrompt, request: GenerationRequest, on_token: OnToken) -> Completion:
        """Generate with the selected adapter."""
        ...


def choose_engine(choice: EngineChoice, base: Base, plan: DevicePlan) -> tuple[Engine, str]:
    """Return the engine for a base model, and why it was chosen.

    Raises:
        InferenceError: llama.cpp was asked for, and cannot run this base model.
    """
    if choice == "torch":
        return "torch", "it was asked for"
    problem = _why_not_llamacpp(base)
    if choice == "llamacpp":
        if problem is not None:
            raise InferenceError(
                f"engine = 'llamacpp' cannot be used: {problem}.",
                code="engine_unavailable",
                suggestions=["Use engine='torch', or omit engine"],
            )
        return "llamacpp", "it was asked for"
    if plan.device != "cpu":
        return "torch", f"torch computes on {plan.device}"
    if base.shape.parameters > AUTOMATIC_UP_TO:
        gigabytes = base.shape.parameters * 2e-9
        return "torch", f"llama.cpp would need a copy of {gigabytes:.0f} GB in F16; engine='llamacpp' makes it"
    if problem is not None:
        return "torch", problem
    return "llamacpp", "it generates several times faster than torch on a CPU"


def _why_not_llamacpp(base: Base) -> str | None:
    if not runtime.is_installed():
        return f"llama.cpp is not installed ({install_extra('llamacpp')})"
    if base.model_type not in LLAMA_CPP or not can_write_base(base, for_text=True):
        return f"this base model ({base.model_type}, {base.format}) or its tokenizer is not converted for llama.cpp"
    return None


def encode(request: GenerationRequest, model: LoadedModel) -> EncodedPrompt:
    """Encode the request in the format that the base model expects. Code and messages are literal, as in training.

    Raises:
        InvalidArgument: it does not fit the context, or the base model does not support its form.
        DataError: the base model has no chat template, or the template rejects these messages.
    """
    tokenizer = model.tokenizer
    field: str
    if request.messages is not None:
        rendered = tokenizer.render_prompt([message.model_dump() for message in request.messages])
        field, prompt = "messages", EncodedPrompt(tokenizer.ids(*rendered), "chat_template")
    elif request.prompt is not None:
        field, prompt = "prompt", EncodedPrompt(tokenizer.ids(tokenizer.written_prompt(request.prompt)), "text")
    else:
        tokens = tokenizer.fill_in_the_middle
        if tokens is None:
            raise InvalidArgument(
                "prefix",
                request.prefix,
                f"{model.base.name} has no fill-in-the-middle tokens; it takes prompt or messages",
                suggestions=["Pass the code before the cursor as prompt", "Or use a base model such as Qwen2.5-Coder"],
            )
        parts = tokens.prompt(request.prefix or "", request.suffix or "")
        field, prompt = "prefix", EncodedPrompt(tokenizer.ids(*parts), "fill_in_the_middle")
    if len(prompt.ids) >= model.context_length:
        raise _too_long(field, len(prompt.ids), model)
    return prompt


def _too_long(field: str, tokens: int, model: LoadedModel) -> InvalidArgument:
    whole = model.base.shape.context_length
    allowed = f"the context of {model.base.name} has {whole} tokens"
    suggestions = ["Shorten it: for code, the lines nearest to the cursor matter most"]
    if tokens < whole:  # the engine is the limit
        allowed = f"llama.cpp is started with {model.context_length} of the {whole} tokens of {model.base.name}'s context here"
        suggestions.append(
            "Or use torch, which takes all of them: load_adapter(engine='torch'), or the setting CODEBASE_GARDENER_ENGINE=torch"
        )
    return InvalidArgument(
        field,
        f"{tokens} tokens",
        f"{allowed}, of which at least one must be free for the result",
        suggestions=suggestions,
    )


def first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Return where the first stop text begins."""
    return min((at for stop_text in stop if (at := text.find(stop_text)) >= 0), default=None)
