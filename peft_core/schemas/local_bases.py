"""What `list_base_models` answers: the base models on this machine."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import NextStep

BaseSource = Literal["bundled", "default", "hugging_face_cache", "ollama", "lm_studio", "llama_cpp"]


class LocalBase(FrozenModel):
    base_model: str = Field(description="What to give as base_model.")
    source: BaseSource
    trainable: bool | None = Field(description="Judged by its headers; null if it was not examined.")
    reason: str = Field("", description="Why it cannot be trained, or what to know before.")
    size_bytes: int | None = None
    quantisation: str = Field("", description="Number format of most weights, such as F16 or Q4_K.")
    parameters: int | None = None
    family: str = ""
    context_length: int | None = None
    fill_in_the_middle: bool | None = None
    chat_template: bool | None = None
    memory_bytes: int | None = Field(None, description="Estimated for a training with default settings.")
    seconds_per_1000_examples: float | None = Field(None, description="Estimated for one epoch; null: unknown.")


class LocalBases(FrozenModel):
    base_models: list[LocalBase] = Field(description="Trainable ones first, small ones first.")
    omitted: int = Field(0, description="Further models that are not listed.")
    device: str
    basis: str = Field("", description="Where the estimates of time come from.")
    next: str = ""
    next_step: NextStep | None = None
