"""Write output_schemas.json from the models of the tools' results: `make generated`.

pydantic takes longer to derive them than the rest of a start takes. A test compares the file with the models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from server.app import TOOLS
from server.tools import OUTPUT_SCHEMAS


def output_schemas() -> dict[str, dict[str, Any]]:
    """Return the schema of each tool's result, by the tool's name."""
    return {tool.name: short_output_schema(tool.fn_metadata.output_model.model_json_schema()) for tool in TOOLS}


def short_output_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a tool's result with names and types of the fields; objects inside it are not described.

    The results of five tools are alike, and the complete schemas make `tools/list` longer than the 64 KiB that some clients
    read as one line.
    """
    definitions = schema.get("$defs", {})
    fields = {name: _short(node, definitions) for name, node in schema["properties"].items()}
    return {"type": "object", "properties": fields, "required": schema.get("required", [])}


def _short(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    if "$ref" in node:
        return _short(definitions[node["$ref"].rsplit("/", 1)[-1]], definitions)
    if "anyOf" in node:
        return {"anyOf": [_short(alternative, definitions) for alternative in node["anyOf"]]}
    short = {key: node[key] for key in ("type", "enum", "const") if key in node}
    if "items" in node:
        short["items"] = _short(node["items"], definitions)
    return short


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(schema)}" for name, schema in output_schemas().items()]
    Path(__file__).with_name(OUTPUT_SCHEMAS).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
