"""Write output_schemas.json from the models of the tools' results: `make generated`.

pydantic takes longer to derive them than the rest of a start takes. A test compares the file with the models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from peft_core.schemas.results import TrainingStatus
from server.app import TOOLS
from server.long_calls import LONG_TOOLS, MAY_ASK_CLUSTER, StillWorking
from server.tools import OUTPUT_SCHEMAS, result_model

STATUS_TOOL = "get_training_status"
# Of the status that the other tools for jobs return, these fields are sent; the schema of STATUS_TOOL has all of them.
STATUS_FIELDS = frozenset(
    {"summary", "job_id", "project_id", "status", "progress_percent", "eta_s", "adapter_path", "error"}
    | {"metrics", "evaluation", "comparison", "dataset", "estimate", "report_path", "next", "next_step"}
)


def output_schemas() -> dict[str, dict[str, Any]]:
    """Return the schema of each tool's result, by the tool's name."""
    models = {tool.name: result_model(tool.fn) for tool in TOOLS}
    return {name: _schema_of(name, model) for name, model in models.items() if model is not None}


def _schema_of(tool: str, model: type[BaseModel]) -> dict[str, Any]:
    schema = short_output_schema(model.model_json_schema())
    if model is TrainingStatus and tool != STATUS_TOOL:
        fields = {name: field for name, field in schema["properties"].items() if name in STATUS_FIELDS}
        schema = {**schema, "properties": fields}
    return _or_still_working(schema) if tool in LONG_TOOLS | MAY_ASK_CLUSTER else schema


def _or_still_working(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Allow the answer that the call is still at work, too."""
    other = short_output_schema(StillWorking.model_json_schema())
    status = schema["properties"].get("status", {"enum": []})
    statuses = {"type": "string", "enum": [*status["enum"], "working"]}
    required = [name for name in schema["required"] if name in other["required"]]
    return {**schema, "properties": {**schema["properties"], "status": statuses}, "required": required}


def short_output_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a tool's result with names and types of the fields; objects inside it are not described.

    The complete schemas make `tools/list` longer than the 64 KiB that some clients read as one line.
    """
    definitions = schema.get("$defs", {})
    fields = {name: _short(node, definitions) for name, node in schema["properties"].items()}
    required = [
        name for name in schema.get("required", []) if _is_always_sent(schema["properties"][name], fields[name])
    ]
    summary = {"summary": {"type": "string"}}
    return {"type": "object", "properties": {**summary, **fields}, "required": ["summary", *required]}


def _is_always_sent(node: Mapping[str, Any], short: Mapping[str, Any]) -> bool:
    """Return whether a field has a value that is never left out, as nulls, empty texts, lists and objects are."""
    return "anyOf" not in node and (short.get("type") in ("boolean", "integer", "number") or "enum" in short)


def _short(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        return _short(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
    if "anyOf" in node:  # null is never sent
        types = [_short(alternative, definitions) for alternative in node["anyOf"] if alternative.get("type") != "null"]
        return types[0] if len(types) == 1 else {"anyOf": types}
    short = {key: node[key] for key in ("type", "enum", "const") if key in node}
    if "items" in node:
        short["items"] = _short(node["items"], definitions)
    return short


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(schema)}" for name, schema in output_schemas().items()]
    Path(__file__).with_name(OUTPUT_SCHEMAS).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
