"""Interpret a GGUF file as a model: derive its Hugging Face configuration and the Hugging Face names of its tensors.

Only families with a `gguf` entry in `families.py` are supported. The tensor names are specified at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md ("Standardized tensor names").
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from peft_core.base_models.families import GGUF_ARCHITECTURES, GgufFormat, gguf_format
from peft_core.base_models.gguf import DEQUANTISABLE, GgufHeader, read_gguf_header, shard_paths
from peft_core.base_models.gguf_vocabulary import USE_OTHER_MODEL, read_vocabulary
from peft_core.base_models.layouts import require_exact
from peft_core.errors import sanitize
from peft_core.system.files import open_regular, read_exactly

_OUTSIDE_BLOCKS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_BLOCKS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# These are Llama 3.1's frequency factors, which are settings in Hugging Face's format, not weights.
ROPE_FACTORS = "rope_freqs.weight"


def hugging_face_name(name: str) -> str | None:
    """Return the Hugging Face parameter name of a GGUF tensor; None for an unknown tensor."""
    stem, dot, suffix = name.rpartition(".")
    if not dot or suffix not in ("weight", "bias"):
        return None
    if stem in _OUTSIDE_BLOCKS:
        return f"{_OUTSIDE_BLOCKS[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d{1,4})\.(\w+)", stem, re.ASCII)
    if match is None or match[2] not in _IN_BLOCKS:
        return None
    return f"model.layers.{int(match[1])}.{_IN_BLOCKS[match[2]]}.{suffix}"


@dataclass(frozen=True)
class _GgufFiles:
    """A model's files: the metadata of the first, and the tensors of all."""

    first: Path
    header: GgufHeader
    stored: tuple[tuple[Path, TensorInfo], ...]

    def raw(self, name: str) -> bytes:
        file, tensor = next(item for item in self.stored if item[1].name == name)
        with open_regular(file, follow_links=True) as descriptor:
            return read_exactly(descriptor, tensor.size, tensor.start, file)


def read_gguf_model(path: Path) -> Checkpoint:
    """Read configuration and tensor headers of a GGUF model: one file, or any of the files that it is split into.

    Raises:
        HeaderError: A file is not a well-formed GGUF file.
        BaseCheckpointError: It is not a model of a supported family.
    """
    header = read_gguf_header(path)
    _refuse_other_contents(path, header)
    files = _all_files(path, header)
    path, header = files.first, files.header
    architecture = header.text("general.architecture")
    family = gguf_format(architecture)
    if architecture is None or family is None:
        raise unusable(
            path, f"its architecture is {architecture!r}; must be one of {GGUF_ARCHITECTURES}", USE_OTHER_MODEL
        )
    if header.integer(f"{architecture}.expert_count"):
        raise unusable(path, "it is a mixture of experts, which is not supported", USE_OTHER_MODEL)
    names = {name: hugging_face_name(name) for name in header.tensors if name != ROPE_FACTORS}
    unknown = [name for name, hf_name in names.items() if hf_name is None]
    if unknown or "token_embd.weight" not in names:
        problem = f"it has unknown tensors: {join_some(unknown)}" if unknown else "it has no token_embd.weight"
        raise unusable(path, problem, USE_OTHER_MODEL)
    _require_dequantisable(path, header)
    shapes = {hf_name: header.tensors[name].shape for name, hf_name in names.items() if hf_name is not None}
    config = _config(files, architecture, family)
    shape = model_shape(path, config, shapes)
    require_exact(path, config, shapes)
    return Checkpoint(
        path=path,
        format="gguf",
        config=config,
        shape=shape,
        shapes=shapes,
        stored=files.stored,
        size_bytes=header.size,
        chat_templates=_chat_templates(header),
        title=_title(header),
        vocabulary=read_vocabulary(path, header, shape.vocab_size),
    )


