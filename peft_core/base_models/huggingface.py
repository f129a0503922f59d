"""Read a base model from a Hugging Face directory: config.json, safetensors (in shards or not) and tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_core.base_models.checkpoint_info import Checkpoint, TensorInfo, join_some, model_shape, unusable
from peft_core.base_models.safetensors import read_header
from peft_core.paths import ADAPTER_CONFIG
from peft_core.system.files import refuse_json_bomb

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 32 << 20  # the index of a very large model has a few megabytes
MAX_JSON_VALUES = 1_000_000
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def read_directory(path: Path) -> Checkpoint:
    """Read configuration and tensor headers of a model directory.

    Raises:
        BaseCheckpointError: A file is missing, or the model is not a causal language model in unquantised safetensors.
        HeaderError: A weights file is malformed.
    """
    config = _config(path)
    refuse_adapter(path)
    files = _weight_files(path)
    stored: dict[str, tuple[Path, TensorInfo]] = {}
    size = 0
    for file in files:
        header = read_header(file)
        size += header.size
        duplicates = stored.keys() & header.tensors.keys()
        if duplicates:
            raise unusable(path, f"several of its files contain {join_some(sorted(duplicates))}", _download_again(path))
        stored |= {name: (file, tensor) for name, tensor in header.tensors.items()}
    quantised = {tensor.dtype for _, tensor in stored.values() if tensor.dtype not in FLOATS and _is_weight(tensor)}
    if quantised:
        raise unusable(path, f"its weights are quantised ({', '.join(sorted(quantised))})", _UNQUANTISED)
    tied = bool(config.get("tie_word_embeddings", False))
    shapes = {
        name: tensor.shape
        for name, (_, tensor) in stored.items()
        if not (tied and name == "lm_head.weight") and not name.endswith("rotary_emb.inv_freq")
    }
    if not (path / "tokenizer.json").is_file():
        raise unusable(
            path,
            "it has no tokenizer.json",
            "Write one with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            _download_again(path),
        )
    return Checkpoint(
        path=path,
        format="huggingface",
        config=config,
        shape=model_shape(path, config, shapes),
        shapes=shapes,
        stored=tuple(stored.values()),
        size_bytes=size,
        has_chat_template=chat_template(path) is not None,
    )


def refuse_adapter(path: Path) -> None:
    """Refuse a base model directory that contains an adapter: transformers would load it silently and unverified.

    Raises:
        BaseCheckpointError: The directory contains an adapter.
    """
    if os.path.lexists(path / ADAPTER_CONFIG):
        raise unusable(
            path,
            f"it also contains an adapter ({ADAPTER_CONFIG}), which would be loaded with it",
            "Move the adapter into a directory of its own",
        )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        BaseCheckpointError: The file is unreadable, too large or not a JSON object.
        HeaderError: The file is small, but its content would be large in memory.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise unusable(path.parent, f"{path.name} cannot be read ({error.strerror})") from error
    if len(raw) > MAX_JSON_BYTES:
        raise unusable(path.parent, f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    refuse_json_bomb(raw, path, MAX_JSON_VALUES)
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise unusable(path.parent, f"{path.name} is not JSON", _download_again(path.parent)) from error
    if not isinstance(value, dict):
        raise unusable(path.parent, f"{path.name} is not a JSON object", _download_again(path.parent))
    return value


_UNQUANTISED = "Use the original, unquantised model, or a GGUF file of it"


def _download_again(path: Path) -> str:
    return f"If {path.name} is an unfinished download, run `hf download ORG/NAME` again"


def _config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise _no_config(path)
    config = read_json(path / "config.json")
    named = config.get("architectures")
    architectures = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    if not any(name.endswith("ForCausalLM") for name in architectures):
        listed = join_some(architectures) or "none"
        raise unusable(
            path,
            f"it is not a causal language model (architectures in config.json: {listed}; one must end in ForCausalLM)",
            "Use a text-generating decoder model, preferably one trained on code",
        )
    if config.get("quantization_config") is not None:
        settings = config["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise unusable(path, f"it is quantised ({method or 'unknown method'})", _UNQUANTISED)
    if not isinstance(config.get("model_type"), str):
        raise unusable(path, "its config.json has no model_type", _download_again(path))
    invalid = _invalid_settings(config)
    if invalid:
        raise unusable(path, f"its config.json has no usable {join_some(invalid)}", _download_again(path))
    return config


def _invalid_settings(config: Mapping[str, Any]) -> list[str]:
    """Return the names of settings that are used in computations but are not valid numbers."""
    ropes = {name: config.get(name) or {} for name in ("rope_parameters", "rope_scaling")}
    invalid = [name for name, rope in ropes.items() if not isinstance(rope, dict)]
    numbers = {name: config.get(name) for name in ("rms_norm_eps", "rope_theta", "head_dim")}
    for rope in ropes.values():
        if isinstance(rope, dict) and "rope_theta" in rope:
            numbers["rope_theta in the rotary embedding"] = rope["rope_theta"]
    return invalid + [name for name, value in numbers.items() if value is not None and not _is_number(value)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30  # also excludes NaN


def _no_config(path: Path) -> Exception:
    if (path / ADAPTER_CONFIG).is_file():
        named = read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path")
        base = f"; it was trained on {named}" if isinstance(named, str) and named else ""
        return unusable(
            path, f"it is an adapter, not a base model{base}", "Give the adapter's base model as base_model"
        )
    ggufs = sorted(file.name for file in path.glob("*.gguf"))
    if ggufs:
        return unusable(path, "it has no config.json", f"Give the GGUF file itself: {path / ggufs[0]}")
    return unusable(
        path, "it has no config.json", "Give a directory with config.json, model.safetensors, tokenizer.json"
    )


def _weight_files(path: Path) -> list[Path]:
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if (path / INDEX).is_file():
        mapping = read_json(path / INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not mapping or not all(isinstance(name, str) for name in mapping.values()):
            raise unusable(path, f"{INDEX} has no weight_map", _download_again(path))
        names = sorted(set(mapping.values()))
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise unusable(path, f"{INDEX} refers to files outside its directory")
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            problem = f"{len(missing)} of its {len(names)} weight files are missing: {join_some(missing)}"
            raise unusable(path, problem, _download_again(path))
        return [path / name for name in names]
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        raise unusable(
            path,
            "its weights are pickles (.bin), which can run code when they are loaded, so they are never opened",
            "Use another model, or a revision of this one, with model.safetensors",
        )
    raise unusable(path, f"it has no {SINGLE}", _download_again(path))


def _is_weight(tensor: TensorInfo) -> bool:
    return len(tensor.shape) > 1


def chat_template(directory: Path) -> str | None:
    """Return the chat template of a model directory; None if it has none that applies to plain conversations.

    Planning and workers both call this, so that a request with `messages` is refused before it is queued.
    If several files have one, the order of precedence is chat_template.jinja, tokenizer_config.json, chat_template.json.

    Raises:
        BaseCheckpointError: A file that may contain the template cannot be read.
    """
    file = directory / "chat_template.jinja"
    if file.is_file():
        if file.stat().st_size > MAX_JSON_BYTES:
            raise unusable(directory, f"{file.name} is larger than {MAX_JSON_BYTES} bytes", _download_again(directory))
        try:
            return file.read_text(encoding="utf-8") or None
        except (OSError, ValueError) as error:
            raise unusable(directory, f"{file.name} cannot be read ({error})", _download_again(directory)) from error
    for name in ("tokenizer_config.json", "chat_template.json"):
        if (directory / name).is_file() and (
            template := _default_template(read_json(directory / name).get("chat_template"))
        ):
            return template
    return None


def _default_template(template: object) -> str | None:
    """Return the template, or the one named "default" in a list [{"name": ..., "template": ...}, ...]."""
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
