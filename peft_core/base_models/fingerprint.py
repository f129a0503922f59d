"""Tell bases apart by what they are, not by what they are called.

`architecture`: configuration, names and shapes; the same for every quantisation and both formats of one model.
`sample`: up to 12 KB of every tensor, as stored. Two bases that differ in it are different files; equal ones have equal
weights unless someone tampered with the bytes between.
`family`: the norm weights in full; the same for every number format of one model, and other for another model of the
same architecture. A model whose norms were frozen while it was trained further keeps it.
`content`: every byte of the weights. Only known without reading them where a Hugging Face cache names them by it.
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
# input_layernorm, q_norm, model.norm, ln_f: whatever kind of norm a family has.
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
    """Fingerprint of a model directory or .gguf file; computed once per state of its files.

    Raises:
        BaseCheckpointError: the model cannot be used.
        HeaderError: a weights file is not sound.
    """
    return _fingerprint(path, file_states(path))


def content_hash(path: Path) -> str:
    """sha256 (hexadecimal) over every byte of the weights, whatever their files are called: seconds per gigabyte.

    Computed once per state of its files.

    Raises:
        BaseCheckpointError: the model cannot be used.
        HeaderError: a weights file is not sound, or cannot be read.
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
    """sha256 (hexadecimal) over what an adapter depends on, and nothing that differs between copies of one model."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    compared = {name: config.get(name) for name in _COMPARED} | {
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or (hidden // heads if heads and hidden else None),
        "rms_norm_eps": f"{config.get('rms_norm_eps') or 0:.6g}",  # GGUF has it in 32 bits
        # transformers < 5 kept it beside the scaling, transformers 5 inside
        "rope_theta": float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
    }
    tensors = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps([compared, tensors], sort_keys=True, default=str).encode()).hexdigest()


def sample_hash(checkpoint: Checkpoint) -> str:
    """sha256 (hexadecimal) over beginning, middle and end of every tensor, with its name, type and shape.

    How the tensors are spread over files does not enter. Of GGUF the quantised blocks are taken as they are.
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
    """sha256 (hexadecimal) over the norm vectors as float32, by their Hugging Face names.

    Quantisation leaves them alone, and GGUF keeps them in float32: equal in every form of one model. Empty where there
    are none, or not as floats.
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
    """Number formats and how many tensors have each, such as 'F32 61, Q4_1 211'."""
    counts = Counter(tensor.dtype for _, tensor in checkpoint.stored)
    return ", ".join(f"{dtype} {count}" for dtype, count in sorted(counts.items()))


def _content_by_name(checkpoint: Checkpoint) -> str | None:
    """What `content_hash` would give, where the files are links into a Hugging Face cache; None elsewhere.

    There a blob that came through LFS, as weights do, is named by its sha256.
    """
    snapshot = checkpoint.path if checkpoint.format == "huggingface" else checkpoint.path.parent
    if snapshot_at(snapshot) is None:
        return None
    hashes: list[str] = []
    for file in _weight_files(checkpoint):
        try:
            blob = file.readlink()
        except OSError:  # no link: a cache without symbolic links, or a file that somebody put there
            return None
        if blob.parent.name != "blobs" or not _SHA256.fullmatch(blob.name):
            return None
        hashes.append(blob.name)
    return _joined(hashes)


def _weight_files(checkpoint: Checkpoint) -> list[Path]:
    return sorted({file for file, _ in checkpoint.stored})


def _joined(hashes: Iterable[str]) -> str:
    """One hash of several files' hashes. Sorted: copies may have other names."""
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


def _opened(checkpoint: Checkpoint, stack: ExitStack) -> dict[Path, int]:
    return {file: stack.enter_context(open_regular(file, follow_links=True)) for file in _weight_files(checkpoint)}


def sample_offsets(size: int) -> list[int]:
    """Where the samples of a tensor of `size` bytes begin."""
    if size <= SAMPLE_BYTES:
        return [0] if size else []
    last = size - SAMPLE_BYTES
    return sorted({0, last // 2, last})
