"""Schemas as clients receive them: nothing to resolve, and never stricter than the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from server.generate_output_schemas import short_output_schema
from server.plain_schema import plain_input_schema


class Inner(BaseModel):
    """An inner object."""

    title: str
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5


class Outer(BaseModel):
    optional: Annotated[int | None, Field(ge=1, description="A number.")] = None
    inner: Annotated[Inner, Field(description="Nested.")] = Inner(title="x")
    items: list[Inner] = []
    records: list[dict[str, Any]] = []
    either: Literal["all"] | list[str] = "all"
    kind: Literal["a"] | None = None
    name: Annotated[str, Field(min_length=1, max_length=9, pattern="^a")] = "a"
    rate: Annotated[float, Field(ge=0, description="A rate.", json_schema_extra={"advanced": True})] = 0.5
    length: Annotated[int, Field(json_schema_extra={"default_depends": True})] = 512


INNER = {
    "type": "object",
    "description": "An inner object.",
    "properties": {
        "title": {"type": "string"},
        "share": {"type": "number", "default": 0.5, "minimum": 0, "maximum": 1},
    },
    "required": ["title"],
}


@pytest.mark.parametrize(
    ("field", "plain"),
    [
        pytest.param("optional", {"type": "integer", "minimum": 1, "description": "A number."}, id="null is left out"),
        pytest.param("inner", {**INNER, "description": "Nested."}, id="a nested object is written out"),
        pytest.param("items", {"type": "array", "items": INNER}, id="objects in a list are written out"),
        pytest.param("records", {"type": "array", "items": {"type": "object"}}, id="any object"),
        pytest.param(
            "either",
            {
                "anyOf": [{"type": "string", "enum": ["all"]}, {"type": "array", "items": {"type": "string"}}],
                "default": "all",
            },
            id="const becomes enum",
        ),
        pytest.param("kind", {"type": "string", "enum": ["a"]}, id="a constant or null"),
        pytest.param("name", {"type": "string", "default": "a"}, id="the sizes of a text are left out"),
        pytest.param("length", {"type": "integer"}, id="a default that depends on the request is left out"),
        pytest.param("rate", {"type": "number"}, id="of an advanced setting the type remains"),
    ],
)
def test_an_input_schema_is_written_with_few_keywords(field: str, plain: dict[str, Any]) -> None:
    assert plain_input_schema(Outer.model_json_schema())["properties"][field] == plain


@pytest.mark.parametrize(
    ("field", "short"),
    [
        pytest.param("optional", {"type": "integer"}, id="null is never sent"),
        pytest.param("inner", {"type": "object"}, id="a nested object"),
        pytest.param("items", {"type": "array", "items": {"type": "object"}}, id="a list of objects"),
    ],
)
def test_an_output_schema_has_the_types_of_the_fields(field: str, short: dict[str, Any]) -> None:
    assert short_output_schema(Outer.model_json_schema())["properties"][field] == short
