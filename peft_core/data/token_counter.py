"""What preparing data needs of a tokenizer, and a stand-in for where none is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from peft_core.schemas.dataset import FillInTheMiddle, Segment

# SmolLM2's tokenizer: 3.7 bytes a token over 60 files of Python's standard library, 4.1 over the `mcp` package, 3.2 over
# JavaScript, 2.8 over torch's C++ headers. Path headers, repeated context and end-of-text are not in those figures.
BYTES_PER_TOKEN = 3.3


class TokenCounter(Protocol):
    """Counts as the base model counts."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, special tokens not counted. Called with whole batches."""
        ...

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[Segment, ...]:
        """A conversation in the base's chat template, the answers as what is learned.

        Raises:
            DataError: the base has no chat template.
        """
        ...

    @property
    def fill_in_the_middle(self) -> FillInTheMiddle | None:
        """How the base is asked for the text between two others; None where its vocabulary has no tokens for that."""
        ...


class EstimatedTokenCounter:
    """Tokens from bytes: good enough to tell whether a source can be used at all."""

    fill_in_the_middle = FillInTheMiddle("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # as most write it

    def count(self, texts: Sequence[str]) -> list[int]:
        return [math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) for text in texts]

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[Segment, ...]:
        return tuple(Segment(text=message["content"], learn=message["role"] == "assistant") for message in messages)
