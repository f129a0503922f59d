"""Conversion of pydantic's validation errors to `InvalidArgument`: field, value, what is allowed, next step.

pydantic's own messages name one violated bound ("should be less than or equal to 512"). An assistant corrects a request in one
attempt if it reads the complete range, so what is allowed is worded from the JSON schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, to_jsonable_python

from peft_core.errors import InvalidArgument
from peft_core.schemas.export import ExportOptions
from peft_core.schemas.generation import GenerationRequest
from peft_core.schemas.project import ALLOWED_RULES, RetrainThreshold, RetrainWhen
from peft_core.schemas.training import SETTINGS_URI, DataSelection, TrainingConfig, project_id_from

MAX_LISTED = 5
_FEW_FIELDS = 16
_OTHER_NAMES = {  # what other trainers, and other tools here, call it
    "lr": "learning_rate", "r": "rank", "lora_r": "rank", "lora_rank": "rank", "lora_alpha": "alpha",
    "lora_dropout": "dropout", "epochs": "num_epochs", "num_train_epochs": "num_epochs", "n_epochs": "num_epochs",
    "steps": "max_steps", "iters": "max_steps", "max_training_steps": "max_steps", "training_batch_size": "batch_size",
    "training_timeout_minutes": "max_minutes", "timeout_minutes": "max_minutes", "memory_limit_mb": "max_memory_mb",
    "per_device_train_batch_size": "batch_size", "max_seq_length": "max_length",
    "max_seq_len": "max_length", "context_length": "max_length", "cutoff_len": "max_length", "model": "base_model",
    "model_name": "base_model", "lr_scheduler_type": "lr_scheduler", "patience": "early_stopping_patience",
    "adapter_path": "project_id",  # that is for tools that take a directory, too
}  # fmt: skip
Config = TypeVar("Config", bound=DataSelection)
RETRAIN_WHEN: TypeAdapter[RetrainWhen] = TypeAdapter(RetrainWhen, config=ConfigDict(defer_build=True))
TEXT_FIELDS = frozenset({"prompt", "prefix", "suffix"})  # any text is meant as it is, even an empty one


def parse_config(config: TrainingConfig | Mapping[str, Any] | None) -> TrainingConfig:
    """Return a TrainingConfig from what a Python caller may pass.

    Raises:
        InvalidArgument: an unknown key (with the nearest known one), a value out of range.
    """
    return config if isinstance(config, TrainingConfig) else _parse(config, TrainingConfig)


def parse_selection(config: DataSelection | Mapping[str, Any] | None) -> DataSelection:
    """Return a DataSelection from what a Python caller may pass.

    Raises:
        InvalidArgument: as for `parse_config`.
    """
    return config if isinstance(config, DataSelection) else _parse(config, DataSelection)


def _parse(config: Mapping[str, Any] | None, model: type[Config]) -> Config:
    try:
        return model.model_validate(omit_unset(config or {}, model))
    except ValidationError as error:
        raise invalid_argument(error, model.model_json_schema(), prefix=("config",)) from error


def parse_generation(request: GenerationRequest | Mapping[str, Any]) -> GenerationRequest:
    """Return a GenerationRequest from what a caller may pass.

    Raises:
        InvalidArgument: no prompt, or several; an unknown key; a value out of range.
    """
    if isinstance(request, GenerationRequest):
        return request
    try:
        return GenerationRequest.model_validate(omit_unset(request, GenerationRequest))
    except ValidationError as error:
        raise invalid_argument(error, GenerationRequest.model_json_schema()) from error


def parse_export_options(options: ExportOptions | Mapping[str, Any] | None) -> ExportOptions:
    """Return ExportOptions from what a Python caller may pass.

    Raises:
        InvalidArgument: an unknown key, a value of another type.
    """
    if isinstance(options, ExportOptions):
        return options
    try:
        return ExportOptions.model_validate(omit_unset(options or {}, ExportOptions))
    except ValidationError as error:
        raise invalid_argument(error, ExportOptions.model_json_schema(), prefix=("options",)) from error


def parse_retrain_when(rule: RetrainWhen | Mapping[str, Any] | None) -> RetrainWhen | None:
    """Return the rule for retraining that a caller may pass; None: none was passed.

    Raises:
        InvalidArgument: it is neither "never" nor exactly one threshold in its range.
    """
    if rule is None or isinstance(rule, RetrainThreshold):
        return rule
    try:
        return RETRAIN_WHEN.validate_python(rule)
    except ValidationError as error:
        raise InvalidArgument("retrain_when", rule, ALLOWED_RULES, suggestions=["Correct it and call again"]) from error


def omit_unset(values: Mapping[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """Return `values` without the fields of `model` that are null or, if optional, an empty text or list; in nested models too.

    Clients whose schemas make every field required send these for what the user did not set.
    """
    given: dict[str, Any] = {}
    for name, value in values.items():
        field = model.model_fields.get(name)
        if field is None:
            given[name] = value
        elif (
            isinstance(value, Mapping)
            and isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
        ):
            given[name] = omit_unset(value, field.annotation)
        elif value is not None and (value not in ("", []) or field.is_required() or name in TEXT_FIELDS):
            given[name] = value
    return given


def invalid_argument(error: ValidationError, schema: Mapping[str, Any], prefix: Sequence[str] = ()) -> InvalidArgument:
    """Return one error for all problems. `schema`: JSON schema of the validated model."""
    problems = _merge_alternatives(error.errors(include_url=False))
    first, *others = [_describe(problem, schema, prefix) for problem in problems[:MAX_LISTED]]
    field, value, allowed = first
    suggestions = [
        f"Also: {name} {'is missing' if value is None else f'= {value!r} cannot be used'}: {allowed}"
        for name, value, allowed in others
    ]
    return InvalidArgument(field, value, allowed, suggestions=[*suggestions, "Correct it and call again"])


def refuse_unknown(arguments: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Raise `InvalidArgument` for an argument that the schema does not know."""
    for name, value in arguments.items():
        if name not in schema["properties"]:
            raise InvalidArgument(name, value, _no_such_field(name, schema), suggestions=["Correct it and call again"])


