"""Identify base models by their content, not by their name.

`architecture`: configuration, names and shapes; the same for every quantisation and both formats of one model.
`sample`: up to 12 KB of every tensor, as stored. Different samples mean different weights; equal samples mean equal weights,
unless someone changed the bytes between the samples.
`family`: all norm weights; equal for every number format of one model, different for another model of the same architecture.
A model that was trained further with frozen norms keeps it.
`content`: every byte of the weights. In a Hugging Face cache it is known from file names; elsewhere it needs a full read.
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
# input_layernorm, q_norm, model.norm, ln_f: the names of norms in all families.
_NORM = re.compile(r"(?:^|\.)(?:[a-z_]*norm[a-z0-9_]*|ln_\w+)\.(?:weight|bias)$", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def _from_half(raw: bytes) -> bytes:
    count = len(raw) // 2
    return struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", raw))


def _widened(raw: bytes) -> bytes:
    """bfloat16 is the upper half of float32."""
    wide = bytearray(2 * len(raw))
    wide[2::4], wide[3::4] = raw[::2], raw[1::2]
    return bytes(wide)


_AS_FLOAT32: dict[str, Callable[[bytes], bytes]] = {"F32": bytes, "BF16": _widened, "F16": _from_half}


def fingerprint(path: Path) -> Fingerprint:
    """Return the fingerprint of a model directory or .gguf file; cached until a file changes.

    Raises:
        BaseCheckpointError: the model cannot be used.
        HeaderError: a weights file is malformed.
    """
    return _fingerprint(path, file_states(path))


def content_hash(path: Path) -> str:
    """Return the sha256 (hexadecimal) of all weight files, independent of their names. Takes seconds per gigabyte.

    The result is cached until a file changes.

    Raises:
        BaseCheckpointError: the model cannot be used.
        HeaderError: a weights file is malformed or unreadable.
    """
    return _content_hash(path, file_states(path))


@functools.lru_cache(maxsize=64)
def _content_hash(path: Path, states: FileStates) -> str:  # noqa: ARG001 - part of the key
    hashes: list[str] = []
    for file in _weight_files(read_checkpoint(path)):
        with open_regular(file, follow_links=True) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as opened:
            hashes.append(hashlib.file_digest(opened, "sha256").hexdigest())
    return _joined(hashes)


@functools.lru_cache(maxsize=64)
def _fingerprint(path: Path, states: FileStates) -> Fingerprint:  # noqa: ARG001 - part of the key
    checkpoint = read_checkpoint(path)
    return Fingerprint(
        architecture=architecture_hash(checkpoint.config, checkpoint.shapes),
        sample=sample_hash(checkpoint),
        family=family_hash(checkpoint),
        storage=storage_of(checkpoint),
        content=_content_by_name(checkpoint),
    )


def architecture_hash(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Return the sha256 (hexadecimal) of what an adapter depends on and what is equal in every copy of one model."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    compared = {name: config.get(name) for name in _COMPARED} | {
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or (hidden // heads if heads and hidden else None),
        "rms_norm_eps": f"{config.get('rms_norm_eps') or 0:.6g}",  # GGUF has it in 32 bits
        # transformers < 5 stores it next to the scaling, transformers 5 inside it
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
    }
    tensors = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps([compared, tensors], sort_keys=True, default=str).encode()).hexdigest()


def sample_hash(checkpoint: Checkpoint) -> str:
    """Return the sha256 (hexadecimal) of beginning, middle and end of every tensor, with its name, type and shape.

    The distribution over files does not matter. Quantised blocks of GGUF files are hashed as stored.
    """
    digest = hashlib.sha256()
    with ExitStack() as opened:
        by_file = _opened(checkpoint, opened)
        for file, tensor in sorted(checkpoint.stored, key=lambda item: item[1].name):
            digest.update(f"{tensor.name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
            for offset in sample_offsets(tensor.size):
                size = min(SAMPLE_BYTES, tensor.size)
                digest.update(read_exactly(by_file[file], size, tensor.start + offset, file))
    return digest.hexdigest()


def family_hash(checkpoint: Checkpoint) -> str:
    """Return the sha256 (hexadecimal) of the norm vectors as float32, with their Hugging Face names.

    Quantisation does not change them and GGUF stores them in float32, so they are equal in every form of one model. Empty if
    the model has no norm vectors, or not as floats.
    """
    norms: list[tuple[str, Path, TensorInfo]] = []
    for file, tensor in checkpoint.stored:
        name = hugging_face_name(tensor.name) if checkpoint.format == "gguf" else tensor.name
        if name is not None and name in checkpoint.shapes and len(tensor.shape) == 1 and _NORM.search(name):
            norms.append((name, file, tensor))
    if not norms or any(tensor.dtype not in _AS_FLOAT32 for _, _, tensor in norms):
        return ""
    digest = hashlib.sha256()
    with ExitStack() as opened:
        by_file = _opened(checkpoint, opened)
        for name, file, tensor in sorted(norms, key=lambda norm: norm[0]):
            digest.update(f"{name}|{list(tensor.shape)}|".encode())
            raw = read_exactly(by_file[file], tensor.size, tensor.start, file)
            digest.update(_AS_FLOAT32[tensor.dtype](raw))
    return digest.hexdigest()


def storage_of(checkpoint: Checkpoint) -> str:
    """Return the number formats and how many tensors use each, such as 'F32 61, Q4_1 211'."""
    counts = Counter(tensor.dtype for _, tensor in checkpoint.stored)
    return ", ".join(f"{dtype} {count}" for dtype, count in sorted(counts.items()))


def _content_by_name(checkpoint: Checkpoint) -> str | None:
    """Return what `content_hash` returns, if the files are links into a Hugging Face cache; otherwise None.

    The cache names a blob that came through LFS, as weights do, by its sha256.
    """
    snapshot = checkpoint.path if checkpoint.format == "huggingface" else checkpoint.path.parent
    if snapshot_at(snapshot) is None:
        return None
    hashes: list[str] = []
    for file in _weight_files(checkpoint):
        try:
            blob = file.readlink()
        except OSError:  # not a link: a cache without symbolic links, or a file added by hand
            return None
        if blob.parent.name != "blobs" or not _SHA256.fullmatch(blob.name):
            return None
        hashes.append(blob.name)
    return _joined(hashes)


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    return sorted({file for file, _ in checkpoint.stored})


def _joined(hashes: Iterable[str]) -> str:
    """Hash several files' hashes; sorted, because copies may have other names."""
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def _opened(checkpoint: Checkpoint, stack: ExitStack) -> dict[Path, int]:
    return {file: stack.enter_context(open_regular(file, follow_links=True)) for file in _weight_files(checkpoint)}


def sample_offsets(size: int) -> list[int]:
    """Return the offsets of the samples of a tensor of `size` bytes."""
    if size <= SAMPLE_BYTES:
        return [0] if size else []
    last = size - SAMPLE_BYTES
    return sorted({0, last // 2, last})
