"""Text generation: the request and the result. Descriptions are written for the assistant that fills in the fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from peft_core.schemas.frozen import ONE_TEXT_IS_A_LIST, FrozenModel
from peft_core.schemas.retrieval import Retrieved

MAX_SEED = 2**32 - 1
MAX_TEXT = 2_000_000  # characters, more than any context holds


class ChatMessage(FrozenModel):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(max_length=MAX_TEXT)]


class GenerationRequest(FrozenModel):
    """What to generate, and how: one of `prompt`, `messages`, or `prefix` with `suffix`.

    The fields are the arguments of the tool `generate`.
    """

    prompt: Annotated[
        str | None,
        Field(
            max_length=MAX_TEXT,
            description="Text to continue, such as the beginning of a function. Special tokens in it count only if it begins "
            "with one.",
        ),
    ] = None
    file_path: Annotated[
        str | None,
        Field(
            max_length=1000,
            description="The file that the code is from, such as src/app.py: its path is written first, as in training.",
        ),
    ] = None
    messages: Annotated[
        list[ChatMessage] | None,
        Field(description="Or a conversation that ends with the question; uses the base model's chat template."),
    ] = None
    prefix: Annotated[
        str | None, Field(max_length=MAX_TEXT, description="Or the code before the cursor; suffix: after it.")
    ] = None
    suffix: Annotated[
        str | None,
        Field(
            max_length=MAX_TEXT,
            description="Code after the cursor; for bases with fill-in-the-middle tokens (Qwen2.5-Coder).",
        ),
    ] = None
    max_new_tokens: Annotated[
        int, Field(ge=1, le=4096, description="Limit on generated tokens. A CPU generates 10-40 per second.")
    ] = 256
    temperature: Annotated[
        float, Field(ge=0, le=2, description="0 (below 0.01): always the most likely token. Higher: more variety.")
    ] = 0.0
    top_p: Annotated[
        float, Field(gt=0, le=1, description="Sample from the most likely tokens that make up this share.")
    ] = 1.0
    seed: Annotated[int, Field(ge=0, le=MAX_SEED, description="Same seed, machine and request: same result.")] = 0
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=200)]],
        ONE_TEXT_IS_A_LIST,
        Field(max_length=8, description="Stop before any of these texts; they are not part of the result."),
    ] = Field([])
    compare_with_base: Annotated[
        bool, Field(description="Generate twice, with and without the adapter; see base_text.")
    ] = False
    retrieve: Annotated[
        bool,
        Field(
            description="Put similar code of the training before the prompt. With use_base, adapter_path names whose code."
        ),
    ] = False

    @model_validator(mode="before")
    @classmethod
    def _omit_empty_forms(cls, values: Any) -> Any:
        """Remove empty forms of the prompt beside one that has text: some clients send every field."""
        if not isinstance(values, Mapping):
            return values
        forms = (("prompt",), ("messages",), ("prefix", "suffix"))
        empty = [form for form in forms if not any(values.get(name) for name in form)]
        unused = {name for form in empty for name in form} if len(empty) < len(forms) else set()
        return {name: value for name, value in values.items() if name not in unused}

    @model_validator(mode="after")
    def _exactly_one_prompt(self) -> GenerationRequest:
        forms = {"prompt": self.prompt is not None, "messages": self.messages is not None}
        forms["prefix and suffix"] = self.prefix is not None or self.suffix is not None
        given = [name for name, is_given in forms.items() if is_given]
        if len(given) != 1:
            problem = f"{' and '.join(given)} exclude each other" if given else "there is no prompt"
            raise ValueError(f"{problem}: give prompt, or messages, or prefix with suffix")
        if forms["prefix and suffix"] and (self.prefix is None or self.suffix is None):
            raise ValueError("prefix and suffix belong together: give both (one of them may be empty)")
        if self.file_path is not None and self.messages is not None:
            raise ValueError("file_path belongs to code: it cannot be used with messages")
        if not (self.prompt or self.messages or self.prefix or self.suffix or self.file_path):
            raise ValueError(f"{given[0]} is empty: give the text to continue, or a question")
        return self


Engine = Literal["torch", "llamacpp"]
EngineChoice = Literal["auto", "torch", "llamacpp"]


class GenerationSettings(FrozenModel):
    """The settings that were used, including defaults."""

    prompt_format: Literal["text", "chat_template", "fill_in_the_middle"]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: list[str]


class Generation(FrozenModel):
    """Generated text, with how it was generated."""

    text: str
    base_text: str | None = Field(
        None, description="What the base model generates without the adapter, if compare_with_base was set."
    )
    base_model: str
    engine: Engine | None = None
    adapter_path: str | None = Field(description="The adapter that was used; null for the base model alone.")
    applied: GenerationSettings
    prompt_tokens: int
    completion_tokens: int
    finish_reason: Literal["stop", "length"]
    retrieved: Retrieved | None = Field(None, description="Null unless retrieve was set.")
    elapsed_s: float = Field(description="Duration of the call, including the time in the queue.")
    tokens_per_second: float = Field(description="Speed for text, including prompt processing; without base_text.")
