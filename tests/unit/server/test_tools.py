"""The schemas of the tools: small, and derived from the models of the requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from mcp.server.mcpserver.tools import Tool

from peft_core.schemas.generation import GenerationRequest
from server.tools import adapters, inference, training

TOOLS = [*training.TOOLS, *adapters.TOOLS, *inference.TOOLS]


def schemas_in(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, list):
        for part in schema:
            yield from schemas_in(part)
    if isinstance(schema, dict):
        yield schema
        for key, part in schema.items():
            yield from schemas_in(list(part.values()) if key in ("properties", "$defs") else part)


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_schemas_have_no_generated_titles(tool: Tool) -> None:
    for schema in schemas_in([tool.parameters, tool.output_schema]):
        assert not isinstance(schema.get("title"), str)


def test_generate_takes_every_field_of_a_generation_request_with_its_default() -> None:
    generate = next(tool for tool in TOOLS if tool.name == "generate")
    properties = generate.parameters["properties"]
    assert list(properties) == [*GenerationRequest.model_fields, "adapter_path", "use_base"]
    fields = GenerationRequest.model_json_schema()["properties"]
    for name, field in fields.items():
        assert properties[name]["description"] == field["description"]
        assert properties[name].get("default") == field.get("default")
    assert "required" not in generate.parameters
