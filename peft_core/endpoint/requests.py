"""Requests of OpenAI's and llama.cpp's interfaces as a `GenerationRequest`.

A setting that would change the text and is not supported is refused, unless it has the value that means nothing. Settings that
cannot change it (user, timeouts, caches, sampler lists) are accepted and have no effect.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from peft_core.schemas.generation import ChatMessage, GenerationRequest
from peft_core.schemas.validation import invalid_argument

DEFAULT_MAX_TOKENS = 256
Text = Annotated[str, Field(max_length=4_000_000)]


Zero = Annotated[float, Field(ge=0, le=0)]
One = Annotated[float, Field(ge=1, le=1)]
ZeroOrLess = Annotated[float, Field(le=0)]
NoEntries = Annotated[dict[str, Any], Field(max_length=0)]
NoItems = Annotated[list[Any], Field(max_length=0)]


class _TextFormat(BaseModel):
    type: Literal["text"]


class _StreamOptions(BaseModel):
    include_usage: bool | None = None


class _Request(BaseModel):
    """What all have in common. Unknown fields are ignored, as clients send many."""

    model_config = ConfigDict(extra="ignore")

    model: str | None = None
    stream: bool = False
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None

    # Each must have a value that changes nothing.
    n: Literal[1] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[False, 0] | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: NoEntries | None = None
    tools: NoItems | None = None
    response_format: _TextFormat | None = None
    grammar: Literal[""] | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return False

    def sampling(self, max_tokens: int | None, random_seed: int) -> dict[str, Any]:
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": random_seed if self.seed is None or self.seed < 0 else self.seed,  # llama.cpp: -1 is random
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
            "max_new_tokens": DEFAULT_MAX_TOKENS if max_tokens is None or max_tokens < 0 else max_tokens,
        }
        return {name: value for name, value in given.items() if value is not None}


class _OpenAIRequest(_Request):
    """What completions and chat have in common. `/infill` leaves the rest to its fixed samplers."""

    stream_options: _StreamOptions | None = None

    # Each must have a value that changes nothing. OpenAI's:
    functions: NoItems | None = None
    function_call: Literal["none", "auto"] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    # llama.cpp's:
    top_k: ZeroOrLess | None = None
    top_n_sigma: ZeroOrLess | None = None
    min_p: Zero | None = None
    typical_p: One | None = None
    dynatemp_range: Zero | None = None
    xtc_probability: Zero | None = None
    dry_multiplier: Zero | None = None
    mirostat: Zero | None = None
    repeat_penalty: One | None = None
    ignore_eos: Literal[False] | None = None
    json_schema: None = None
    chat_template_kwargs: NoEntries | None = None
    # vLLM's:
    repetition_penalty: One | None = None
    min_tokens: Zero | None = None
    stop_token_ids: NoItems | None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    structured_outputs: None = None
    chat_template: None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage is True


class CompletionRequest(_OpenAIRequest):
    """OpenAI's `/v1/completions`; with `suffix`, it fills in between."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]
    suffix: Text | None = None
    max_tokens: int | None = None

    def generation(self, random_seed: int) -> dict[str, Any]:
        prompt = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        form = {"prompt": prompt} if self.suffix is None else {"prefix": prompt, "suffix": self.suffix}
        return {**form, **self.sampling(self.max_tokens, random_seed)}


class _Part(BaseModel):
    type: Literal["text", "input_text"]
    text: Text


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[_Part]

    def plain(self) -> ChatMessage:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return ChatMessage(role="system" if self.role == "developer" else self.role, content=text)


class ChatRequest(_OpenAIRequest):
    """OpenAI's `/v1/chat/completions`."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None

    def generation(self, random_seed: int) -> dict[str, Any]:
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return {
            "messages": [message.plain().model_dump() for message in self.messages],
            **self.sampling(limit, random_seed),
        }


class InfillRequest(_Request):
    """llama.cpp's `/infill`, as llama.vim and llama.vscode send it.

    `prompt` is the text between the prefix and the cursor. Of `lora` nothing is taken: the model's name chooses the adapter.
    Other files (`input_extra`) are ignored, because adapters are not trained with them.
    """

    input_prefix: Text = ""
    input_suffix: Text = ""
    prompt: Text = ""
    n_predict: int | None = None

    @property
    def only_warms_up(self) -> bool:
        """Whether it asks for no text: the editor only wants the prompt to be read in advance."""
        return self.n_predict == 0

    def generation(self, random_seed: int) -> dict[str, Any]:
        # llama.cpp's editors send samplers for their own server; a completion is the likeliest text here.
        greedy = {**self.sampling(self.n_predict, random_seed), "temperature": 0.0, "top_p": 1.0}
        return {"prefix": self.input_prefix + self.prompt, "suffix": self.input_suffix, **greedy}


AnyRequest = CompletionRequest | ChatRequest | InfillRequest


def parse(kind: type[AnyRequest], body: bytes) -> AnyRequest:
    """Read a request.

    Raises:
        InvalidArgument: It is not JSON, or a field has a value that is not supported.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise invalid_argument(error, kind.model_json_schema()) from error


def generation_of(request: AnyRequest, random_seed: int) -> GenerationRequest:
    """Return what to generate. `random_seed`: for a request that gives none, so that asking again gives another text.

    Raises:
        InvalidArgument: A value is outside its range.
    """
    try:
        return GenerationRequest.model_validate(request.generation(random_seed))
    except ValidationError as error:
        raise invalid_argument(error, GenerationRequest.model_json_schema()) from error
