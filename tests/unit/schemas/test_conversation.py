import pytest

from peft_core.schemas.conversation import Conversation

QUESTION = {"role": "user", "content": "What is 2 + 3?"}
ANSWER = {"role": "assistant", "content": "5"}


def test_every_answer_is_learned_and_nothing_else() -> None:
    conversation = Conversation.learning_every_answer([QUESTION, ANSWER, QUESTION, ANSWER])
    assert conversation.learned == (False, True, False, True)


def test_there_is_one_entry_of_learned_per_message() -> None:
    with pytest.raises(ValueError, match="1 entries for 2 messages"):
        Conversation((QUESTION, ANSWER), (True,))


def test_only_the_assistant_is_learned_from() -> None:
    with pytest.raises(ValueError, match="role 'user'"):
        Conversation((QUESTION, ANSWER), (True, True))