def _refuse_other_contents(path: Path, header: GgufHeader) -> None:
    """Refuse GGUF files that hold no language model, by what they hold instead."""
    kind, architecture = header.text("general.type"), header.text("general.architecture")
    if kind == "adapter":
        raise unusable(
            path, "it is a LoRA adapter in GGUF format, not a model", "Give the model that it was trained on"
        )
    if kind == "imatrix":
        raise unusable(path, "it is an importance matrix, which is used to quantise a model", _GIVE_MODEL)
    if kind == "mmproj" or architecture == "clip":
        raise unusable(path, "it is the projector of a vision-language model (mmproj), not a model", _GIVE_MODEL)
    if architecture == "controlvector":
        raise unusable(path, "it is a control vector, not a model", _GIVE_MODEL)
    if not header.tensors and (header.integer("split.count") or 1) <= 1:
        raise unusable(path, "it has no weights, only metadata and perhaps a vocabulary", _GIVE_MODEL)


_GIVE_MODEL = "Give the GGUF file of the model itself"


def _all_files(path: Path, header: GgufHeader) -> _GgufFiles:
    """Return the model's files: `path` alone, or all files that the model is split into."""
    count = header.integer("split.count") or 1
    if count == 1:
        return _GgufFiles(path, header, tuple((path, tensor) for tensor in header.tensors.values()))
    paths = shard_paths(path)
    merge = "Or merge them with `llama-gguf-split --merge FIRST OUT`"
    if len(paths) != count:
        raise unusable(
            path,
            f"it is one of the {count} files of a split model, and the others are found only if it is named "
            f"NAME-00001-of-{count:05}.gguf",
            "Give the files the names that they were published with",
            merge,
        )
    absent = [shard.name for shard in paths if not shard.is_file()]
    if absent:
        raise unusable(
            path,
            f"{len(absent)} of the {count} files of this split model are missing: {join_some(absent)}",
            _DOWNLOAD_AGAIN,
        )
    headers = [read_gguf_header(shard) for shard in paths]
    stored = tuple(
        (shard, tensor) for shard, part in zip(paths, headers, strict=True) for tensor in part.tensors.values()
    )
    tensors = {tensor.name: tensor for _, tensor in stored}
    total = headers[0].integer("split.tensors.count")
    places = [(part.integer("split.no"), part.integer("split.count")) for part in headers]
    in_place = places == [(number, count) for number in range(count)]
    if not in_place or len(tensors) != len(stored) or total not in (None, len(tensors)):
        raise unusable(
            path,
            f"its {count} files do not belong together: they hold {len(stored)} tensors, {len(tensors)} of them different, "
            f"instead of {total}",
            _DOWNLOAD_AGAIN,
        )
    size = sum(part.size for part in headers)
    return _GgufFiles(paths[0], replace(headers[0], tensors=tensors, size=size), stored)


_DOWNLOAD_AGAIN = "Download all of its files again, into one directory"


def _require_dequantisable(path: Path, header: GgufHeader) -> None:
    others = {tensor.dtype: name for name, tensor in header.tensors.items() if tensor.dtype not in DEQUANTISABLE}
    if others:
        listed = ", ".join(f"{dtype} ({name})" for dtype, name in sorted(others.items())[:3])
        raise unusable(
            path,
            f"it has weights in formats that cannot be unpacked: {listed}",
            "Use a GGUF file of another quantisation, such as Q8_0 or Q4_K_M",
        )


def _title(header: GgufHeader) -> str | None:
    """Return the model's name on one line. If a converter wrote a path, return its last part."""
    name = " ".join((header.text("general.name") or "").split()).replace("\\", "/").rstrip("/").rpartition("/")[2]
    return sanitize(name, limit=100).strip() or None


def _chat_templates(header: GgufHeader) -> TemplateSources:
    """Return the templates of a file: tokenizer.chat_template, and named ones under tokenizer.chat_template.NAME."""
    key = "tokenizer.chat_template"
    named = {name.removeprefix(f"{key}."): header.text(name) for name in header.metadata if name.startswith(f"{key}.")}
    return TemplateSources.of({name: text for name, text in {**named, "default": header.text(key)}.items() if text})


