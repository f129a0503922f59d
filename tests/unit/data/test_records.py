"""Records of every format: what each key becomes, and that no key is lost in silence."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.data.examples import examples_from_record
from peft_core.data.records import Notes, Record, RecordFormat, numbered, parse
from peft_core.data.secrets import redact_secrets
from peft_core.data.summarise import summarise_source
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.errors import DataError

USER = {"role": "user", "content": "What is 2 + 2?"}
ANSWER = {"role": "assistant", "content": "It is 4."}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)


def messages(record: Record) -> list[dict[str, Any]]:
    assert record.conversation is not None
    return [dict(message) for message in record.conversation.messages]


def learned(record: Record) -> list[Any]:
    assert record.conversation is not None
    pairs = zip(record.conversation.messages, record.conversation.learned, strict=True)
    return [message["content"] for message, learn in pairs if learn]


def refusal(value: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        parse(value, "line 7")
    assert str(caught.value).startswith("Line 7 cannot be used: ")
    assert len(str(caught.value)) < 500
    return caught.value


# -- the input of an answer is never lost ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "asked"),
    [
        ({"instruction": "Add.", "input": "2 2", "output": "4"}, ["Add.\n\n2 2"]),
        ({"instruction": "Add 2 and 2.", "input": "", "output": "4"}, ["Add 2 and 2."]),
        ({"instruction": "Add 2 and 2.", "output": "4"}, ["Add 2 and 2."]),
        ({"instruction": "", "input": "Add 2 and 2.", "output": "4"}, ["Add 2 and 2."]),
        ({"instruction": "Add.", "context": "2 2", "response": "4", "category": "qa"}, ["Add.\n\n2 2"]),
        ({"question": "2 + 2?", "answer": "4"}, ["2 + 2?"]),
        ({"query": "2 + 2?", "response": "4", "history": None}, ["2 + 2?"]),
        ({"prompt": "2 + 2?", "response": "4"}, ["2 + 2?"]),
        ({"system": "Be kind.", "prompt": "2 + 2?", "completion": "4"}, ["2 + 2?"]),
        ({"instruction": "And 3?", "output": "6", "history": [["Twice 2?", "4"]]}, ["Twice 2?", "And 3?"]),
        ({"instruction": "And 3?", "output": "6", "history": '[["Twice 2?", "4"]]'}, ["Twice 2?", "And 3?"]),
    ],
)
def test_an_instruction_becomes_a_conversation_that_asks_all_of_it(record: dict[str, Any], asked: list[str]):
    parsed = parse(record, "line 1")
    assert [message["content"] for message in messages(parsed) if message["role"] == "user"] == asked
    assert learned(parsed)[-1] == "4" if "And 3?" not in asked else "6"
    given_text = "".join(text for text, learn in parsed.texts if not learn)
    assert all(part in given_text for text in asked for part in text.split("\n\n"))


def test_without_a_chat_template_an_instruction_has_the_form_that_alpaca_published():
    plain = parse({"instruction": "Add 2 and 2.", "input": "", "output": "4"}, "line 1")
    assert plain.texts == ((PREAMBLE + "### Instruction:\nAdd 2 and 2.\n\n### Response:\n", False), ("4", True))
    with_input = parse({"instruction": "Add.", "input": "2 2", "output": "4"}, "line 1")
    assert with_input.texts[0][0].startswith("Below is an instruction that describes a task, paired with an input that")
    assert with_input.texts[0][0].endswith("### Instruction:\nAdd.\n\n### Input:\n2 2\n\n### Response:\n")
    long = parse({"instruction": "b", "output": "B", "system": "Be kind.", "history": [["a", "A"]]}, "line 1")
    assert "".join(text for text, _ in long.texts) == (
        "Be kind.\n\n### Instruction:\na\n\n### Response:\nA\n\n### Instruction:\nb\n\n### Response:\nB"
    )
    assert [text for text, learn in long.texts if learn] == ["A", "B"]


def test_examples_use_the_chat_template_if_there_is_one():
    record = parse({"instruction": "Add 2 and 2.", "output": "4"}, "line 1")
    counter = EstimatedTokenCounter()
    texts = {}
    for has_template in (True, False):
        counter.has_chat_template = has_template
        result = examples_from_record(record, token_counter=counter, max_length=512, redact=redact_secrets)
        texts[has_template] = result.examples[0].text
    assert "###" not in texts[True]
    assert texts[False] == PREAMBLE + "### Instruction:\nAdd 2 and 2.\n\n### Response:\n4"


def test_a_text_column_beside_an_instruction_must_be_the_same_again():
    record = {"instruction": "Add 2 and 2.", "input": "", "output": "4", "text": "Below is ...\n\nAdd 2 and 2.\n\n4"}
    notes = Notes()
    assert learned(parse(record, "line 1", notes=notes)) == ["4"]
    assert list(notes.unused) == ["text (the same as instruction and output)"]
    assert "'text' does not contain 'output'" in str(refusal({**record, "text": "something else"}))


# -- tools -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": None, "tool_calls": [
            {**CALL, "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
        ]},
    ],
)  # fmt: skip
def test_a_tool_call_reaches_the_conversation_whole(turn: dict[str, Any]):
    result = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "4"}
    record = parse({"messages": [USER, turn, result, ANSWER], "tools": [TOOL]}, "line 1")
    assert messages(record)[1:3] == [{"role": "assistant", "content": "", "tool_calls": [CALL]}, result]
    assert record.conversation is not None
    assert (record.conversation.learned, record.conversation.tools) == ((False, True, False, True), (TOOL,))


@pytest.mark.parametrize(
    "record",
    [
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
                {"role": "function", "name": "add", "content": "4"},
                ANSWER,
            ],
            "functions": [TOOL["function"]],
        },
        {
            "conversations": [
                {"from": "human", "value": "What is 2 + 2?"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "4"},
                {"from": "gpt", "value": "It is 4."},
            ],
            "tools": json.dumps([TOOL["function"]]),
        },
    ],
)
def test_legacy_and_sharegpt_calls_become_tool_calls(record: dict[str, Any]):
    parsed = parse(record, "line 1")
    assert [message["role"] for message in messages(parsed)] == ["user", "assistant", "tool", "assistant"]
    assert messages(parsed)[1]["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ]
    assert parsed.conversation is not None
    assert parsed.conversation.tools == (TOOL,)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ({"function": {"name": "add", "arguments": '{"a": '}}, "is text that is not valid JSON"),
        ({"function": {"name": "add", "arguments": "[1]"}}, "is a list; it must be an object"),
        ({"function": {"name": "add", "arguments": '{"a": 1, "a": 2}'}}, "'a' is given twice"),
        ({"function": {"arguments": {}}}, "'name of tool call 1 of message 2 of 'messages'"),
        ({"function": {"name": "add", "strict": True}}, "'messages[].tool_calls[].function.strict' is not used"),
        ({"type": "custom", "custom": {"name": "add"}}, "has the type 'custom'"),
        ("add(2, 2)", "is text; it must be an object"),
        (
            {"function": {"name": "add", "arguments": '{"a": ' + "[" * 900 + "]" * 900 + "}"}},
            "more than 64 levels deep",
        ),
        ({"function": {"name": "add", "arguments": '{"a": ' + "[" * 9_000}}, "nested too deeply"),
    ],
)
def test_a_malformed_tool_call_is_refused(call: Any, expected: str):
    error = str(refusal({"messages": [USER, {"role": "assistant", "tool_calls": [call]}]}))
    assert expected.replace("'name of", "name of") in error.replace('"', "'")


# -- what is learned ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        ({"weight": 0}, False), ({"weight": 1}, True), ({"weight": 0.0}, False), ({"weight": None}, True),
        ({"train": False}, False), ({"training": False}, False), ({"trainable": True}, True), ({"loss": False}, False),
    ],
)  # fmt: skip
def test_marks_say_which_answers_are_learned(mark: dict[str, Any], expected: bool):
    marked = {"role": "assistant", "content": "BAD", **mark}
    record = parse({"messages": [USER, marked, USER, {**ANSWER, "weight": 1}]}, "line 1")
    assert learned(record) == (["BAD"] if expected else []) + ["It is 4."]
    assert [message["content"] for message in messages(record)][1] == "BAD"


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([USER, {**ANSWER, "weight": 0.5}], "'weight' of message 2 of 'messages' is 0.5; it must be 0"),
        ([USER, {**ANSWER, "weight": -1}], "it must be 0"),
        ([USER, {**ANSWER, "weight": "1"}], "it must be 0"),
        ([USER, {**ANSWER, "train": "no"}], "it must be true or false"),
        ([USER, {**ANSWER, "train": True, "weight": 0}], "marked as learned and as context"),
        ([{**USER, "weight": 1}, ANSWER], "only answers of the assistant are learned"),
        ([USER, {**ANSWER, "weight": 0}], "no answer in 'messages' is learned: all are marked as context"),
    ],
)
def test_other_marks_are_refused(turns: list[dict[str, Any]], expected: str):
    assert expected in str(refusal({"messages": turns}))


def test_answers_in_a_prompt_of_messages_are_context():
    record = parse(
        {"prompt": [USER, ANSWER, USER], "completion": [{"role": "assistant", "content": "Five."}]}, "line 1"
    )
    assert learned(record) == ["Five."]
    assert len(messages(record)) == 4


def test_messages_that_a_text_column_holds_as_json_are_messages():
    cells = {"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}
    assert learned(parse(cells, "line 1")) == ["It is 4."]
    with pytest.raises(DataError, match="'prompt' is a list"):
        parse({**cells, "completion": "It is 4."}, "line 1")


def test_what_follows_the_last_learned_answer_is_noted():
    notes = Notes()
    record = parse({"messages": [USER, ANSWER, {"role": "user", "content": "Thanks"}]}, "line 1", notes=notes)
    assert messages(record) == [USER, ANSWER]
    assert list(notes.unused) == ["messages after the last answer that is learned, in messages"]


# -- contents ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, {"content": "a\nb"}),
        ({"content": [{"text": "a"}]}, {"content": "a"}),
        ({"content": None, "refusal": "No."}, {"content": "No."}),
        ({"content": "a", "reasoning_content": "hm"}, {"content": "a", "reasoning_content": "hm"}),
        ({"content": "a", "thinking": "hm"}, {"content": "a", "reasoning_content": "hm"}),
        ({"content": [{"type": "thinking", "thinking": "hm", "signature": "x"}, {"type": "text", "text": "a"}]},
         {"content": "a", "reasoning_content": "hm"}),
        ({"content": "a", "tool_calls": [], "function_call": None, "audio": None}, {"content": "a"}),
    ],
)  # fmt: skip
def test_the_content_of_an_answer_becomes_text(message: dict[str, Any], expected: dict[str, Any]):
    record = parse({"messages": [USER, {"role": "assistant", **message}]}, "line 1")
    assert messages(record)[1] == {"role": "assistant", **expected}


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file", "video", "tool_use", None])
def test_content_that_is_not_text_is_refused_by_its_type(kind: str | None):
    error = refusal({"messages": [{"role": "user", "content": [{"type": kind, "data": "x"}]}, ANSWER]})
    assert f"a part of the type {kind!r}" in str(error)
    assert error.details["reason"] == "not_text_content"


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([USER, {"role": "assistant", "content": None}], "'content' of message 2 of 'messages' is missing or blank"),
        ([{"role": "user", "content": " "}, ANSWER], "'content' of message 1 of 'messages' is missing or blank"),
        ([USER, {"role": "assistant", "content": "a", "refusal": "b"}], "both 'content' and 'refusal'"),
        ([{**USER, "tool_calls": [CALL]}, ANSWER], "only an assistant's message may have it"),
        ([{**USER, "tool_call_id": "c1"}, ANSWER], "only a message of the role 'tool' may have it"),
        ([{**USER, "from": "human"}, ANSWER], "role and from, which mean the same"),
        ([{"role": "narrator", "content": "x"}, ANSWER], "the role of message 1 of 'messages' is 'narrator'"),
    ],
)
def test_messages_that_contradict_themselves_are_refused(turns: list[dict[str, Any]], expected: str):
    assert expected in str(refusal({"messages": turns}))


def test_a_system_message_may_stand_beside_the_messages_but_not_twice():
    record = parse({"system": "Be kind.", "messages": [USER, ANSWER]}, "line 1")
    assert messages(record)[0] == {"role": "system", "content": "Be kind."}
    parts = parse({"system": [{"text": "Be kind."}], "messages": [USER, ANSWER]}, "line 1")
    assert parts.conversation == record.conversation
    twice = {"system": "Be kind.", "messages": [{"role": "system", "content": "Be rude."}, USER, ANSWER]}
    assert "another one in it" in str(refusal(twice))


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "key", "path"),
    [
        ({"text": "a", "label": 1}, "label", ".["),
        ({"prompt": "a", "completion": "b", "weight": 0}, "weight", ".["),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "images", ".["),
        ({"messages": [{**USER, "mood": "sad"}, ANSWER]}, "messages[].mood", ".messages[]["),
        ({"conversations": [{"from": "human", "value": "a", "loss_scale": 2}]}, "conversations[].loss_scale",
         ".conversations[]["),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "bold": True}]}, ANSWER]},
         "messages[].content[].bold", ".messages[].content[]["),
        ({"instruction": "a", "output": "b", "original_question": "c"}, "original_question", ".["),
    ],
)  # fmt: skip
def test_an_unknown_key_is_refused_by_its_name_with_how_to_drop_it(record: dict[str, Any], key: str, path: str):
    error = refusal(record)
    assert f"the key '{key}' is not used here" in error.message
    assert f"jq -c 'del({path}" in error.suggestions[0]
    assert "skip_unusable_records" in error.suggestions[1]


def test_harmless_keys_are_named_and_null_ones_are_absent():
    record = {
        "id": 1,
        "Source": "x",
        "meta": {"a": 1},
        "prompt": "a",
        "completion": "b",
        "rejected": None,
        "text": None,
    }
    notes = Notes()
    assert parse(record, "line 1", notes=notes).texts == (("a", False), ("b", True))
    assert notes.unused == {"id": 1, "Source": 1, "meta": 1}


UNION = {"role": None, "from": None, "content": None, "value": None, "input": None, "output": None}


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        [{"role": "system", "value": "s"}, {"from": "human", "content": "a"}, {"from": "gpt", "value": "b"}],
        [USER, {"role": "assistant", "value": "w", "tool_calls": [CALL]}, {"role": "tool", "value": "4"}, ANSWER],
        [USER, {**ANSWER, "content": [{"text": "It is 4."}]}],
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}],
    ],
)
@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_keys_that_a_union_of_two_schemas_fills_with_null_are_absent(turns: list[dict[str, Any]], key: str):
    def in_a_table(turn: dict[str, Any]) -> dict[str, Any]:
        parts, calls = turn.get("content"), turn.get("tool_calls")
        filled = UNION | turn
        if isinstance(parts, list):
            filled["content"] = [{"type": None, **part} for part in parts]
        if calls:
            filled["tool_calls"] = [{"type": None, "function": None, **call} for call in calls]
        return filled

    assert messages(parse({key: [in_a_table(turn) for turn in turns]}, "line 1")) == messages(
        parse({key: turns}, "line 1")
    )


def test_null_fields_of_tools_and_chunks_are_absent():
    tools = [{"type": None, "function": None, "name": "add"}, {"type": None, "function": {"name": "sub"}}]
    conversation = parse({"messages": [USER, ANSWER], "tools": tools}, "line 1").conversation
    assert conversation is not None
    assert [tool["function"] for tool in conversation.tools] == [{"name": "add"}, {"name": "sub"}]
    chunk = {"content": "x = 1", "language": "python", "file_path": "a.py"}
    absent = dict.fromkeys(("metadata", "dependencies", "complexity_score"))
    assert parse(chunk | absent, "line 1").texts == parse(chunk, "line 1").texts


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen and rejected"),
        ({"messages": [USER, ANSWER], "chosen": [ANSWER], "rejected": [ANSWER]}, "chosen and rejected"),
        ({"prompt": "a", "completion": "b", "label": True}, "completion and label"),
        ({"input": {}, "preferred_output": [ANSWER], "non_preferred_output": [ANSWER]}, "preferred_output"),
    ],
)
def test_preference_pairs_are_refused_with_what_to_do(record: dict[str, Any], words: str):
    error = refusal(record)
    assert f"it is a preference pair ({words}" in error.message
    assert error.suggestions[0].startswith("To learn the better answers, write {")


def test_a_key_that_matches_two_formats_is_refused():
    assert "match 2 formats" in str(refusal({"text": "a", "prompt": "b", "completion": "c"}))


# -- records that are skipped --------------------------------------------------------------------------------------------


def test_unusable_records_are_skipped_and_counted_if_that_is_allowed():
    good = [{"prompt": f"double {n}", "completion": str(2 * n), "id": n} for n in range(12)]
    bad = [{"prompt": "a", "completion": ""}, {"prompt": "a", "completion": "b", "mood": "sad"}, {"text": "a"}, 3]
    with pytest.raises(DataError, match="Record 13"):
        summarise_source([*good, *bad])
    summary = summarise_source([*good, *bad, bad[0]], skip_unusable_records=True)
    assert summary.examples == 12
    assert summary.left_out == {"bad_value": 3, "unknown_key": 1, "other_format": 1}
    assert {each.reason: each.first for each in summary.skipped} == {
        "bad_value": ("record 13", "record 16", "record 17"),
        "unknown_key": ("record 14",),
        "other_format": ("record 15",),
    }
    assert summary.unused_keys == {"id": 12}
    assert summary.unused_in_words == (
        "Not used: id. Skipped: 3 records, bad value (record 13, record 16, record 17). Skipped: 1 record, unknown key "
        "(record 14). Skipped: 1 record, other format (record 15)."
    )


def test_if_nothing_is_left_the_error_says_why():
    with pytest.raises(DataError, match="no usable records") as caught:
        summarise_source([{"text": "a", "mood": "sad"}] * 20, skip_unusable_records=True)
    assert "'mood' is not used here" in str(caught.value)


# -- secrets -----------------------------------------------------------------------------------------------------------

# In two parts, so that no scanner takes them for real ones.
LIVE_KEY = "sk_live_" + "4eC39HqLyjWDarjtT1"
ACCESS_KEY = "AKIA" + "QWERTYUIOPASDFGH"
TOKEN = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"


@pytest.mark.parametrize(
    "turns",
    [
        [USER, {"role": "assistant", "tool_calls": [{"name": "login", "arguments": {"api_key": LIVE_KEY}}]}],
        [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": {"env": ACCESS_KEY}}, ANSWER],
        [USER, {**ANSWER, "reasoning_content": f"the token is {TOKEN}"}],
    ],
)  # fmt: skip
def test_secrets_are_found_in_all_of_a_conversation(turns: list[dict[str, Any]]):
    record = parse({"messages": turns}, "line 1")
    result = examples_from_record(record, token_counter=EstimatedTokenCounter(), max_length=512, redact=redact_secrets)
    assert (result.examples, dict(result.left_out)) == ([], {"secret": 1})


# -- any input -----------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
FUNCTION = st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": st.text(), "arguments": JSON})})
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "developer", "x"])},
    optional={
        "content": st.text(max_size=3) | JSON,
        "weight": st.sampled_from([0, 1, 2, None]),
        "tool_calls": st.lists(FUNCTION) | JSON,
        "name": JSON,
        "other": JSON,
    },
)  # fmt: skip


@given(st.lists(MESSAGE, max_size=4), st.none() | JSON)
def test_any_messages_are_used_whole_or_refused(turns: list[dict[str, Any]], tools: Any):
    try:
        record = parse({"messages": turns, "tools": tools}, "line 1")
    except DataError as error:
        message = str(error)
        assert message.startswith("Line 1 cannot be used: ")
        return
    given_turns = [turn for turn in turns if turn["role"] == "assistant" and turn.get("weight") != 0]
    assert record.conversation is not None
    assert sum(record.conversation.learned) == len(given_turns)
    for message, turn in zip(record.conversation.messages, turns, strict=False):
        assert len(message.get("tool_calls", ())) == len(turn.get("tool_calls") or ())
        assert not turn.get("other")
    json.dumps(record.conversation.messages).encode()


def test_records_given_one_by_one_keep_their_numbers():
    records = numbered([{"text": "a"}, {"text": "b"}], "row")
    assert [(record.name, record.format) for record in records] == [
        ("row 1", RecordFormat.TEXT),
        ("row 2", RecordFormat.TEXT),
    ]


def test_too_few_records_are_refused_with_advice_about_records():
    with pytest.raises(DataError, match="at least 8 examples") as caught:
        summarise_source([{"text": "a"}, {"text": "b"}])
    assert caught.value.suggestions == ("Give more records, each with a text of its own",)


@pytest.mark.parametrize(
    ("labels", "texts"),
    [("def add(a, b):", (("def add(a, b):", True),)), ("sum", (("def add(a, b):", False), ("sum", True)))],
)
def test_texts_that_are_named_like_token_ids_are_texts(labels: str, texts: tuple[tuple[str, bool], ...]):
    record = parse({"input_ids": "def add(a, b):", "labels": labels, "metadata": {"chunk_id": "1"}}, "record 1")
    assert record.texts == texts