def _no_such_field(name: str, schema: Mapping[str, Any], *, nested: bool = False) -> str:
    """Word that a field is unknown: with the field that is meant, the nearest ones, or all of them if they are few."""
    import difflib  # noqa: PLC0415 -- only errors need it

    known = sorted(schema.get("properties", {}))
    setting = _OTHER_NAMES.get(name.lower(), name)
    if not nested and setting in schema["properties"].get("config", {}).get("properties", ()):
        return f"this setting must be inside config, as config.{setting}"
    near = [setting] if setting in known else difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    near = near or difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if not known:
        return "no argument is taken"
    words = ["there is no such field."]
    if near:
        words.append(f"Did you mean {' or '.join(map(repr, near))}?")
    if len(known) <= _FEW_FIELDS:
        words.append(f"Known: {', '.join(known)}")
    elif known == sorted(TrainingConfig.model_fields):
        words.append(f"The resource {SETTINGS_URI} lists all {len(known)}")
    return " ".join(words)


def describe_settings(model: type[BaseModel]) -> str:
    """Return a list of a model's fields in Markdown: what each does, what it allows, its default."""
    schema = model.model_json_schema()
    lines = []
    for name, field in schema["properties"].items():
        node = _resolve(field, schema)
        default = f" Default: {json.dumps(field['default'])}." if field.get("default") not in (None, [], {}) else ""
        lines.append(f"- `{name}`: {field['description']} Allowed: {describe_schema(field, schema)}.{default}")
        for inner, inner_field in node.get("properties", {}).items():
            lines.append(
                f"  - `{name}.{inner}`: {inner_field['description']} Allowed: {describe_schema(inner_field, schema)}."
            )
    return "\n".join(lines) + "\n"


def _merge_alternatives(problems: Sequence[ErrorDetails]) -> list[ErrorDetails]:
    """Keep the first problem of each field: a field with several allowed types fails once per type."""
    seen: dict[tuple[int | str, ...], ErrorDetails] = {}
    for problem in problems:
        seen.setdefault(_field_path(problem["loc"]), problem)
    return list(seen.values())


