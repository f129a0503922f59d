"""The schemas of the tools: small, and derived from the models of the requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from mcp.server.mcpserver.tools import Tool

from peft_core.schemas.generation import GenerationRequest
from server.app import TOOLS
from server.generate_output_schemas import output_schemas


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


def test_the_file_of_output_schemas_is_up_to_date() -> None:
    assert {tool.name: tool.output_schema for tool in TOOLS} == output_schemas(), "run `make generated`"


def test_generate_takes_every_field_of_a_generation_request_with_its_default() -> None:
    generate = next(tool for tool in TOOLS if tool.name == "generate")
    properties = generate.parameters["properties"]
    assert list(properties) == [*GenerationRequest.model_fields, "adapter_path", "use_base"]
    fields = GenerationRequest.model_json_schema()["properties"]
    for name, field in fields.items():
        assert properties[name]["description"] == field["description"]
        assert properties[name].get("default") == field.get("default")
    assert "required" not in generate.parameters


def test_a_prompt_that_is_itself_json_stays_text() -> None:
    generate = next(tool for tool in TOOLS if tool.name == "generate")
    arguments = generate.fn_metadata.validate_arguments({"prompt": '{"a": [1]}', "messages": "null", "stop": '["x"]'})
    assert (arguments["prompt"], arguments["messages"], arguments["stop"]) == ('{"a": [1]}', None, ["x"])
