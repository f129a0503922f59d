"""Write a Hugging Face model directory, merged with an adapter if there is one, as one GGUF file, tensor by tensor.

Only for families whose hyperparameters are few and known. Every other one is converted by llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.checkpoint_info import Checkpoint, TensorInfo
from peft_core.base_models.families import LLAMA_CPP
from peft_core.errors import ExportError, sanitize
from peft_core.llamacpp.worker.gguf_file import GgufTensor, Value, encode, write_gguf
from peft_core.llamacpp.worker.gguf_lora import llama_cpp_format, name_map, permuted
from peft_core.llamacpp.worker.gguf_vocabulary import artificial_vocabulary, read_beginning_and_end, read_vocabulary
from peft_core.llamacpp.worker.lora_pairs import Array, Lora
from peft_core.llamacpp.worker.model_gguf import mark_of, row_blocks
from peft_core.llamacpp.worker.quantise import converted, file_type, kinds_of
from peft_core.schemas.base_model import Base

WRITABLE = ("arcee", "ernie4_5", "gemma", "granite", "llama", "mistral", "qwen2", "qwen3", "seed_oss", "smollm3")
_NORM_PLUS_ONE = ("gemma",)  # its norms multiply by 1 + weight; llama.cpp stores the sum
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_SCALES = {  # Granite's
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_ROPE_FREQUENCIES = "rope_freqs.weight"


def can_write(base: Base) -> bool:
    """Return whether a base model in Hugging Face format can be written as GGUF."""
    if base.model_type not in WRITABLE or base.format != "huggingface":
        return False
    checkpoint = read_checkpoint(base.path)
    if base.model_type == "smollm3" and checkpoint.config.get("no_rope_layer_interval", 4) != 4:
        return (
            False  # llama.cpp leaves out the position encoding of every fourth layer, whatever the configuration says
        )
    known = all(tensor.dtype in _STORED for _, tensor in checkpoint.stored)
    return known and _rope(checkpoint.config)[0] in ("default", "linear", "llama3")


def write_hf_gguf(base: Base, lora: Lora | None, path: Path, kind: str) -> None:
    """Write the base model, merged with the adapter if there is one.

    Args:
        base: A Hugging Face directory for which `can_write` is true.
        lora: The adapter. None: the base model alone, to compare with; its vocabulary may then be an artificial one.
        path: The file to write.
        kind: Type of the matrices; vectors are in F32.

    Raises:
        ExportError: llama.cpp has no tokenizer like this one, or a weight is too large for the type.
    """
    checkpoint = read_checkpoint(base.path)
    vocabulary = read_vocabulary(base)
    if vocabulary is None:
        if lora is not None:
            raise ExportError(
                f"The tokenizer of {base.name} cannot be written as GGUF by peft-mcp.",
                code="export_unsupported",
                suggestions=[
                    "Export with format='huggingface', then run `convert_hf_to_gguf.py DIRECTORY` of llama.cpp",
                    "Or use to='gguf-lora'",
                ],
            )
        vocabulary = artificial_vocabulary(base.shape.vocab_size)
    else:
        vocabulary |= read_beginning_and_end(base)
    metadata = {key: encode(value) for key, value in {**_hyperparameters(base, checkpoint, kind), **vocabulary}.items()}
    metadata |= mark_of(lora)
    stored = list(_named(base, checkpoint))
    named = [(name, info.shape) for name, _, info in stored]
    tensors = [GgufTensor(*each, target) for each, target in zip(named, kinds_of(named, kind), strict=True)]
    data = [_blocks(base, lora, file, info, tensor) for (_, file, info), tensor in zip(stored, tensors, strict=True)]
    if (frequencies := _rope_frequencies(base, checkpoint)) is not None:
        tensors.append(GgufTensor(_ROPE_FREQUENCIES, frequencies.shape, GGMLQuantizationType.F32))
        data.append(iter([frequencies]))
    with path.open("wb") as stream:
        write_gguf(stream, metadata, tensors, data)


def _named(base: Base, checkpoint: Checkpoint) -> Iterator[tuple[str, Path, TensorInfo]]:
    """Yield the GGUF name, the file and the header entry of each tensor that llama.cpp has."""
    names = name_map(llama_cpp_format(base).architecture, base.shape.layers)
    for path, tensor in checkpoint.stored:
        if tensor.name not in checkpoint.shapes:  # an output head that is tied to the embedding
            continue
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ExportError(f"llama.cpp has no tensor like {sanitize(tensor.name)}.", code="export_unsupported")
        yield name, path, tensor


def _blocks(base: Base, lora: Lora | None, path: Path, info: TensorInfo, target: GgufTensor) -> Iterator[Array]:
    """Yield the rows of a tensor in the type to write, in llama.cpp's order."""
    module, _, part = info.name.rpartition(".")
    layout = llama_cpp_format(base)
    pair = lora.pairs.get(module) if lora is not None and part == "weight" else None
    shift = base.model_type in _NORM_PLUS_ONE and info.name.endswith("norm.weight")
    rows = info.shape[0] if info.shape else 1
    order = permuted(np.arange(rows), module, base, layout)
    is_permuted = bool((order != np.arange(rows)).any())
    for first, last in [(0, rows)] if is_permuted else row_blocks(info.shape):
        block = read_rows(path, info, first, last)
        if pair is not None:
            block = block + pair.delta(first, last)
        if is_permuted:
            block = block[order]
        if shift:
            block = block + np.float32(1)
        yield converted(block, target.kind, target.name)


