"""A conversation as a chat template takes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation in OpenAI's message format, and which of its messages are learned.

    Messages are whole: role, content (text), tool_calls (with their arguments as objects), tool_call_id, name,
    reasoning_content, and whatever else a chat template may read.

    Raises:
        ValueError: `learned` does not have one entry per message, or marks a message that is not the assistant's.
    """

    messages: tuple[Mapping[str, Any], ...]
    learned: tuple[bool, ...]  # one per message
    tools: tuple[Mapping[str, Any], ...] = ()  # the tool schemas that the template receives as `tools`

    def __post_init__(self) -> None:
        if len(self.learned) != len(self.messages):
            raise ValueError(f"learned has {len(self.learned)} entries for {len(self.messages)} messages")
        for message, learned in zip(self.messages, self.learned, strict=True):
            if learned and message.get("role") != "assistant":
                raise ValueError(f"a message with the role {message.get('role')!r} cannot be learned")

    @classmethod
    def learning_every_answer(
        cls, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()
    ) -> Self:
        """Return a conversation of which all assistant messages are learned."""
        learned = tuple(message.get("role") == "assistant" for message in messages)
        return cls(tuple(messages), learned, tuple(tools))
