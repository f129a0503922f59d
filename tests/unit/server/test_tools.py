"""The schemas of the tools: small, and derived from the models of the requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mcp.server.mcpserver.tools import Tool
from mcp.types import ListToolsResult

from peft_core.schemas.generation import GenerationRequest
from peft_core.schemas.training import SETTINGS_URI, TaskMixture, TrainingConfig
from server.app import TOOLS, PEFTServer
from server.generate_output_schemas import output_schemas
from server.resources import add_settings_resource


def schemas_in(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, list):
        for part in schema:
            yield from schemas_in(part)
    if isinstance(schema, dict):
        yield schema
        for key, part in schema.items():
            yield from schemas_in(list(part.values()) if key in ("properties", "$defs") else part)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_schemas_are_written_with_keywords_that_every_client_knows(tool: Tool) -> None:
    for schema in schemas_in(tool.parameters):
        assert not {"$ref", "$defs", "const", "exclusiveMinimum", "exclusiveMaximum"} & set(schema)
        assert {"type": "null"} not in schema.get("anyOf", [])
    for schema in schemas_in([tool.parameters, tool.output_schema]):
        assert not isinstance(schema.get("title"), str)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_schemas_have_the_fields_of_their_models(tool: Tool) -> None:
    assert list(tool.parameters["properties"]) == list(tool.fn_metadata.arg_model.model_fields)
    assert tool.parameters["additionalProperties"] is False


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_an_input_schema_is_short_enough_for_every_client(tool: Tool) -> None:
    """Codex strips the descriptions from a longer one."""
    assert len(json.dumps(tool.parameters, separators=(",", ":"))) <= 4000


async def test_the_list_of_tools_is_short_enough_to_be_read_as_one_line() -> None:
    tools = await PEFTServer(TOOLS).list_tools()
    listed = ListToolsResult(tools=tools)
    assert len(listed.model_dump_json(by_alias=True, exclude_none=True)) <= 40_000


def test_advanced_settings_are_described_by_a_resource_and_sent_as_types() -> None:
    config = next(tool for tool in TOOLS if tool.name == "train_adapter").parameters["properties"]["config"]
    assert list(config["properties"]) == list(TrainingConfig.model_fields)
    assert config["properties"]["weight_decay"] == {"type": "number"}
    assert config["properties"]["device"] == {"enum": ["auto", "mps", "cuda", "cpu"], "type": "string"}
    assert config["properties"]["max_length"]["description"]
    assert SETTINGS_URI in config["description"]


async def test_the_resource_of_settings_says_what_each_setting_does_and_allows() -> None:
    server = PEFTServer(TOOLS)
    add_settings_resource(server)
    (content,) = await server.read_resource(SETTINGS_URI)
    lines = str(content.content).splitlines()
    assert len(lines) == len(TrainingConfig.model_fields) + len(TaskMixture.model_fields)
    assert "- `weight_decay`: AdamW weight decay. Allowed: a number from 0 to 1. Default: 0.0." in lines


def test_the_file_of_output_schemas_is_up_to_date() -> None:
    assert {tool.name: tool.output_schema for tool in TOOLS if tool.output_schema} == output_schemas(), (
        "run `make generated`"
    )


@pytest.mark.parametrize(
    ("tool", "arguments", "taken"),
    [
        ("generate", {"prompt": "x", "stop": "\n"}, lambda given: given.stop == ["\n"]),
        ("disk_usage", {"free": "logs"}, lambda given: given.free == ["logs"]),
        (
            "train_adapter",
            {"project_id": "a", "config": {"include": "src/**", "exclude": "*.sql", "more_sources": "/b"}},
            lambda given: (
                (given.config.include, given.config.exclude, given.config.more_sources)
                == (["src/**"], ["*.sql"], ["/b"])
            ),
        ),
    ],
)
def test_a_tool_takes_one_text_for_a_list(tool: str, arguments: dict[str, Any], taken: Callable[[Any], bool]) -> None:
    (found,) = (each for each in TOOLS if each.name == tool)
    model = found.fn_metadata.arg_model
    assert taken(model.model_validate(found.fn_metadata.pre_parse_json(arguments)))


def test_generate_takes_every_field_of_a_generation_request_with_its_default() -> None:
    generate = next(tool for tool in TOOLS if tool.name == "generate")
    properties = generate.parameters["properties"]
    assert list(properties) == [*GenerationRequest.model_fields, "adapter_path", "use_base"]
    fields = GenerationRequest.model_json_schema()["properties"]
    for name, field in fields.items():
        assert properties[name]["description"] == field["description"]
        assert properties[name].get("default") == (None if field.get("default") == [] else field.get("default"))
    assert "required" not in generate.parameters


def test_a_prompt_that_is_itself_json_stays_text() -> None:
    generate = next(tool for tool in TOOLS if tool.name == "generate")
    arguments = generate.fn_metadata.validate_arguments({"prompt": '{"a": [1]}', "messages": "null", "stop": '["x"]'})
    assert (arguments["prompt"], arguments["messages"], arguments["stop"]) == ('{"a": [1]}', None, ["x"])
