"""The number format of each tensor of a GGUF file, and the conversion of rows into it.

The `gguf` package does not write K-quants; ggml itself does, which is in the package `xllamacpp`. Which tensors get more bits,
and what takes the place of a K-quant where rows are no multiple of 256, is as in `llama_tensor_get_type` of llama.cpp
(src/llama-quant.cpp).
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import quantize

from peft_core.base_models.gguf_model import ROPE_FACTORS
from peft_core.errors import ExportError
from peft_core.llamacpp.worker.lora_pairs import Array
from peft_core.system.machine import usable_cores
from peft_core.system.packages import install_extra

_Q = GGMLQuantizationType


@dataclass(frozen=True)
class _Mix:
    """The types of a K-quant: of most matrices, and of those in which errors do more harm."""

    most: GGMLQuantizationType
    fused: GGMLQuantizationType  # query, key and value in one matrix
    value_and_down: GGMLQuantizationType  # of half of the layers


_SIMPLE = {kind.name.lower(): kind for kind in (_Q.F32, _Q.F16, _Q.BF16, _Q.Q8_0, _Q.Q5_1, _Q.Q5_0, _Q.Q4_1, _Q.Q4_0)}
_MIXES = {
    "q4_k_m": _Mix(_Q.Q4_K, _Q.Q5_K, _Q.Q6_K),
    "q5_k_m": _Mix(_Q.Q5_K, _Q.Q6_K, _Q.Q6_K),
    "q6_k": _Mix(_Q.Q6_K, _Q.Q6_K, _Q.Q6_K),
}
_IN_THE_PLACE_OF = {_Q.Q4_K: _Q.Q5_0, _Q.Q5_K: _Q.Q5_1, _Q.Q6_K: _Q.Q8_0}  # where rows are no multiple of 256
_LAYER = re.compile(r"blk\.(\d+)\.(.+)\.weight", re.ASCII)


def bytes_from_above(values: int, kind: str) -> int:
    """Return how many bytes this many values take at most."""
    per_block, block_bytes = GGML_QUANT_SIZES[_SIMPLE.get(kind, _Q.Q8_0)]  # what may take a K-quant's place
    return values * block_bytes // per_block


def file_type(kind: str) -> int:
    """Return the number by which a GGUF file says what most of its matrices are."""
    name = "ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"
    return int(gguf.LlamaFileType[name].value)


def kinds_of(tensors: Sequence[tuple[str, tuple[int, ...]]], kind: str) -> list[GGMLQuantizationType]:
    """Return the type to write each tensor in; vectors stay in F32.

    Args:
        tensors: Names and shapes of all tensors of the model, outermost axis first.
        kind: The format of the file, such as "f16" or "q4_k_m".
    """
    layers = 1 + max((int(match[1]) for name, _ in tensors if (match := _LAYER.fullmatch(name))), default=0)
    head = "output.weight" if any(name == "output.weight" for name, _ in tensors) else "token_embd.weight"
    return [
        _Q.F32 if len(shape) < 2 or name == ROPE_FACTORS else _fitting(_wanted(name, kind, layers, head), shape[-1])
        for name, shape in tensors
    ]


def _wanted(name: str, kind: str, layers: int, head: str) -> GGMLQuantizationType:
    mix = _MIXES.get(kind)
    if mix is None:
        return _SIMPLE[kind]
    if name == head:
        return _Q.Q6_K
    match = _LAYER.fullmatch(name)
    if match is None:
        return mix.most
    layer, part = int(match[1]), match[2]
    if part == "attn_qkv":
        return mix.fused
    if part in ("attn_v", "ffn_down") and _needs_more_bits(layer, layers):
        return mix.value_and_down
    return mix.most


def _needs_more_bits(layer: int, layers: int) -> bool:
    """Return whether it is one of the first or last eighth of the layers, or every third of those between."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(kind: GGMLQuantizationType, columns: int) -> GGMLQuantizationType:
    """Return the type, or the one that takes its place because its blocks do not fit into a row."""
    if columns % GGML_QUANT_SIZES[kind][0]:
        kind = _IN_THE_PLACE_OF.get(kind, kind)
    return _Q.F16 if columns % GGML_QUANT_SIZES[kind][0] else kind


def converted(rows: Array, kind: GGMLQuantizationType, name: str) -> Array:
    """Return rows of the tensor `name` in a type, as its bytes or numbers.

    Raises:
        ExportError: A weight is NaN, Inf, or too large for the type; or K-quants cannot be made here.
    """
    largest = np.abs(rows).max(initial=0.0)
    limit = np.finfo(np.float16).max if kind not in (_Q.F32, _Q.BF16) else np.inf
    if not np.isfinite(largest) or largest > limit:
        raise ExportError(
            f"A merged weight of {name} is {largest:g}, too large for {kind.name}.",
            code="export_overflow",
            suggestions=["Export it with format='bf16'"],
        )
    if kind == _Q.F32:
        return np.asarray(rows, dtype=np.float32)
    if kind in _IN_THE_PLACE_OF:
        return _k_quantised(np.ascontiguousarray(rows, dtype=np.float32), kind)
    return np.asarray(quantize(rows, kind))


def _k_quantised(rows: Array, kind: GGMLQuantizationType) -> Array:
    per_block, block_bytes = GGML_QUANT_SIZES[kind]
    count, columns = rows.shape
    encoded = np.empty((count, columns // per_block * block_bytes), np.uint8)
    function = _ggml_quantize_chunk()

    def quantise(part: slice) -> None:  # ctypes releases the GIL
        source, target = rows[part], encoded[part]
        written = function(kind.value, source.ctypes.data, target.ctypes.data, 0, len(source), columns, None)
        assert written == target.nbytes, kind  # noqa: S101 -- ggml's blocks have the sizes that `gguf` says

    step = -(-count // usable_cores())
    with ThreadPoolExecutor() as threads:
        list(threads.map(quantise, (slice(first, first + step) for first in range(0, count, step))))
    return encoded


@functools.cache
def _ggml_quantize_chunk() -> Any:
    """Return ggml's function, whose signature ggml.h declares.

    Raises:
        ExportError: It cannot be called here.
    """
    try:
        import xllamacpp  # noqa: PLC0415 -- an optional package

        function = ctypes.CDLL(xllamacpp.xllamacpp.__file__).ggml_quantize_chunk
    except (ImportError, OSError, AttributeError) as error:
        raise ExportError(
            "K-quants are made by llama.cpp, and its quantiser cannot be called here.",
            code="llamacpp_not_installed",
            suggestions=[
                f"Install it: {install_extra('llamacpp')}",
                "Or export with format='f16' and run llama.cpp's `llama-quantize`",
            ],
        ) from error
    function.restype = ctypes.c_size_t
    function.argtypes = [
        ctypes.c_int,  # type
        ctypes.c_void_p,  # rows in float32
        ctypes.c_void_p,  # encoded rows
        ctypes.c_int64,  # first value
        ctypes.c_int64,  # rows
        ctypes.c_int64,  # values of a row
        ctypes.c_void_p,  # importance of each column; null: all the same
    ]
    return function
