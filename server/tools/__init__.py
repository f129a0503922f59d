"""The MCP tools, each a thin translation of a `PEFTManager` method; how a tool is declared."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar, get_type_hints

import pydantic_core
from mcp.server.mcpserver.tools import Tool
from mcp.server.mcpserver.utilities.func_metadata import FuncMetadata
from mcp.types import ToolAnnotations
from pydantic import BaseModel

from peft_core.schemas.validation import TEXT_FIELDS, omit_unset
from server.confirm import confirm_download
from server.plain_schema import plain_input_schema
from server.roots import absolute_paths

OUTPUT_SCHEMAS = "output_schemas.json"  # written by `make generated`

ToolFunction = TypeVar("ToolFunction", bound=Callable[..., Any])


class ToolArguments(FuncMetadata):
    """The SDK's reading of arguments, which takes JSON written as text; here null and empty text also stand for omission."""

    def pre_parse_json(self, data: dict[str, Any]) -> dict[str, Any]:
        texts = {name: value for name, value in data.items() if name in TEXT_FIELDS}  # a prompt may itself be JSON
        return omit_unset({**super().pre_parse_json(data), **texts}, self.arg_model)

    async def call_fn(
        self,
        fn: Callable[..., Any],
        fn_is_async: bool,
        arguments: dict[str, Any],
        arguments_to_pass_directly: dict[str, Any] | None = None,
    ) -> Any:
        """Call the tool with absolute paths, and not before a download is agreed to, so that no tool can forget either."""
        passed = arguments_to_pass_directly or {}
        resolved = await absolute_paths(passed["ctx"], arguments)
        await confirm_download(passed["ctx"], resolved)
        return await super().call_fn(fn, fn_is_async, resolved, passed)


def make_tool(
    function: Callable[..., Any],
    title: str,
    *,
    reads: bool = False,
    destroys: bool = False,
    repeatable: bool = False,
    meta: dict[str, Any] | None = None,
) -> Tool:
    """Declare a tool: its docstring is the description. Every hint is set: an unset one means destructive and open-world."""
    tool = Tool.from_function(
        function,
        structured_output=False,
        title=title,
        description=" ".join((function.__doc__ or "").split()),
        annotations=ToolAnnotations(
            read_only_hint=reads, destructive_hint=destroys, idempotent_hint=reads or repeatable, open_world_hint=False
        ),
        meta=meta,
    )
    tool.parameters = plain_input_schema(tool.parameters)
    tool.fn_metadata = ToolArguments(
        arg_model=tool.fn_metadata.arg_model,
        output_schema=_output_schemas().get(tool.name),  # the models, whose nulls are not sent, would be refused
    )
    return tool


def result_model(function: Callable[..., Any]) -> type[BaseModel] | None:
    """Return the model of a tool's structured result, which its return annotation names: Annotated[CallToolResult, model].

    A tool whose result is text alone returns a plain CallToolResult.
    """
    metadata = getattr(get_type_hints(function, include_extras=True)["return"], "__metadata__", None)
    return None if metadata is None else metadata[0]


@cache
def _output_schemas() -> dict[str, dict[str, Any]]:
    schemas: dict[str, dict[str, Any]] = pydantic_core.from_json(files("server").joinpath(OUTPUT_SCHEMAS).read_bytes())
    return schemas


def arguments_from(model: type[BaseModel]) -> Callable[[ToolFunction], ToolFunction]:
    """Give a tool the fields of `model` as arguments, which it receives as keywords.

    A tool's schema is derived from its signature; this way the fields are declared only once, in the model.
    """

    def decorate(function: ToolFunction) -> ToolFunction:
        signature = inspect.signature(function, eval_str=True)
        annotations = get_type_hints(model, include_extras=True)
        fields = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotations[name])
            for name, field in model.model_fields.items()
        ]
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        first = [p for p in own if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        last = [p for p in own if p.kind is inspect.Parameter.KEYWORD_ONLY]
        function.__signature__ = signature.replace(parameters=[*first, *fields, *last])  # type: ignore[attr-defined]
        return function

    return decorate
