"""Requests of OpenAI's and llama.cpp's interfaces: read as what they mean, or refused by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_core.endpoint.requests import (
    AnyRequest,
    ChatRequest,
    CompletionRequest,
    InfillRequest,
    generation_of,
    parse,
)
from peft_core.errors import InvalidArgument
from peft_core.schemas.generation import GenerationRequest


def read(kind: type[AnyRequest], **body: Any) -> GenerationRequest:
    return generation_of(parse(kind, json.dumps(body).encode()), random_seed=7)


def test_a_completion_with_a_suffix_fills_in_between() -> None:
    request = read(CompletionRequest, prompt="a", suffix="b", max_tokens=7, temperature=0.5, stop="x", seed=3)
    assert (request.prompt, request.prefix, request.suffix) == (None, "a", "b")
    assert (request.max_new_tokens, request.temperature, request.stop, request.seed) == (7, 0.5, ["x"], 3)
    assert read(CompletionRequest, prompt=["a"]).prompt == "a"


def test_the_parts_of_a_message_are_its_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = read(ChatRequest, messages=[{"role": "developer", "content": "s"}, {"role": "user", "content": parts}])
    assert request.messages is not None
    assert [(message.role, message.content) for message in request.messages] == [("system", "s"), ("user", "ab")]
    assert read(ChatRequest, messages=[{"role": "user", "content": "a"}], max_completion_tokens=5).max_new_tokens == 5


def test_the_line_before_the_cursor_belongs_to_the_prefix_and_no_adapter_scale_is_taken() -> None:
    request = read(
        InfillRequest,
        input_prefix="a\n",
        prompt="b",
        input_suffix="c",
        n_predict=9,
        samplers=["top_k", "infill"],
        top_p=0.99,
        lora=[{"id": 0, "scale": 0.5}],
        t_max_predict_ms=500,
    )
    assert (request.prefix, request.suffix, request.max_new_tokens) == ("a\nb", "c", 9)
    assert (request.temperature, request.top_p) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("echo", True),
        ("logprobs", 3),
        ("presence_penalty", 0.5),
        ("logit_bias", {"5": 1.0}),
        ("tools", [{}]),
        ("response_format", {"type": "json_object"}),
        ("grammar", "root ::= x"),
        ("temperature", 5),
        ("prompt", [1, 2]),
        ("prompt", ["a", "b"]),
        ("stop", ["x"] * 9),
        ("functions", [{}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}),
        ("top_k", 40),
        ("min_p", 0.05),
        ("typical_p", 0.9),
        ("repeat_penalty", 1.1),
        ("repetition_penalty", 0.9),
        ("mirostat", 2),
        ("json_schema", {}),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("guided_regex", "a*"),
        ("ignore_eos", True),
        ("continue_final_message", True),
    ],
)
def test_what_would_change_the_text_and_is_not_supported_is_refused_by_field(field: str, value: Any) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    for kind, form in ((CompletionRequest, {"prompt": "a"}), (ChatRequest, chat)):
        if field == "prompt" and kind is ChatRequest:
            continue
        with pytest.raises(InvalidArgument) as caught:
            read(kind, **{**form, field: value})
        assert caught.value.details["field"].startswith(field)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("top_k", 40, "must be a number of at most 0"),
        ("repeat_penalty", 1.1, "must be 1."),
        ("functions", [{}], "must be empty."),
    ],
)
def test_the_error_says_which_value_changes_nothing(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(InvalidArgument, match=allowed):
        read(CompletionRequest, prompt="a", **{field: value})


NEUTRAL: dict[str, Any] = {
    "n": 1,
    "echo": False,
    "logprobs": None,
    "presence_penalty": 0,
    "functions": [],
    "tool_choice": "auto",
    "top_k": -1,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1,
    "mirostat": 0,
    "json_schema": None,
    "chat_template_kwargs": {},
    "min_tokens": 0,
    "user": "me",
    "cache_prompt": True,
}


def test_values_that_change_nothing_and_unknown_fields_are_accepted() -> None:
    assert read(CompletionRequest, prompt="a", **NEUTRAL).prompt == "a"
    assert read(ChatRequest, messages=[{"role": "user", "content": "a"}], **NEUTRAL).messages


@pytest.mark.parametrize(("given", "used"), [({}, 7), ({"seed": None}, 7), ({"seed": -1}, 7), ({"seed": 0}, 0)])
def test_a_seed_is_drawn_unless_one_is_given(given: dict[str, Any], used: int) -> None:
    assert read(CompletionRequest, prompt="a", temperature=0.8, **given).seed == used


def test_an_editor_may_send_any_sampler_for_filling_in() -> None:
    samplers = {"top_k": 40, "min_p": 0.05, "repeat_penalty": 1.1, "mirostat": 1}
    assert read(InfillRequest, input_prefix="a", **samplers).temperature == 0.0


@settings(max_examples=25, deadline=None)  # each error derives schemas
@given(st.binary(max_size=200) | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(json.dumps))
def test_any_body_is_read_or_refused(body: bytes | str) -> None:
    for kind in (CompletionRequest, ChatRequest, InfillRequest):
        try:
            generation_of(parse(kind, body if isinstance(body, bytes) else body.encode()), 7)
        except InvalidArgument:
            continue
