"""Write small model and adapter files by hand, so that tests need neither torch nor the libraries that are compared."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_core.base_models.gguf_model import hugging_face_name
from peft_core.base_models.safetensors import DTYPE_BITS

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
    "eos_token_id": 0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}


def model_shapes(
    *, layers: int = 2, hidden: int = 32, kv_rows: int = 16, vocab: int = 48
) -> dict[str, tuple[int, ...]]:
    """Return the tensor shapes of the toy model, or of a model that differs in these sizes."""
    block = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (64, hidden),
        "mlp.up_proj": (64, hidden),
        "mlp.down_proj": (hidden, 64),
    }
    return {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        **{f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()},
    }


SHAPES = model_shapes()
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
    **{
        f"blk.{i}.{gguf}.weight": SHAPES[f"model.layers.{i}.{name}.weight"]
        for i in range(2)
        for gguf, name in _GGUF_BLOCK
    },
}
U32, F32, BOOL, TEXT, ARRAY = 4, 6, 7, 8, 9
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
    "tokenizer.ggml.merges": (ARRAY, (TEXT, [])),
    "tokenizer.ggml.eos_token_id": (U32, 2),
    "tokenizer.chat_template": (TEXT, "{{ messages }}"),
}


def with_length(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def encoded(numbers: Sequence[float], dtype: str) -> bytes:
    """Encode numbers as a file stores them: in F32, F16 or BF16 (truncated, not rounded)."""
    if dtype == "BF16":
        float32 = struct.pack(f"<{len(numbers)}f", *numbers)
        return bytes(byte for position, byte in enumerate(float32) if position % 4 >= 2)
    return struct.pack(f"<{len(numbers)}{'f' if dtype == 'F32' else 'e'}", *numbers)


def weights(seed: int = 0, norms: int = 0, shapes: Shapes = SHAPES) -> dict[str, list[float]]:
    """Return values for every tensor of the toy model; float32, float16 and bfloat16 all represent them exactly.

    Another `seed` changes the matrices, another `norms` changes the norm vectors.
    """
    values: dict[str, list[float]] = {}
    for name, shape in shapes.items():
        start = zlib.crc32(name.encode()) + (norms if len(shape) == 1 else seed)
        values[name] = [((start + 7 * position) % 61 - 30) / 16 for position in range(math.prod(shape))]
    return values


def safetensors_bytes(
    shapes: Shapes, dtype: str = "F32", fill: int = 0, values: Mapping[str, Sequence[float]] | None = None
) -> bytes:
    """Return a file of tensors of one type, with these values, or with `fill` in every byte."""
    entries: dict[str, Any] = {}
    data = bytearray()
    for name, shape in shapes.items():
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + size]}
        data += encoded(values[name], dtype) if values is not None else bytes([fill]) * size
    return with_length(json.dumps(entries).encode(), bytes(data))


TOKENIZER = {
    "version": "1.0",
    "added_tokens": [
        {"id": 0, "content": "<end>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    ],
    "pre_tokenizer": {"type": "WhitespaceSplit"},
    "model": {"type": "WordLevel", "vocab": {"<end>": 0, "<unk>": 1}, "unk_token": "<unk>"},
}


def write_model(
    directory: Path,
    *,
    shards: int = 1,
    dtype: str = "F32",
    fill: int = 0,
    values: Mapping[str, Sequence[float]] | None = None,
    shapes: Shapes = SHAPES,
    **config: Any,
) -> Path:
    """Write a Hugging Face directory of the toy model; `config` overrides entries of config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (directory / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    if shards == 1:
        (directory / "model.safetensors").write_bytes(safetensors_bytes(shapes, dtype, fill, values))
        return directory
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: shapes[name] for name in list(shapes)[number::shards]}
        (directory / file).write_bytes(safetensors_bytes(part, dtype, fill, values))
        weight_map |= dict.fromkeys(part, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def write_cached(cache: Path, repo_id: str, commit: str, model: Path) -> Path:
    """Copy a model directory into a Hugging Face cache and return its snapshot, whose files are links to blobs.

    The blobs of weights are named by their sha256.
    """
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for directory in (snapshot, blobs, repository / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    for file in model.iterdir():
        content = file.read_bytes()
        is_large = file.suffix in (".safetensors", ".gguf")
        name = hashlib.sha256(content).hexdigest() if is_large else hashlib.sha1(content).hexdigest()  # noqa: S324 - as git does
        (blobs / name).write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / name)
    return snapshot


def gguf_bytes(
    metadata: Mapping[str, tuple[int, Any]] = GGUF_METADATA,
    shapes: Shapes = GGUF_SHAPES,
    *,
    version: int = 3,
    values: Mapping[str, Sequence[float]] | None = None,
    quantised: bool = False,
) -> bytes:
    """Return a GGUF file of F32 tensors that are zero or have these values, given by Hugging Face names.

    With `quantised`, matrices are Q8_0 instead, with arbitrary blocks: they must differ between tensors, but are not decoded.
    """
    entries, data = b"", b""
    for name, shape in shapes.items():
        dims = b"".join(struct.pack("<Q", axis) for axis in reversed(shape))
        is_quantised = quantised and len(shape) == 2
        entries += (
            _text(name) + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", 8 if is_quantised else 0, len(data))
        )
        if is_quantised:
            data += bytes([zlib.crc32(name.encode()) % 100]) * (math.prod(shape) // 32 * 34)
        elif values is not None:
            data += encoded(values[hugging_face_name(name) or ""], "F32")
        else:
            data += bytes(4 * math.prod(shape))
        data += bytes(-len(data) % 32)
    pairs = b"".join(
        _text(key) + struct.pack("<I", kind) + _value(kind, value) for key, (kind, value) in metadata.items()
    )
    header = b"GGUF" + struct.pack("<IQQ", version, len(shapes), len(metadata)) + pairs + entries
    return header + bytes(-len(header) % 32) + data


def write_gguf(path: Path, tokens: Sequence[str] = (), *, name: str = "Tiny") -> Path:
    """Write a GGUF file of the toy model in Q8_0, with these tokens at the end of its vocabulary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = [f"t{i}" for i in range(48 - len(tokens))] + list(tokens)
    changes = {"tokenizer.ggml.tokens": (ARRAY, (TEXT, vocabulary)), "general.name": (TEXT, name)}
    path.write_bytes(gguf_bytes(GGUF_METADATA | changes, quantised=True))
    return path


def _text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    if kind == TEXT:
        return _text(value)
    if kind == ARRAY:
        inner, items = value
        return struct.pack("<IQ", inner, len(items)) + b"".join(_value(inner, item) for item in items)
    return struct.pack({U32: "<I", F32: "<f", BOOL: "<?"}[kind], value)


def write_adapter(
    directory: Path, *, targets: Sequence[str] = ("q_proj", "v_proj"), rank: int = 4, **config: Any
) -> Path:
    """Write a LoRA adapter of the toy model; `config` overrides entries of adapter_config.json."""
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
    (directory / "adapter_model.safetensors").write_bytes(safetensors_bytes(adapter_shapes(targets, rank), fill=1))
    return directory


def adapter_shapes(
    targets: Sequence[str] = ("q_proj", "v_proj"), rank: int = 4, shapes: Shapes = SHAPES
) -> dict[str, tuple[int, ...]]:
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            result[f"base_model.model.{module}.lora_A.weight"] = (rank, shape[1])
            result[f"base_model.model.{module}.lora_B.weight"] = (shape[0], rank)
    return result