def _field_path(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Remove pydantic's names for the alternatives of a union ('list[constrained-str]', 'literal[...]')."""
    return tuple(part for part in loc if isinstance(part, int) or part.isidentifier()) or loc


def _describe(problem: ErrorDetails, schema: Mapping[str, Any], prefix: Sequence[str]) -> tuple[str, object, str]:
    path = _field_path(problem["loc"])
    field = ".".join([*prefix, *map(str, path)]) or "arguments"
    parent, own = _look_up(schema, path)
    match problem["type"]:
        case "extra_forbidden":
            return field, problem["input"], _no_such_field(str(path[-1]), parent, nested=len(prefix) + len(path) > 1)
        case "missing":
            return field, None, f"it {_must_be(own, schema, 'must be ') or 'is required'}"
        case "value_error":
            return (
                field,
                _without_defaults(problem["input"], own),
                str(problem["ctx"]["error"]) if "ctx" in problem else problem["msg"],
            )
        case "string_pattern_mismatch" if path[-1] == "project_id" and (like := project_id_from(problem["input"])):
            return field, problem["input"], f"{_must_be(own, schema)}; for instance {like!r}"
        case _:
            return field, problem["input"], _must_be(own, schema) or problem["msg"]


def _must_be(node: Mapping[str, Any], root: Mapping[str, Any], lead: str = "must be ") -> str:
    words = describe_schema(node, root)
    return lead + words if words else ""


def _look_up(schema: Mapping[str, Any], path: Sequence[int | str]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the schema of the object that has the field, and the field's own schema."""
    parent: Mapping[str, Any] = {}
    node = _resolve(schema, schema)
    for part in path:
        parent = node
        for alternative in node.get("anyOf", [node]):  # a list or null
            if isinstance(part, int) == ("items" in alternative):
                node = alternative
        child = node.get("items", {}) if isinstance(part, int) else node.get("properties", {}).get(part, {})
        node = _resolve(child, schema)
    return parent, node


def _resolve(node: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" in node:
        return dict(root["$defs"][node["$ref"].rsplit("/", 1)[-1]])
    for alternative in node.get("anyOf", ()):
        if "$ref" in alternative:
            return _resolve(alternative, root)
    return node


def describe_schema(node: Mapping[str, Any], root: Mapping[str, Any]) -> str:
    """Word what a JSON schema allows: 'an integer from 1 to 512'."""
    node = _resolve(node, root)
    if alternatives := node.get("anyOf"):
        # Null is the same as omission: it needs no mention.
        types = [alternative for alternative in alternatives if alternative.get("type") != "null"]
        return " or ".join(filter(None, (describe_schema(alternative, root) for alternative in types)))
    if "const" in node:
        return repr(node["const"])
    if "enum" in node:
        return "one of " + ", ".join(map(repr, node["enum"]))
    if "minimum" in node and node["minimum"] == node.get("maximum"):
        return _number(node["minimum"])
    if 0 in (node.get("maxItems"), node.get("maxProperties")):
        return "empty"
    names = {"integer": "an integer", "number": "a number", "string": "a text", "boolean": "true or false"}
    names |= {"array": "a list", "object": "an object", "null": "null"}
    words = [names.get(node.get("type", ""), "")]
    if node.get("type") == "array" and (items := describe_schema(node.get("items", {}), root)):
        words.append(f"with items each {items}")
    words += _bounds(node)
    if "pattern" in node:
        first_sentence = node.get("description", "").partition(". ")[0].rstrip(".")
        words.append(f"({first_sentence or 'matching ' + node['pattern']})")
    return " ".join(filter(None, words))


def _bounds(node: Mapping[str, Any]) -> list[str]:
    words = []
    if "minLength" in node or "maxLength" in node:
        words.append(f"of {node.get('minLength', 0)} to {node.get('maxLength', 'any number of')} characters")
    if "minimum" in node:
        words.append(f"from {_number(node['minimum'])}")
    if "exclusiveMinimum" in node:
        words.append(f"greater than {_number(node['exclusiveMinimum'])}")
    if "maximum" in node:
        lead = "to" if "minimum" in node else "and at most" if "exclusiveMinimum" in node else "of at most"
        words.append(f"{lead} {_number(node['maximum'])}")
    if "exclusiveMaximum" in node:
        words.append(f"and less than {_number(node['exclusiveMaximum'])}")
    return words


def _without_defaults(value: object, schema: Mapping[str, Any]) -> object:
    """Reduce an object to what differs from the defaults, which is what the caller wrote."""
    if not isinstance(value, Mapping):
        return value
    defaults = {name: node.get("default") for name, node in schema.get("properties", {}).items()}
    return {name: to_jsonable_python(given) for name, given in value.items() if given != defaults.get(name)}


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"
