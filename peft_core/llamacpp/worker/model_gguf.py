"""Write a base model, or a base model merged with an adapter, as one GGUF file, tensor by tensor.

From a GGUF file, everything is done in the file's own order: metadata (tokenizer, chat template, hyperparameters) is taken over
byte by byte, and only the update is reordered. For a Hugging Face directory see `hf_gguf`.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.checkpoint_info import Checkpoint, TensorInfo, unusable
from peft_core.base_models.gguf_model import hugging_face_name
from peft_core.errors import StorageError
from peft_core.llamacpp.worker.gguf_file import GgufTensor, copy_metadata, encode, write_gguf
from peft_core.llamacpp.worker.gguf_lora import llama_cpp_format, permuted
from peft_core.llamacpp.worker.lora_pairs import Array, Lora
from peft_core.llamacpp.worker.quantise import bytes_from_above, converted, file_type, kinds_of
from peft_core.ollama import MERGED_KEY
from peft_core.schemas.base_model import Base

BLOCK_VALUES = 1 << 20  # values of a matrix that are in memory at a time, in float32
_EXACT = ("F32", "F16")  # llama.cpp rounds activations for the others, BF16 included


def file_bytes(base: Base, kind: str) -> int:
    """Return an estimate, from above, of the size of a file with all weights in this type."""
    vectors = 4 * base.shape.layers * 8 * base.shape.hidden_size
    return bytes_from_above(base.shape.parameters, kind) + vectors + (64 << 20)


def require_space(directory: Path, needed: int, what: str) -> None:
    """Raise StorageError unless `needed` bytes are free where `directory` is or will be."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"{what} needs {needed} bytes in {existing}, but only {free} are free.",
            code="disk_full",
            suggestions=["Free disk space there", "Or set output_path to a directory on a larger disk"],
            details={"path": str(existing), "needed_bytes": needed, "free_bytes": free},
        )


def write_model_gguf(base: Base, lora: Lora | None, path: Path, kind: str) -> None:
    """Write the base model, merged with the adapter if there is one.

    Args:
        base: A GGUF file.
        lora: The adapter; None: the base model alone.
        path: The file to write.
        kind: Type of the matrices, such as "f16" or "q4_k_m"; vectors are in F32.

    Raises:
        ExportError: A merged weight is too large for the type, or K-quants cannot be made here.
    """
    checkpoint = read_checkpoint(base.path)
    metadata = _metadata(checkpoint, kind) | mark_of(lora)
    named = [(info.name, info.shape) for _, info in checkpoint.stored]
    tensors = [GgufTensor(*each, target) for each, target in zip(named, kinds_of(named, kind), strict=True)]
    with path.open("wb") as stream:
        write_gguf(
            stream,
            metadata,
            tensors,
            (_merged(base, lora, *source, target) for source, target in zip(checkpoint.stored, tensors, strict=True)),
        )


def mark_of(lora: Lora | None) -> dict[str, bytes]:
    """Return the metadata by which a merged model is recognised, wherever it is loaded."""
    return {} if lora is None else {MERGED_KEY: encode(f"LoRA of rank {lora.rank}")}


def _metadata(checkpoint: Checkpoint, kind: str) -> dict[str, bytes]:
    """Return the metadata of the base model's file, as it applies to one file of this type."""
    metadata = {
        key: value
        for key, value in copy_metadata(checkpoint.path).items()
        if not key.startswith("split.") and key != "general.alignment"
    }
    rule = checkpoint.vocabulary.split_rule if checkpoint.vocabulary is not None else None
    if rule is not None and metadata.get("tokenizer.ggml.pre") in (None, encode("default")):
        metadata["tokenizer.ggml.pre"] = encode(rule)  # a file of before May 2024: it trained with this rule
    metadata["general.file_type"] = encode(file_type(kind))
    metadata["general.quantization_version"] = encode(gguf.GGML_QUANT_VERSION)
    return metadata


def row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield the first row and the end of each block of rows that is in memory at a time."""
    rows = shape[0] if shape else 1
    step = max(1, BLOCK_VALUES // max(1, math.prod(shape[1:])))
    for first in range(0, rows, step):
        yield first, min(rows, first + step)


def _merged(base: Base, lora: Lora | None, file: Path, source: TensorInfo, target: GgufTensor) -> Iterator[Array]:
    """Yield blocks of rows of a tensor in the type to write."""
    update = _update(base, lora, source)
    matrix = source.shape if len(source.shape) > 1 else (1, *source.shape)  # a vector is one row
    row_bytes = source.size // max(matrix[0], 1)
    for first, last in row_blocks(matrix):
        block = _dequantised(file, source, row_bytes, first, last)
        if update is not None:
            a_RI, b_OR = update
            block = block + b_OR[first:last] @ a_RI
        yield converted(block, target.kind, target.name)


def _update(base: Base, lora: Lora | None, tensor: TensorInfo) -> tuple[Array, Array] | None:
    """Return A and the folded B, in llama.cpp's order, of the module that this tensor belongs to."""
    name = hugging_face_name(tensor.name)
    if lora is None or name is None or not name.endswith(".weight"):
        return None
    module = name.removesuffix(".weight")
    pair = lora.pairs.get(module)
    if pair is None:
        return None
    return pair.a_RI, permuted(pair.folded(), module, base, llama_cpp_format(base))


def _dequantised(path: Path, tensor: TensorInfo, row_bytes: int, first: int, last: int) -> Array:
    offset = tensor.start + first * row_bytes
    stored = np.fromfile(path, np.uint8, count=(last - first) * row_bytes, offset=offset).reshape(last - first, -1)
    try:
        block = dequantize(stored, GGMLQuantizationType[tensor.dtype])
    except NotImplementedError as error:
        advice = "Use a GGUF file of another quantisation, such as Q8_0 or F16"
        raise unusable(path, f"its quantisation {tensor.dtype} is not supported", advice) from error
    return np.asarray(block, dtype=np.float32).reshape(last - first, -1)


def is_exact(base: Base) -> bool:
    """Return whether it is a GGUF file of floating-point numbers only, so that llama.cpp computes without rounding."""
    return base.format == "gguf" and all(tensor.dtype in _EXACT for _, tensor in read_checkpoint(base.path).stored)