def read_rows(path: Path, info: TensorInfo, first: int, last: int) -> Array:
    """Read rows of a tensor of a safetensors file, in float32."""
    rows = info.shape[0] if info.shape else 1
    columns = math.prod(info.shape[1:])
    row_bytes = info.size // max(1, rows)
    raw = np.fromfile(path, _STORED[info.dtype], count=(last - first) * columns, offset=info.start + first * row_bytes)
    values = (raw.astype(np.uint32) << 16).view(np.float32) if info.dtype == "BF16" else raw.astype(np.float32)
    return np.asarray(values.reshape(last - first, *info.shape[1:]))


def _hyperparameters(base: Base, checkpoint: Checkpoint, kind: str) -> dict[str, Value]:
    config, shape = checkpoint.config, base.shape
    architecture = LLAMA_CPP[base.model_type].architecture
    rope_type, rope = _rope(config)
    values: dict[str, Value] = {
        "context_length": shape.context_length,
        "embedding_length": shape.hidden_size,
        "block_count": shape.layers,
        "feed_forward_length": shape.intermediate_size,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.features_of_head,
        "attention.value_length": shape.features_of_head,
        "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "rope.dimension_count": shape.features_of_head,
        "rope.freq_base": float(rope.get("rope_theta", 10_000.0)),
        "vocab_size": shape.vocab_size,
    }
    if rope_type == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.get("factor", 1.0))}
    values |= {key: float(config[name]) for key, name in _SCALES.items() if config.get(name) is not None}
    return {
        "general.architecture": architecture,
        "general.type": "model",
        "general.name": sanitize(base.name),
        "general.file_type": file_type(kind),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        **{f"{architecture}.{key}": value for key, value in values.items()},
    }


def _rope(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the type of rotary embedding and its settings: transformers 5 puts them together, version 4 did not."""
    settings = {"rope_theta": config.get("rope_theta") or 10_000.0}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(config.get(key), dict):
            settings |= {name: value for name, value in config[key].items() if value is not None}
    kind = settings.get("rope_type") or settings.get("type") or "default"
    return str(kind), settings


def _rope_frequencies(base: Base, checkpoint: Checkpoint) -> Array | None:
    """Return the frequency factors of Llama 3.1's rotary embedding, which GGUF has as a tensor; None for any other."""
    kind, rope = _rope(checkpoint.config)
    if kind != "llama3":
        return None
    size, theta = base.shape.features_of_head, float(rope["rope_theta"])
    factor, low, high = (float(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    cycles = float(rope["original_max_position_embeddings"]) / (2 * np.pi * theta ** (np.arange(0, size, 2) / size))
    smooth = np.clip((cycles - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - smooth) / factor + smooth), dtype=np.float32)