def _config(files: _GgufFiles, architecture: str, family: GgufFormat) -> dict[str, Any]:
    header = files.header

    def integer(key: str) -> int | None:
        return header.integer(f"{architecture}.{key}")

    embedding = header.tensors["token_embd.weight"].shape
    config: dict[str, Any] = {
        "architectures": [family.model_class],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": integer("embedding_length"),
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": integer("block_count"),
        "num_attention_heads": integer("attention.head_count"),
        "num_key_value_heads": integer("attention.head_count_kv") or integer("attention.head_count"),
        "max_position_embeddings": integer("context_length"),
        # The embedding has the right number of rows; the metadata may be absent or not count padding rows.
        "vocab_size": embedding[0] if len(embedding) == 2 else None,
        "rms_norm_eps": _rounded(header.number(f"{architecture}.attention.layer_norm_rms_epsilon"), 1e-5),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": header.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.integer("tokenizer.ggml.eos_token_id"),
        "pad_token_id": header.integer("tokenizer.ggml.padding_token_id"),
    }
    head_dim = integer("attention.key_length") or integer("rope.dimension_count")
    if head_dim is None and config["hidden_size"] and config["num_attention_heads"]:
        head_dim = config["hidden_size"] // config["num_attention_heads"]
    config["head_dim"] = head_dim
    config["rope_parameters"] = _rope(files, architecture, head_dim or 0)
    if family.has_bias_settings:
        config |= {
            "attention_bias": "blk.0.attn_q.bias" in header.tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        }
    return config


def _rope(files: _GgufFiles, architecture: str, head_dim: int) -> dict[str, Any]:
    path, header = files.first, files.header
    theta = _rounded(header.number(f"{architecture}.rope.freq_base"), 10_000.0)
    if ROPE_FACTORS in header.tensors:
        return _llama3_rope(files, theta, head_dim)
    # As in llama.cpp, a factor without a type is linear; files of 2023 have it under the second name.
    scaling = header.text(f"{architecture}.rope.scaling.type") or "linear"
    factors = (header.number(f"{architecture}.rope.{name}") for name in ("scaling.factor", "scale_linear"))
    factor = next((_rounded(factor, 1.0) for factor in factors if factor), 1.0)
    if scaling == "none" or (scaling == "linear" and factor == 1):
        return {"rope_type": "default", "rope_theta": theta}
    if scaling == "linear" and 0 < factor < math.inf:
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    raise unusable(path, f"its rotary embedding is scaled by {scaling!r}, which is not supported", USE_OTHER_MODEL)


def _llama3_rope(files: _GgufFiles, theta: float, head_dim: int) -> dict[str, Any]:
    """Recover Llama 3.1's scaling from the frequency factors in the file, and check it against each of them."""
    path, tensor = files.first, files.header.tensors[ROPE_FACTORS]
    if tensor.dtype != "F32" or not 1 <= math.prod(tensor.shape) <= 1024:
        raise unusable(path, "its rotary frequency factors have an unknown format", USE_OTHER_MODEL)
    raw = files.raw(ROPE_FACTORS)
    factors = struct.unpack(f"<{len(raw) // 4}f", raw)
    # These are the same in every release of the 3.x family; only the factor differs.
    low, high, original = 1.0, 4.0, 8192
    factor = max(factors)
    for index, stored in enumerate(factors):
        cycles = original / (2 * math.pi * theta ** (2 * index / max(head_dim, 1)))
        smooth = min(max((cycles - low) / (high - low), 0.0), 1.0)
        expected = 1 / ((1 - smooth) / factor + smooth) if factor > 0 else math.nan
        if not math.isclose(stored, expected, rel_tol=1e-3):
            raise unusable(path, "its rotary frequency factors are not those of Llama 3", USE_OTHER_MODEL)
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": _rounded(factor, 1.0),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _rounded(value: float | None, default: float) -> float:
    """Undo the rounding to 32 bits in GGUF: return 1e-05 for 9.99999974e-06."""
    return default if value is None else float(f"{value:.6g}")


def permuted_heads(config: Mapping[str, Any], name: str) -> int | None:
    """Return the number of heads if GGUF reordered the rows of this tensor within each head; None if it did not.

    See `GgufFormat.interleaves_heads`.
    """
    family = gguf_format(config["model_type"])
    if family is None or not family.interleaves_heads:
        return None
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", name, re.ASCII)
    if match is None:
        return None
    heads: int = config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
    return heads
