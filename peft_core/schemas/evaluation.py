"""The evaluation of an adapter, with confidence intervals. It is part of results and of manifests.

Clients rely on the field names: add fields, but do not rename them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from peft_core.schemas.frozen import FrozenModel


class Verdict(StrEnum):
    """The effect of an adapter on held-out text, decided in `evaluation.summary`."""

    HELPS = "helps"
    NO_DIFFERENCE = "no_difference"  # no significant one
    HARMS = "harms"


class Comparison(FrozenModel):
    """One metric of the base model and of the adapter, measured on the same text."""

    base: float
    adapter: float
    change: float = Field(description="Adapter minus base.")
    low: float | None = Field(
        None, description="95 % confidence interval of the change; null if there is too little data."
    )
    high: float | None = None


class Continuation(FrozenModel):
    """Completions of a held-out text by base model and adapter, with greedy decoding."""

    file: str
    line: int = Field(description="Line number of the first expected line, 1-based; 0 if unknown.")
    prompt: str = Field(description="The last lines of the prompt.")
    expected: str
    base: str
    adapter: str
    base_similarity: float = Field(description="Edit similarity to the expected text; 1 is identical.")
    adapter_similarity: float


class Evaluation(FrozenModel):
    """Base model and adapter compared on text that the adapter was not trained on."""

    verdict: Verdict
    reason: str = Field(description="Reason for the verdict, in one sentence.")
    loss: Comparison = Field(
        description="Cross-entropy per token of held-out text, in nats; lower is better. It decides the verdict."
    )
    base_perplexity: float
    adapter_perplexity: float
    next_line: Comparison | None = Field(
        None, description="Fraction of held-out lines predicted exactly from all lines before them; higher is better."
    )
    edit_similarity: Comparison | None = Field(
        None,
        description="Edit similarity of completions of up to three lines to the real ones, 0 to 1; higher is better.",
    )
    general_loss: Comparison | None = Field(
        None, description="Loss on general Python code from no project, in nats per token: shows forgetting."
    )
    forgets: bool = Field(False, description="The loss on general code rises significantly.")
    chosen_on_part: bool = Field(False, description="Early stopping selected the weights on some of these examples.")
    files: int
    examples: int
    tokens: int
    lines: int = 0
    prompts: int = 0
    general_tokens: int = 0
    resampled: Literal["files", "examples"] = Field(
        description="What the bootstrap resamples for the intervals; for general code, functions."
    )
    seen_in_training: float | None = Field(
        None,
        description="Fraction of these examples that the adapter was trained on: 0, as they are excluded; null if its training "
        "data is not recorded.",
    )
    seconds: float = Field(0.0, description="Time for completions and general code.")
    gains: tuple[Continuation, ...] = Field((), description="Completions that the adapter improves most.")
    losses: tuple[Continuation, ...] = Field((), description="Completions that it worsens most.")

    @property
    def caveats(self) -> tuple[str, ...]:
        """Sentences that qualify the verdict."""
        sentences = []
        if self.forgets and self.general_loss is not None:
            sentences.append(
                f"It forgets: the loss on general code rises by {self.general_loss.change:.3f} nats per token."
            )
        if self.chosen_on_part:
            sentences.append(
                "Early stopping chose the best state on a part of these examples, which flatters it a little."
            )
        return tuple(sentences)

    @property
    def without_texts(self) -> Evaluation:
        """The evaluation without texts from the project, for publication with the adapter."""
        return self.model_copy(update={"gains": (), "losses": ()})
