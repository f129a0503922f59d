"""JSON schemas of the tools as every client takes them: small, and written with few keywords.

pydantic derives correct schemas that clients have refused or mangled: `$ref`, `const`, numbers as exclusive bounds, and `anyOf`
with null. Codex strips all descriptions from a tool whose schema is longer than about 4.5 kB. The models still check every
value; a schema that is sent may only allow more than they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SIZES = ("minLength", "maxLength", "maxItems", "pattern")  # errors word them where they matter
_EXCLUSIVE = {"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"}


def plain_input_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a tool's arguments with nested objects written out, and without what only repeats other parts.

    Null means omission for every optional argument, so it is not listed as a type. Of an advanced setting only the type is
    sent; `describe_settings` has the rest.
    """
    return {**_plain(schema, schema.get("$defs", {})), "additionalProperties": False}


def _plain(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    node = _without_null(node, definitions)
    if node.get("advanced"):
        node = {key: value for key, value in node.items() if key in ("type", "enum", "anyOf", "items")}
    for key, value in node.items():
        match key:
            case "title" | "$defs" | "default_depends":
                pass
            case "default" if node.get("default_depends"):
                pass
            case "default" if value is None or value == [] or isinstance(value, Mapping):
                pass  # null and [] are omission; the defaults of an object's fields stand at the fields
            case _ if key in _SIZES:
                pass
            case "additionalProperties" if value is True:
                pass
            case "properties":
                plain[key] = {name: _plain(field, definitions) for name, field in value.items()}
            case "items":
                plain[key] = _plain(value, definitions)
            case "anyOf":
                plain[key] = [_plain(alternative, definitions) for alternative in value]
            case "const":
                plain["enum"] = [value]
            case _:
                plain[_EXCLUSIVE.get(key, key)] = value
    return plain


def _without_null(node: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any]:
    """Resolve a reference, and an alternative between one type and null. The node's own keys win over those it refers to."""
    node = dict(node)
    if reference := node.pop("$ref", ""):
        return _without_null({**definitions[reference.rsplit("/", 1)[-1]], **node}, definitions)
    if alternatives := node.get("anyOf"):
        node["anyOf"] = [alternative for alternative in alternatives if alternative.get("type") != "null"]
        if len(node["anyOf"]) == 1:
            (only,) = node.pop("anyOf")
            return _without_null({**only, **node}, definitions)
    return node
