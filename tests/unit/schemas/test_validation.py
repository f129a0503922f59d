"""Errors about arguments: field, value, what is allowed, next step."""

from __future__ import annotations

from typing import Any

import pytest

from peft_core.errors import InvalidArgument
from peft_core.schemas.training import TrainingConfig
from peft_core.schemas.validation import describe_schema, parse_config, parse_generation, refuse_unknown


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rank": 0}, ["config.rank = 0", "must be an integer from 1 to 512"]),
        ({"rank": 10**6}, ["config.rank = 1000000", "must be an integer from 1 to 512"]),
        ({"rank": "many"}, ["config.rank = 'many'", "must be an integer from 1 to 512"]),
        ({"learning_rate": 0}, ["config.learning_rate = 0", "greater than 0", "at most 0.1"]),
        ({"max_steps": -5}, ["config.max_steps = -5", "must be an integer from 1"]),
        ({"learnig_rate": 1e-4}, ["config.learnig_rate", "Did you mean 'learning_rate'?"]),
        ({"lora_rank": 8}, ["config.lora_rank", "Did you mean 'rank'?"]),
        ({"zzz": 1}, ["config.zzz", "The resource settings://training lists all"]),
        ({"lr": 1}, ["config.lr", "Did you mean 'learning_rate'?"]),
        ({"epochs": 1}, ["config.epochs", "Did you mean 'num_epochs'?"]),
        ({"mixture": {"fim": 1}}, ["config.mixture.fim", "Known: fill_in_the_middle, instructions"]),
        ({"num_epochs": 2, "max_steps": 10}, ["num_epochs = 2 and max_steps = 10 exclude each other"]),
        ({"device": "tpu"}, ["config.device = 'tpu'", "'mps', 'cuda', 'cpu'"]),
        ({"target_modules": [".*(a+)+"]}, ["config.target_modules"]),
        ({"lr_scheduler": "square"}, ["must be one of 'linear', 'cosine', 'constant'"]),
    ],
)
def test_an_invalid_setting_is_reported_with_its_value_and_what_is_allowed(
    config: dict[str, Any], expected: list[str]
) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_config(config)
    message = str(caught.value)
    for part in expected:
        assert part in message
    assert "\n" not in message
    assert "pydantic" not in message
    assert len(message) < 400


@pytest.mark.parametrize("name", ["max_steps", "lr"])
def test_a_setting_outside_of_config_is_refused_with_the_place_where_it_belongs(name: str) -> None:
    schema = {"properties": {"project_id": {}, "config": {"properties": {"max_steps": {}, "learning_rate": {}}}}}
    with pytest.raises(InvalidArgument, match=r"must be inside config, as config\.(max_steps|learning_rate)"):
        refuse_unknown({name: 1}, schema)


def test_an_argument_of_other_tools_is_refused_with_the_one_that_is_meant() -> None:
    with pytest.raises(InvalidArgument, match="Did you mean 'project_id'"):
        refuse_unknown({"adapter_path": "web"}, {"properties": {"port": {}, "project_id": {}}})
    with pytest.raises(InvalidArgument, match="no argument is taken"):
        refuse_unknown({"force": True}, {"properties": {}})


def test_several_invalid_settings_are_reported_in_one_error() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_config({"rank": 0, "batch_size": 0, "bogus": 1})
    for field in ("config.rank", "config.batch_size", "config.bogus"):
        assert field in str(caught.value)


def test_a_valid_configuration_is_accepted_as_object_and_as_mapping() -> None:
    assert parse_config({"rank": 8}) == TrainingConfig(rank=8)
    assert parse_config(TrainingConfig(rank=8)) == TrainingConfig(rank=8)
    assert parse_config(None) == TrainingConfig()


def test_every_setting_has_a_worded_range() -> None:
    schema = TrainingConfig.model_json_schema()
    for name, field in schema["properties"].items():
        assert describe_schema(field, schema), name
        assert field["description"], name


@pytest.mark.parametrize("unset", [None, ""], ids=["null", "empty text"])
def test_an_unset_setting_has_its_default(unset: object) -> None:
    assert parse_config(dict.fromkeys(TrainingConfig.model_fields, unset)) == TrainingConfig()
    mixture = {"fill_in_the_middle": 0.5, "instructions": unset}
    assert parse_config({"mixture": mixture}).mixture.fill_in_the_middle == 0.5


def test_an_unknown_setting_is_refused_even_if_it_is_null() -> None:
    with pytest.raises(InvalidArgument, match="Did you mean 'rank'"):
        parse_config({"ranks": None})


@pytest.mark.parametrize(
    ("request_", "used"),
    [
        pytest.param({"prompt": "x", "messages": [], "prefix": "", "suffix": "", "stop": []}, {"prompt"}, id="prompt"),
        pytest.param({"prompt": "x", "messages": None, "prefix": None, "seed": None}, {"prompt"}, id="null"),
        pytest.param(
            {"prompt": "", "messages": [{"role": "user", "content": "x"}], "prefix": "", "suffix": ""},
            {"messages"},
            id="messages",
        ),
        pytest.param({"prompt": "", "prefix": "x", "suffix": ""}, {"prefix", "suffix"}, id="prefix, end of file"),
        pytest.param({"prefix": "", "suffix": "x"}, {"prefix", "suffix"}, id="suffix, start of file"),
    ],
)
def test_empty_forms_of_a_prompt_are_omitted_beside_one_with_text(request_: dict[str, Any], used: set[str]) -> None:
    request = parse_generation(request_)
    assert {name for name in ("prompt", "messages", "prefix", "suffix") if getattr(request, name) is not None} == used


@pytest.mark.parametrize(
    ("request_", "problem"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"messages": []}, "there is no prompt"),
        ({"prompt": "x", "prefix": "y", "suffix": ""}, "exclude each other"),
        ({"prefix": "y", "suffix": None}, "belong together"),
        ({"prompt": None}, "there is no prompt"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_without_one_clear_prompt_is_refused(request_: dict[str, Any], problem: str) -> None:
    with pytest.raises(InvalidArgument, match=problem):
        parse_generation(request_)
