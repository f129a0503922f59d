"""Identify base models by their content, not by their name.

A fingerprint has these hashes:
- `architecture` covers configuration, names and shapes. It is the same for every quantisation and both formats of one model.
- `sample` covers up to 12 KB of every tensor, as stored. Different samples mean different weights; equal samples mean equal
  weights, unless someone changed the bytes between the samples.
- `family` covers all norm weights. It is equal for every number format of one model, and differs between models of the same
  architecture. Further training with frozen norms does not change it.
- `content` covers every byte of the weights. In a Hugging Face cache it follows from file names; elsewhere it needs a full
  read.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft_core.base_models.checkpoint import FileStates, file_states, read_checkpoint
from peft_core.base_models.checkpoint_info import Checkpoint, TensorInfo
from peft_core.base_models.gguf_model import hugging_face_name
from peft_core.base_models.hub_cache import snapshot_at
from peft_core.schemas.base_model import Fingerprint
from peft_core.system.files import open_regular, read_exactly

SAMPLE_BYTES = 4096
_COMPARED = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip
# The names of norm vectors in all families, such as input_layernorm, q_norm, model.norm and ln_f.
_NORM = re.compile(r"(?:^|\.)(?:[a-z_]*norm[a-z0-9_]*|ln_\w+)\.(?:weight|bias)$", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def _float16_to_float32(content: bytes) -> bytes:
    count = len(content) // 2
    return struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", content))


def _bfloat16_to_float32(content: bytes) -> bytes:
    """Convert bfloat16, which is the upper half of float32, by adding a lower half of zeros."""
    padded = bytearray(2 * len(content))
    padded[2::4], padded[3::4] = content[::2], content[1::2]
    return bytes(padded)


_AS_FLOAT32: dict[str, Callable[[bytes], bytes]] = {
    "F32": bytes,
    "BF16": _bfloat16_to_float32,
    "F16": _float16_to_float32,
}


def fingerprint(path: Path) -> Fingerprint:
    """Return the fingerprint of a model directory or .gguf file; cached until a file changes.

    Raises:
        BaseCheckpointError: The model cannot be used.
        HeaderError: A weights file is malformed.
    """
    return _fingerprint(path, file_states(path))


def content_hash(path: Path) -> str:
    """Return the sha256 (hexadecimal) of all weight files, independent of their names. Takes seconds per gigabyte.

    The result is cached until a file changes.

    Raises:
        BaseCheckpointError: The model cannot be used.
        HeaderError: A weights file is malformed or unreadable.
    """
    return _content_hash(path, file_states(path))


@functools.lru_cache(maxsize=64)
def _content_hash(path: Path, states: FileStates) -> str:  # noqa: ARG001 - part of the cache key
    hashes: list[str] = []
    for file in _weight_files(read_checkpoint(path)):
        with open_regular(file, follow_links=True) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return _combined_hash(hashes)


@functools.lru_cache(maxsize=128)
def _fingerprint(path: Path, states: FileStates) -> Fingerprint:  # noqa: ARG001 - part of the cache key
    checkpoint = read_checkpoint(path)
    return Fingerprint(
        architecture=architecture_hash(checkpoint.config, checkpoint.shapes),
        sample=sample_hash(checkpoint),
        family=family_hash(checkpoint),
        storage=storage_of(checkpoint),
        content=_content_from_blob_names(checkpoint),
    )


def architecture_hash(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the sha256 (hexadecimal) of what adapters depend on and what is equal in every copy of a model."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    compared = {name: config.get(name) for name in _COMPARED} | {
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or (hidden // heads if heads and hidden else None),
        "rms_norm_eps": f"{config.get('rms_norm_eps') or 0:.6g}",  # GGUF stores it in 32 bits
        # transformers < 5 stores it next to the scaling, transformers 5 inside it
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
    }
    tensors = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps([compared, tensors], sort_keys=True, default=str).encode()).hexdigest()


def sample_hash(checkpoint: Checkpoint) -> str:
    """Return the sha256 (hexadecimal) of the beginning, middle and end of every tensor, with its name, type and shape.

    The distribution of tensors over files does not matter. Quantised blocks of GGUF files are hashed as stored.
    """
    digest = hashlib.sha256()
    with ExitStack() as stack:
        by_file = _open_weight_files(checkpoint, stack)
        for file, tensor in sorted(checkpoint.stored, key=lambda item: item[1].name):
            digest.update(f"{tensor.name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
            for offset in sample_offsets(tensor.size):
                size = min(SAMPLE_BYTES, tensor.size)
                digest.update(read_exactly(by_file[file], size, tensor.start + offset, file))
    return digest.hexdigest()


def family_hash(checkpoint: Checkpoint) -> str:
    """Return the sha256 (hexadecimal) of the norm vectors as float32, with their Hugging Face names.

    Quantisation does not change them and GGUF stores them in float32, so they are equal in every format of one model. The
    result is empty if the model has no norm vectors, or does not store them as floats.
    """
    norm_tensors: list[tuple[str, Path, TensorInfo]] = []
    for file, tensor in checkpoint.stored:
        name = hugging_face_name(tensor.name) if checkpoint.format == "gguf" else tensor.name
        if name is not None and name in checkpoint.shapes and len(tensor.shape) == 1 and _NORM.search(name):
            norm_tensors.append((name, file, tensor))
    if not norm_tensors or any(tensor.dtype not in _AS_FLOAT32 for _, _, tensor in norm_tensors):
        return ""
    digest = hashlib.sha256()
    with ExitStack() as stack:
        by_file = _open_weight_files(checkpoint, stack)
        for name, file, tensor in sorted(norm_tensors, key=lambda norm: norm[0]):
            digest.update(f"{name}|{list(tensor.shape)}|".encode())
            content = read_exactly(by_file[file], tensor.size, tensor.start, file)
            digest.update(_AS_FLOAT32[tensor.dtype](content))
    return digest.hexdigest()


def storage_of(checkpoint: Checkpoint) -> str:
    """Return the number formats with the number of tensors in each, such as 'F32 61, Q4_1 211'."""
    counts = Counter(tensor.dtype for _, tensor in checkpoint.stored)
    return ", ".join(f"{dtype} {count}" for dtype, count in sorted(counts.items()))


def _content_from_blob_names(checkpoint: Checkpoint) -> str | None:
    """Return the result of `content_hash` without reading the files; None if they are not links into a Hugging Face cache.

    The cache names each blob that is stored in LFS, as weights are, by its sha256.
    """
    snapshot = checkpoint.path if checkpoint.format == "huggingface" else checkpoint.path.parent
    if snapshot_at(snapshot) is None:
        return None
    hashes: list[str] = []
    for file in _weight_files(checkpoint):
        try:
            blob = file.readlink()
        except OSError:  # not a link: the cache has no symbolic links, or a user added the file
            return None
        if blob.parent.name != "blobs" or not _SHA256.fullmatch(blob.name):
            return None
        hashes.append(blob.name)
    return _combined_hash(hashes)


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    return sorted({file for file, _ in checkpoint.stored})


def _combined_hash(hashes: Iterable[str]) -> str:
    """Hash the hashes of several files, in sorted order, because copies may have other names."""
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def _open_weight_files(checkpoint: Checkpoint, stack: ExitStack) -> dict[Path, int]:
    return {file: stack.enter_context(open_regular(file, follow_links=True)) for file in _weight_files(checkpoint)}


def sample_offsets(size: int) -> list[int]:
    """Return the offsets of the samples of a tensor of `size` bytes."""
    if size <= SAMPLE_BYTES:
        return [0] if size else []
    last = size - SAMPLE_BYTES
    return sorted({0, last // 2, last})
