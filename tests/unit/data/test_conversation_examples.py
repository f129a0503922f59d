"""How conversations become examples of limited length."""

from __future__ import annotations

from collections import Counter

import pytest

from peft_core.data.examples import FileResult, examples_from_record, keep_secrets
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.records import parse
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.errors import DataError
from peft_core.schemas.conversation import Conversation
from peft_core.schemas.dataset import Segment


class Characters(EstimatedTokenCounter):
    """One token per character, and a template that refuses the word "odd"."""

    def count(self, texts):
        return [len(text) for text in texts]

    def render_chat(self, conversation: Conversation) -> tuple[tuple[Segment, ...], ...]:
        if any("odd" in message["content"] for message in conversation.messages):
            raise DataError("The base model's chat template says: odd", code="chat_template")
        return super().render_chat(conversation)


def result_of(*contents: str, max_length: int, skip: bool = False) -> FileResult:
    messages = [
        {"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(contents)
    ]
    record = parse({"messages": messages}, "line 7")
    return examples_from_record(
        record, token_counter=Characters(), max_length=max_length, redact=keep_secrets, skip=skip
    )


@pytest.mark.parametrize(
    ("max_length", "kept", "left_out"),
    [
        (22, ["aaaa", "bbbb", "cccc", "dddd"], {}),
        (18, ["aaaa", "bbbb", "cccc", "dddd"], {}),
        (17, ["aaaa", "bbbb"], {ExclusionReason.TURNS_TOO_LONG: 1}),
        (10, ["aaaa", "bbbb"], {ExclusionReason.TURNS_TOO_LONG: 1}),
        (9, [], {ExclusionReason.TOO_LONG: 1}),
    ],
)
def test_a_long_conversation_keeps_the_turns_that_fit_and_the_others_are_counted(
    max_length: int, kept: list[str], left_out: dict[str, int]
) -> None:
    result = result_of("aaaa", "bbbb", "cccc", "dddd", max_length=max_length)
    assert [segment.text for example in result.examples for segment in example.segments] == kept
    assert +result.left_out == Counter(left_out)


def test_a_conversation_that_the_template_refuses_is_named() -> None:
    with pytest.raises(DataError, match=r"Line 7 cannot be used: The base model's chat template says: odd"):
        result_of("odd", "bbbb", max_length=99)


def test_it_is_left_out_and_counted_on_request() -> None:
    result = result_of("odd", "bbbb", max_length=99, skip=True)
    assert result.examples == []
    assert result.left_out == {ExclusionReason.CHAT_TEMPLATE: 1}
