"""What preparing data needs of a tokenizer, and an estimate for processes that load none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from peft_core.schemas.conversation import Conversation
from peft_core.schemas.dataset import FillInTheMiddle, Segment

# Measured with SmolLM2's tokenizer: 3.7 bytes per token in 60 files of Python's standard library, 4.1 in the `mcp` package, 3.2
# in JavaScript, 2.8 in torch's C++ headers, without path headers, repeated context and end-of-text.
BYTES_PER_TOKEN = 3.3


class TokenCounter(Protocol):
    """Counts tokens and renders prompts as the base model does."""

    def count(self, texts: Sequence[str]) -> list[int]:
        """Return the number of tokens of each text, without special tokens. Texts come in large batches."""
        ...

    def render_chat(self, conversation: Conversation) -> tuple[tuple[Segment, ...], ...]:
        """Render a conversation in the base model's chat template; only the answers are learned.

        Returns the segments of each example: several, where one rendering cannot hold every learned answer.

        Raises:
            DataError: 'no_chat_template'; 'chat_template', if it does not write the conversation.
        """
        ...

    @property
    def has_chat_template(self) -> bool:
        """Whether conversations can be rendered."""
        ...

    @property
    def fill_in_the_middle(self) -> FillInTheMiddle | None:
        """The base model's fill-in-the-middle tokens; None if its vocabulary has none."""
        ...


class EstimatedTokenCounter:
    """Estimates tokens from bytes, which is exact enough to decide whether a source is usable."""

    has_chat_template = True
    fill_in_the_middle = FillInTheMiddle("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # of most families

    def count(self, texts: Sequence[str]) -> list[int]:
        return [math.ceil(len(text.encode("utf-8", "replace")) / BYTES_PER_TOKEN) for text in texts]

    def render_chat(self, conversation: Conversation) -> tuple[tuple[Segment, ...], ...]:
        turns = zip(conversation.messages, conversation.learned, strict=True)
        return (tuple(Segment(text=message["content"], learn=learned) for message, learned in turns),)
