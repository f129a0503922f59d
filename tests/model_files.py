"""Small model and adapter files written by hand, so that tests need neither torch nor the libraries under test."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_core.bases.safetensors import DTYPE_BITS

Shapes = Mapping[str, tuple[int, ...]]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
_BLOCK_SHAPES = {
    "input_layernorm": (32,),
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "post_attention_layernorm": (32,),
    "mlp.gate_proj": (64, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (48, 32),
    "model.norm.weight": (32,),
    **{f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in _BLOCK_SHAPES.items()},
}
_GGUF_BLOCK = (
    ("attn_norm", "input_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
)
GGUF_SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (48, 32),
    "output_norm.weight": (32,),
    **{f"blk.{i}.{gguf}.weight": _BLOCK_SHAPES[name] for i in range(2) for gguf, name in _GGUF_BLOCK},
}
U32, F32, TEXT, ARRAY = 4, 6, 8, 9
GGUF_METADATA: dict[str, tuple[int, Any]] = {
    "general.architecture": (TEXT, "llama"),
    "general.name": (TEXT, "Tiny"),
    "llama.block_count": (U32, 2),
    "llama.context_length": (U32, 128),
    "llama.embedding_length": (U32, 32),
    "llama.feed_forward_length": (U32, 64),
    "llama.attention.head_count": (U32, 4),
    "llama.attention.head_count_kv": (U32, 2),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.freq_base": (F32, 10000.0),
    "tokenizer.ggml.model": (TEXT, "gpt2"),
    "tokenizer.ggml.pre": (TEXT, "smollm"),
    "tokenizer.ggml.tokens": (ARRAY, (TEXT, [f"t{i}" for i in range(48)])),
    "tokenizer.ggml.token_type": (ARRAY, (U32, [1] * 48)),
    "tokenizer.ggml.eos_token_id": (U32, 2),
    "tokenizer.chat_template": (TEXT, "{{ messages }}"),
}


def with_length(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def safetensors_bytes(shapes: Shapes, dtype: str = "F32", fill: int = 0) -> bytes:
    entries: dict[str, Any] = {}
    position = 0
    for name, shape in shapes.items():
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return with_length(json.dumps(entries).encode(), bytes([fill]) * position)


def write_model(directory: Path, *, shards: int = 1, dtype: str = "F32", fill: int = 0, **config: Any) -> Path:
    """A Hugging Face directory of the toy model; `config` overrides entries of config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (directory / "tokenizer.json").write_text("{}")
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(SHAPES, dtype, fill))
        return directory
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: SHAPES[name] for name in list(SHAPES)[number::shards]}
        (directory / file).write_bytes(safetensors_bytes(part, dtype, fill))
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def gguf_bytes(
    metadata: Mapping[str, tuple[int, Any]] = GGUF_METADATA, shapes: Shapes = GGUF_SHAPES, *, version: int = 3
) -> bytes:
    """A GGUF file of F32 tensors, all zero."""
    entries, offset = b"", 0
    for name, shape in shapes.items():
        dims = b"".join(struct.pack("<Q", axis) for axis in reversed(shape))
        entries += _text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", 0, offset)
        offset += -(-4 * math.prod(shape) // 32) * 32
    pairs = b"".join(
        _text(key) + struct.pack("<I", kind) + _value(kind, value) for key, (kind, value) in metadata.items()
    )
    header = b"GGUF" + struct.pack("<IQQ", version, len(shapes), len(metadata)) + pairs + entries
    return header + bytes(-len(header) % 32) + bytes(offset)


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return _text(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, item) for item in items)
    return struct.pack({U32: "<I", F32: "<f"}[kind], value)


def write_adapter(
    directory: Path, *, targets: Sequence[str] = ("q_proj", "v_proj"), rank: int = 4, **config: Any
) -> Path:
    """A LoRA adapter of the toy model; `config` overrides entries of adapter_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": list(targets),
        "bias": "none",
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    (directory / "adapter_model.safetensors").write_bytes(safetensors_bytes(adapter_shapes(targets, rank)))
    return directory


def adapter_shapes(targets: Sequence[str] = ("q_proj", "v_proj"), rank: int = 4) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in SHAPES.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            shapes[f"base_model.model.{module}.lora_A.weight"] = (rank, shape[1])
            shapes[f"base_model.model.{module}.lora_B.weight"] = (shape[0], rank)
    return shapes
