"""What `recommend_base` answers: which base model to train on this machine."""

from __future__ import annotations

from pydantic import Field

from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.local_bases import BaseSource
from peft_core.schemas.results import NextStep


class RecommendedBase(FrozenModel):
    """A base model on this machine. Time and memory are those of a training with default settings."""

    base_model: str = Field(description="What to give as base_model.")
    name: str = ""
    source: BaseSource
    reason: str = Field(description="What speaks for it, and against it.")
    code_model: bool = Field(description="Judged by its name.")
    fill_in_the_middle: bool
    chat_template: bool
    parameters: int
    quantisation: str = ""
    seconds: float | None = Field(description="Estimated; null: unknown.")
    memory_bytes: int
    steps: int
    basis: str = Field("", description="Where the estimate of time comes from.")
    same_model: list[str] = Field([], description="The same model in other formats, or trained further from it.")


class UnusableBase(FrozenModel):
    """A base model on this machine that cannot be trained here."""

    base_model: str
    reason: str


class DownloadableBase(FrozenModel):
    """A base model that is not on this machine, and suits it. Nothing was downloaded."""

    base_model: str = Field(description="Its id on the Hugging Face Hub.")
    reason: str
    command: str = Field(description="What downloads it.")
    licence: str
    download_bytes: int
    parameters: int
    seconds: float | None
    memory_bytes: int
    basis: str = ""


class BaseRecommendation(FrozenModel):
    """At most three base models, the best first."""

    candidates: list[RecommendedBase]
    unusable: list[UnusableBase] = Field([], description="What cannot be trained here; models for code first.")
    omitted: int = Field(0, description="Further ones that cannot be trained.")
    not_examined: int = Field(0, description="Base models that were not looked at in time.")
    download: DownloadableBase | None = Field(None, description="Set if no model for code can be trained here.")
    note: str = Field("", description="Why no download is recommended where no model for code is here.")
    device: str
    estimated_for: str = Field(description="The data that time and steps are estimated for.")
    next: str = ""
    next_step: NextStep | None = None
