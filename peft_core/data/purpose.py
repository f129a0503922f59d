"""What data is prepared for: to train on a part of it and measure on the rest, or to measure on all of it."""

from __future__ import annotations

from typing import NamedTuple


class Purpose(NamedTuple):
    """How much it takes, and how a request for it is worded."""

    field: str  # of the request, which messages name
    tool: str  # to call again
    examples: int  # fewer teach, or show, nothing
    files: int
    parts: str  # what they are needed for, in words

    @property
    def trains(self) -> bool:
        return self == TRAINING


TRAINING = Purpose("training_data", "train_adapter", 8, 2, ", one to train on and one to measure on")
MEASURING = Purpose("evaluation_data", "evaluate_adapter", 5, 1, " to measure on")
