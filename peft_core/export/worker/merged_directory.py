"""Write the base model merged with the adapter as a Hugging Face directory, tensor by tensor, in the base model's own types."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.checkpoint_info import TensorInfo
from peft_core.base_models.huggingface import INDEX, SINGLE, read_json
from peft_core.base_models.layouts import TIED
from peft_core.base_models.safetensors import read_header
from peft_core.errors import ExportError
from peft_core.export.worker.job import Job
from peft_core.llamacpp.worker.hf_gguf import read_rows
from peft_core.llamacpp.worker.lora_pairs import Array
from peft_core.llamacpp.worker.model_gguf import require_space, row_blocks

# The files of a model directory beside its weights. Nothing else is copied: other files may be code.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
MAX_COMPANION_BYTES = 64 << 20
_TYPES = {"F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2)}  # torch's name, bytes


def write_merged_directory(job: Job) -> str:
    """Write the model, and return the type of its matrices. Weights that were quantised in a GGUF file are written in F16.

    Raises:
        ExportError: A merged weight is too large for its type.
        StorageError: There is not enough space.
    """
    source = job.hf_directory
    shards = [source / SINGLE]
    if not shards[0].is_file():
        shards = [source / name for name in sorted(set(read_json(source / INDEX)["weight_map"].values()))]
    narrow = job.base.format == "gguf"
    require_space(job.directory, (2 if narrow else 4) * job.base.shape.parameters + (64 << 20), "The merged model")
    types: dict[str, int] = {}
    for shard in shards:
        _write_shard(job, shard, narrow=narrow, types=types)
    weights = max(types, key=types.__getitem__)
    if (source / INDEX).is_file() and len(shards) > 1:
        (job.directory / INDEX).write_bytes((source / INDEX).read_bytes())
    tied = bool(read_checkpoint(job.base.path).config[TIED])
    _write_config(source, job.directory, weights, tied=tied)
    for name in COMPANIONS:
        file = source / name
        if file.is_file() and file.stat().st_size <= MAX_COMPANION_BYTES:
            shutil.copyfile(file, job.directory / name)
    return weights


def _write_shard(job: Job, shard: Path, *, narrow: bool, types: dict[str, int]) -> None:
    """Write one weights file with the same tensors; count the values of each type in `types`."""
    tensors = sorted(read_header(shard).tensors.values(), key=lambda tensor: tensor.start)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        dtype = _written_type(tensor, narrow=narrow)
        end = position + (math.prod(tensor.shape) * _TYPES[dtype][1] if dtype in _TYPES else tensor.size)
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        if len(tensor.shape) > 1:
            types[dtype] = types.get(dtype, 0) + math.prod(tensor.shape)
        position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with (job.directory / shard.name).open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            _write_tensor(job, shard, tensor, _written_type(tensor, narrow=narrow), stream)


def _written_type(tensor: TensorInfo, *, narrow: bool) -> str:
    return "F16" if narrow and tensor.dtype == "F32" and len(tensor.shape) > 1 else tensor.dtype


def _write_tensor(job: Job, shard: Path, tensor: TensorInfo, dtype: str, stream: BinaryIO) -> None:
    stream.writelines(np.ascontiguousarray(block).data.cast("B") for block in _blocks(job, shard, tensor, dtype))


def _blocks(job: Job, shard: Path, tensor: TensorInfo, dtype: str) -> Iterator[Array]:
    module, _, part = tensor.name.rpartition(".")
    pair = job.lora.pairs.get(module) if part == "weight" else None
    if dtype not in _TYPES:  # a buffer of integers or booleans
        with shard.open("rb") as stream:
            stream.seek(tensor.start)
            yield np.frombuffer(stream.read(tensor.size), np.uint8)
        return
    for first, last in row_blocks(tensor.shape):
        block = read_rows(shard, tensor, first, last)
        if pair is not None:
            block = block + pair.delta(first, last)
        yield _converted(block, dtype, tensor.name)


def _converted(block: Array, dtype: str, name: str) -> Array:
    if dtype == "BF16":
        bits = np.ascontiguousarray(block, dtype=np.float32).view(np.uint32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to the nearest, ties to even
        data: Array = (rounded >> 16).astype(np.uint16)
    else:
        data = block.astype(np.float16 if dtype == "F16" else np.float32)
    if not np.isfinite(block).all() or (dtype == "F16" and not np.isfinite(data).all()):
        raise ExportError(f"A merged weight of {name} is too large for {dtype}.", code="export_overflow")
    return data


def _write_config(source: Path, target: Path, weights: str, *, tied: bool) -> None:
    """Write the base model's configuration with the type of the weights, and with what holds of its output head.

    transformers keeps a stored head that differs from the embedding, whatever the configuration says; vLLM and mlx-lm do not.
    """
    config = read_json(source / "config.json")
    config[TIED] = tied
    for key in ("dtype", "torch_dtype"):
        if key in config or key == "dtype":
            config[key] = _TYPES[weights][0]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
