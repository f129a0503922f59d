"""Code that was put before a prompt: where it is looked for, and what was used."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from peft_core.schemas.frozen import FrozenModel


class UnitSource(FrozenModel):
    """Where the code units of an adapter are, and what is to be said of them."""

    adapter_path: Path
    examples: tuple[Path, ...]  # train.jsonl of its job, then those of the adapters that it continues
    note: str = ""


class RetrievedUnit(FrozenModel):
    path: str
    start_line: int = Field(description="In the file as it was when the adapter was trained.")
    end_line: int
    tokens: int


class Retrieved(FrozenModel):
    """Code that the adapter was trained on and that was put before the prompt, as comments."""

    adapter_path: str = Field(description="The adapter whose training code was searched.")
    units: tuple[RetrievedUnit, ...] = Field(description="The best match first; it is nearest to the prompt.")
    tokens: int = Field(description="Of all units together; they are part of prompt_tokens.")
    searched_units: int
    note: str = Field("", description="What has changed in the code since, and matches that were left out.")
