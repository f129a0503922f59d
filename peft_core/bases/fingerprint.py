"""Tell bases apart by what they are, not by what they are called.

`architecture`: configuration, names and shapes; the same for every quantisation and both formats of one model.
`sample`: up to 12 KB of every tensor, as stored. Two bases that differ in it are different files; equal ones have equal
weights unless someone tampered with the bytes between.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft_core.bases.checkpoint import FileStates, file_states, read_checkpoint
from peft_core.bases.header import open_regular, read_exactly
from peft_core.bases.layout import Checkpoint
from peft_core.spec import Fingerprint

SAMPLE_BYTES = 4096
_COMPARED = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip


def fingerprint(path: Path) -> Fingerprint:
    """Fingerprint of a model directory or .gguf file; computed once per state of its files.

    Raises:
        BaseModelError: the model cannot be used.
        HeaderError: a weights file is not sound.
    """
    return _fingerprint(path, file_states(path))


@functools.lru_cache(maxsize=64)
def _fingerprint(path: Path, states: FileStates) -> Fingerprint:  # noqa: ARG001 - part of the key
    checkpoint = read_checkpoint(path)
    return Fingerprint(
        architecture=architecture_hash(checkpoint.config, checkpoint.shapes), sample=sample_hash(checkpoint)
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
        "rope_theta": float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        "rope_type": rope.get("rope_type", rope.get("type", "default")),
    }
    tensors = sorted((name, list(shape)) for name, shape in shapes.items())
    return hashlib.sha256(json.dumps([compared, tensors], sort_keys=True, default=str).encode()).hexdigest()


def sample_hash(checkpoint: Checkpoint) -> str:
    """sha256 (hexadecimal) over beginning, middle and end of every tensor, with its name, type and shape.

    How the tensors are spread over files does not enter. Of GGUF the quantised blocks are taken as they are.
    """
    digest = hashlib.sha256()
    by_file: dict[Path, int] = {}
    with ExitStack() as opened:
        for file in sorted({file for file, _ in checkpoint.stored}):
            by_file[file] = opened.enter_context(open_regular(file, follow_links=True))
        for file, tensor in sorted(checkpoint.stored, key=lambda item: item[1].name):
            digest.update(f"{tensor.name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
            for offset in sample_offsets(tensor.size):
                size = min(SAMPLE_BYTES, tensor.size)
                digest.update(read_exactly(by_file[file], size, tensor.start + offset, file))
    return digest.hexdigest()


def sample_offsets(size: int) -> list[int]:
    """Where the samples of a tensor of `size` bytes begin."""
    if size <= SAMPLE_BYTES:
        return [0] if size else []
    last = size - SAMPLE_BYTES
    return sorted({0, last // 2, last})
