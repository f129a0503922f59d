"""What inspecting training data answers. Apart from what makes it, which is slow to import."""

from __future__ import annotations

from pydantic import Field

from peft_core.results import Estimate
from peft_core.spec import Frozen, TrainingConfig


class DataSample(Frozen):
    """One example, as it would be trained on, but for the marks around gaps and turns: those will be the base's own."""

    path: str
    start_line: int = Field(description="1-based; 0 where it is not known.")
    end_line: int
    kind: str
    language: str
    tokens: int
    given: str = Field(description="Context that carries no loss: the path, the heads around the code, a prompt.")
    learned: str


class TrainingDataReport(Frozen):
    """What a training would be given and would do. Tokens are estimated; a training counts them with the base's tokenizer."""

    training_data: str
    base_model: str
    device: str
    train_examples: int
    held_out_examples: int
    train_tokens: int
    held_out_tokens: int
    files: int = Field(description="That examples come from, held-out ones included.")
    unread_files: int = Field(
        0, description="Not looked at, because there are enough others; the figures are without them."
    )
    languages: dict[str, int] = Field(description="Files by language.")
    left_out: dict[str, int] = Field(description="Files and pieces of files by reason.")
    secrets_removed: int
    held_out_files: list[str] = Field(description="Kept out of training, to measure base and adapter on.")
    largest_files: dict[str, int] = Field(description="Tokens to train on, of the files that have the most.")
    samples: list[DataSample]
    config: TrainingConfig = Field(description="With what was left open filled in.")
    estimate: Estimate
    next: str = ""
