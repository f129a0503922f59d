"""What was measured of an adapter, with how sure it is: the part of the answers that travels in manifests too.

Field names are relied on by others: add, do not rename.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from peft_core.schemas.frozen import FrozenModel


class Verdict(StrEnum):
    """What an adapter does on text that it never saw, by the rule of `proof/verdict.py`."""

    HELPS = "helps"
    NO_DIFFERENCE = "no_difference"  # none that could be shown
    HARMS = "harms"


class Comparison(FrozenModel):
    """One figure of the base and of base with adapter, measured on the same text."""

    base: float
    adapter: float
    change: float = Field(description="Adapter minus base.")
    low: float | None = Field(None, description="95 % confidence interval of the change. Null: too little to tell.")
    high: float | None = None


class Continuation(FrozenModel):
    """What base and adapter wrote where a held-out text goes on; both wrote the likeliest tokens."""

    file: str
    line: int = Field(description="Of the first expected line, 1-based; 0: unknown.")
    prompt: str = Field(description="The last lines before.")
    expected: str
    base: str
    adapter: str
    base_similarity: float = Field(description="Edit similarity with what is expected: 1 is equal.")
    adapter_similarity: float


class Evaluation(FrozenModel):
    """Base against adapter on text that training did not see."""

    verdict: Verdict
    reason: str = Field(description="Why, in one sentence.")
    loss: Comparison = Field(description="Nats per token of held-out text; lower is better. It decides the verdict.")
    base_perplexity: float
    adapter_perplexity: float
    next_line: Comparison | None = Field(
        None,
        description="Share of held-out lines that are written exactly, given all lines before; higher is better.",
    )
    edit_similarity: Comparison | None = Field(
        None,
        description="Of up to three lines written from a prompt, with the real ones, 0 to 1; higher is better.",
    )
    general_loss: Comparison | None = Field(
        None,
        description="Nats per token of general Python code that belongs to no project: what the adapter forgets.",
    )
    forgets: bool = Field(False, description="The loss on general code has risen markedly.")
    chosen_on_part: bool = Field(
        False,
        description="Early stopping chose the state that is measured on a part of these very examples.",
    )
    files: int
    examples: int
    tokens: int
    lines: int = 0
    prompts: int = 0
    general_tokens: int = 0
    resampled: Literal["files", "examples"] = Field(
        description="What the intervals were drawn over (bootstrap); those of general code over its functions.",
    )
    seen_in_training: float | None = Field(
        None,
        description="Share of the measured examples that the adapter was trained on: 0, for those are left out. Null: it is "
        "not recorded what it was trained on.",
    )
    seconds: float = Field(0.0, description="That writing from prompts and the general code took.")
    gains: tuple[Continuation, ...] = Field((), description="Where the adapter wrote better by most.")
    losses: tuple[Continuation, ...] = Field((), description="Where it wrote worse by most.")

    @property
    def caveats(self) -> tuple[str, ...]:
        """What the verdict does not say, in sentences."""
        found = []
        if self.forgets and self.general_loss is not None:
            found.append(
                f"It forgets: the loss on general code rises by {self.general_loss.change:.3f} nats per token.",
            )
        if self.chosen_on_part:
            found.append("Early stopping chose the best state on a part of these examples, which flatters it a little.")
        return tuple(found)

    @property
    def in_figures(self) -> Evaluation:
        """Without the texts: what may travel with the adapter."""
        return self.model_copy(update={"gains": (), "losses": ()})
