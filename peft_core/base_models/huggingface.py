"""Read a base model from a Hugging Face directory: config.json, safetensors (in shards or not) and tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_core.base_models.checkpoint_info import (
    Checkpoint,
    TemplateSources,
    TensorInfo,
    join_some,
    model_shape,
    unusable,
)
from peft_core.base_models.families import EMBEDDING_MODULES
from peft_core.base_models.layouts import EMBEDDING, HEAD, is_buffer, is_tied, require_exact
from peft_core.base_models.safetensors import read_header
from peft_core.base_models.supported import require_supported
from peft_core.base_models.tokenizer_files import (
    TOKENIZER_CONFIG,
    end_of_text,
    require_tokenizer,
    special_tokens,
)
from peft_core.errors import BaseCheckpointError
from peft_core.paths import ADAPTER_CONFIG
from peft_core.system.files import open_regular, read_exactly, refuse_json_bomb

_COMPARED_BYTES = 4 << 20  # read at a time
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 32 << 20  # the index of a very large model has a few megabytes
MAX_JSON_VALUES = 1_000_000
_MAX_TEMPLATES = 64
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def read_directory(path: Path) -> Checkpoint:
    """Read configuration and tensor headers of a model directory.

    Raises:
        BaseCheckpointError: A file is missing, or the model is not a causal language model in unquantised safetensors.
        HeaderError: A weights file is malformed.
    """
    config = _config(path)
    refuse_adapter(path)
    stored = _stored_tensors(path)
    quantised = {tensor.dtype for _, tensor in stored.values() if tensor.dtype not in FLOATS and _is_weight(tensor)}
    if quantised:
        raise unusable(path, f"its weights are quantised ({', '.join(sorted(quantised))})", _UNQUANTISED)
    config["tie_word_embeddings"] = _tie(config, stored)
    shapes = {
        name: tensor.shape
        for name, (_, tensor) in stored.items()
        if not (name == HEAD and config["tie_word_embeddings"]) and not is_buffer(name)
    }
    shape = model_shape(path, config, shapes)
    require_exact(path, config, shapes)
    tokenizer, generation = (
        read_json(path / name) if (path / name).is_file() else {}
        for name in (TOKENIZER_CONFIG, "generation_config.json")
    )
    end = end_of_text(special_tokens(tokenizer), generation, config)
    require_tokenizer(path, tokenizer, end, shape.vocab_size)
    return Checkpoint(
        path=path,
        format="huggingface",
        config=config,
        shape=shape,
        shapes=shapes,
        stored=tuple(stored.values()),
        size_bytes=sum(file.stat().st_size for file in {file for file, _ in stored.values()}),
        chat_templates=chat_templates(path),
    )


def _stored_tensors(path: Path) -> dict[str, tuple[Path, TensorInfo]]:
    """Return every tensor of the weight files, with its file."""
    stored: dict[str, tuple[Path, TensorInfo]] = {}
    files, listed = _weight_files(path)
    for file in files:
        tensors = read_header(file).tensors
        duplicates = stored.keys() & tensors.keys()
        if duplicates:
            raise unusable(path, f"several of its files contain {join_some(sorted(duplicates))}", _download_again(path))
        stored |= {name: (file, tensor) for name, tensor in tensors.items()}
    absent = [name for name, file in listed.items() if name not in stored or stored[name][0].name != file]
    if absent:
        raise unusable(
            path,
            f"its files lack {join_some(absent)}, which {INDEX} lists for {listed[absent[0]]}",
            _download_again(path),
        )
    return stored


def _tie(config: Mapping[str, Any], stored: dict[str, tuple[Path, TensorInfo]]) -> bool:
    """Return whether the output head is the embedding: with `tie_word_embeddings`, unless the file has a head of its own.

    A merged model often has a trained head while its configuration still says that it is tied. transformers then keeps the
    stored head (`PreTrainedModel.tie_weights`). If only one of the two is stored, it is both: its entry in `stored` gets the
    embedding's name.
    """
    if not is_tied(config):
        return False
    if HEAD not in stored:
        return True
    ends = tuple(f"{module}.weight" for module in EMBEDDING_MODULES)
    embedding = next((name for name in stored if name.endswith(ends)), None)
    if embedding is None:
        file, tensor = stored.pop(HEAD)
        stored[EMBEDDING] = (file, replace(tensor, name=EMBEDDING))
        return True
    return _is_equal(*stored[embedding], *stored[HEAD])


def _is_equal(file: Path, tensor: TensorInfo, other_file: Path, other: TensorInfo) -> bool:
    """Return whether two tensors have the same content. Different ones usually differ in their first bytes."""
    if (tensor.dtype, tensor.shape) != (other.dtype, other.shape):
        return False
    with open_regular(file, follow_links=True) as first, open_regular(other_file, follow_links=True) as second:
        for done in range(0, tensor.size, _COMPARED_BYTES):
            size = min(_COMPARED_BYTES, tensor.size - done)
            if read_exactly(first, size, tensor.start + done, file) != read_exactly(
                second, size, other.start + done, other_file
            ):
                return False
    return True


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
    require_supported(path, config)
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
    if (path / "params.json").is_file():
        problem = "it has no config.json, only params.json: it is in Meta's or Mistral's own format"
        return unusable(path, problem, "Use the same model in Hugging Face's format")
    models = sorted(file.parent for pattern in ("*", "snapshots/*") for file in path.glob(f"{pattern}/config.json"))
    if models:
        return unusable(path, "it has no config.json, but a directory in it has", f"Give that directory: {models[-1]}")
    return unusable(
        path, "it has no config.json", "Give a directory with config.json, model.safetensors, tokenizer.json"
    )


def _weight_files(path: Path) -> tuple[list[Path], dict[str, str]]:
    """Return the weight files and, if there is an index, the file that it lists for each tensor."""
    if (path / SINGLE).is_file():
        return [path / SINGLE], {}
    if not (path / INDEX).is_file():
        raise _no_weights(path)
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
    return [path / name for name in names], mapping


def _no_weights(path: Path) -> BaseCheckpointError:
    if any(path.glob("*.bin")) or any(path.glob("*.pt")) or any(path.glob("*.pth")):
        return unusable(
            path,
            "its weights are pickles (.bin), which can run code when they are loaded, so they are never opened",
            "Use another model, or a revision of this one, with model.safetensors",
        )
    if any(path.glob(".cache/huggingface/download/*.incomplete")) or any(path.glob("*.incomplete")):
        return unusable(path, f"it has no {SINGLE}, because its download is unfinished", _download_again(path))
    others = sorted(file.name for file in path.glob("*.safetensors"))
    problem = f"it has no {SINGLE}"
    if others == ["consolidated.safetensors"]:
        problem += ", only consolidated.safetensors, which is Mistral's own format"
    elif others:
        problem += f" and no {INDEX}, only {join_some(others)}"
    return unusable(path, problem, _download_again(path))


def _is_weight(tensor: TensorInfo) -> bool:
    return len(tensor.shape) > 1


def chat_templates(directory: Path) -> TemplateSources:
    """Return the chat templates of a model directory.

    Planning and workers both call this, so that a request with `messages` is refused before it is queued. The order of
    precedence is chat_template.jinja, tokenizer_config.json, chat_template.json. Named templates are in the directory
    `additional_chat_templates`, or in a list in one of the JSON files.

    Raises:
        BaseCheckpointError: A file that may contain a template cannot be read.
    """
    more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
    named = {file.stem: _template_text(directory, file) for file in more[:_MAX_TEMPLATES]}
    if (directory / "chat_template.jinja").is_file():
        named["default"] = _template_text(directory, directory / "chat_template.jinja")
    for name in ("tokenizer_config.json", "chat_template.json"):
        if "default" not in named and (directory / name).is_file():
            named |= _named_templates(read_json(directory / name).get("chat_template"))
    return TemplateSources.of({name: text for name, text in named.items() if text})


def _template_text(directory: Path, file: Path) -> str:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise unusable(directory, f"{file.name} is larger than {MAX_JSON_BYTES} bytes", _download_again(directory))
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise unusable(directory, f"{file.name} cannot be read ({error})", _download_again(directory)) from error


def _named_templates(template: object) -> dict[str, str]:
    """Return templates by name, from one template or from a list [{"name": ..., "template": ...}, ...]."""
    entries: list[Any] = template if isinstance(template, list) else [{"name": "default", "template": template}]
    return {
        entry["name"]: entry["template"]
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
    }
