"""Dequantisation of ggml's block formats to float32, in plain torch, on any device.

Layouts: `block_*` in https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h; arithmetic: `dequantize_row_*` in
src/ggml-quants.c. A weight is scale * q + offset. The factors have so few bits that every product is exact in
float32; only the sum is rounded, once. So each bit agrees with gguf.quants, with or without fused multiply-add.
Hand-written because gguf.quants needs numpy arrays in host memory, and is slower.

Eight q at a time are assembled in 64-bit words (little-endian, like all platforms that torch supports), because torch shifts
bytes slowly. Three passes over the result follow: convert, multiply, add.

B blocks (of all rows), C elements of a block, S parts of a block that have scales of their own; 8 elements to a word
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from peft_core.base_models.gguf import GGML_TYPES
from peft_core.errors import BaseCheckpointError

# Weights dequantised at a time on a CPU: temporaries of two bytes per weight stay in its caches, and out of the memory peak.
_CHUNK_WEIGHTS = 1 << 20
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Decoded(NamedTuple):
    """One tensor's integers q (one byte each, at most 127) and factors (float32): a weight is scale * q + offset."""

    q_BC: torch.Tensor
    scale_BS: torch.Tensor
    offset_BS: torch.Tensor | None = None


def dequantise(blocks: torch.Tensor, kind: str, columns: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return float32 [rows, columns] from uint8 [rows, bytes of a row] in ggml's format `kind`.

    The result is `out` or new memory; for F32 it is a view of `blocks`.

    Raises:
        BaseCheckpointError: a format that is not in `SUPPORTED`.
        ValueError: bytes of another shape or type.
    """
    require_supported(kind)
    rows = blocks.shape[0]
    if blocks.dtype != torch.uint8 or blocks.shape != (rows, bytes_per_row(kind, columns)):
        raise ValueError(f"{kind} [{rows}, {columns}] cannot be stored as {blocks.dtype} {list(blocks.shape)}")
    _, per_block, block_bytes = _SIZES[kind]
    blocks = _aligned(blocks, 4 if kind == "F32" else 2)
    if kind == "F32":
        return blocks.view(torch.float32)
    out = torch.empty(rows, columns, dtype=torch.float32, device=blocks.device) if out is None else out
    if kind in PLAIN:
        return out.copy_(blocks.view(PLAIN[kind]))
    step = max(1, _CHUNK_WEIGHTS // max(columns, 1)) if blocks.is_cpu else max(1, rows)
    for chunk, target in zip(blocks.split(step), out.split(step), strict=True):
        _write(_DECODERS[kind](chunk.reshape(-1, block_bytes)), target.view(-1, per_block))
    return out


def _write(decoded: Decoded, out_BC: torch.Tensor) -> None:
    """Write scale * q + offset."""
    q_BC, scale_BS, offset_BS = decoded
    parts = out_BC.copy_(q_BC).unflatten(1, (scale_BS.shape[1], -1)).mul_(scale_BS[:, :, None])
    if offset_BS is not None:
        parts.add_(offset_BS[:, :, None])


def require_supported(kind: str) -> None:
    """Raise BaseCheckpointError for a format that is not in `SUPPORTED`."""
    if kind not in SUPPORTED:
        raise BaseCheckpointError(
            f"Weights are in the format {kind}, which is not supported; it must be one of {', '.join(sorted(SUPPORTED))}.",
            code="unsupported_quantisation",
            suggestions=["Use a GGUF file of another quantisation, such as Q8_0 or Q4_K_M"],
        )


def bytes_per_row(kind: str, columns: int) -> int:
    """Return the bytes of one row.

    Raises:
        ValueError: the columns do not fill whole blocks.
    """
    _, per_block, block_bytes = _SIZES[kind]
    if columns % per_block:
        raise ValueError(f"{columns} columns must be a multiple of {per_block}, the block size of {kind}")
    return columns // per_block * block_bytes


def _aligned(blocks: torch.Tensor, size: int) -> torch.Tensor:
    """Return the bytes aligned for elements of `size`: a copy if they are unaligned in their file."""
    is_aligned = blocks.data_ptr() % size == 0 and blocks.storage_offset() % size == 0 and blocks.stride(-1) == 1
    return (
        blocks if is_aligned and blocks.stride(0) % size == 0 else blocks.clone(memory_format=torch.contiguous_format)
    )


def _each(byte: int) -> int:
    """Return a 64-bit word that repeats a byte, as a signed integer."""
    return int.from_bytes(bytes([byte] * 8), "little", signed=True)


def _packed(bytes_BN: torch.Tensor, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """View the bytes of each block as words."""
    # A clone, because contiguous() would leave a single block at an offset that is unaligned for words.
    return bytes_BN.clone(memory_format=torch.contiguous_format).view(dtype)


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """Return the float16 at byte `start` of each block in float32, [B, 1]."""
    return blocks[:, start : start + 2].view(torch.float16).float()


def _nibbles(words: torch.Tensor) -> torch.Tensor:
    """Return the low nibbles of the bytes, then the high ones, along the last axis."""
    return torch.cat((words & _each(0x0F), (words >> 4).bitwise_and_(_each(0x0F))), -1)


def _spread(bytes_BN: torch.Tensor) -> torch.Tensor:
    """Return words [B, N] whose byte i is 16 if bit i of the byte is set, else 0."""
    byte = torch.arange(256, device=bytes_BN.device)[:, None]
    bits = (byte >> torch.arange(8, device=bytes_BN.device)) & 1
    words = (bits << 4).to(torch.uint8).view(torch.int64).flatten()
    return words.index_select(0, _packed(bytes_BN, torch.uint8).flatten().int()).view(bytes_BN.shape)


def _bits(words: torch.Tensor, groups: int, width: int) -> torch.Tensor:
    """Return [..., groups, words]: group g has bits g * width and following of each byte, moved to bit 4."""
    mask = _each(((1 << width) - 1) << 4)
    shifts = [4 - group * width for group in range(groups)]
    return torch.stack([(words << by if by > 0 else words >> -by).bitwise_and_(mask) for by in shifts], -2)


def _q4_0(blocks: torch.Tensor) -> Decoded:
    """d, 16 bytes of nibbles: d * (q - 8)."""
    q = _nibbles(_packed(blocks[:, 2:])).view(torch.int8).sub_(8)
    return Decoded(q, _half(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> Decoded:
    """d, m, 16 bytes of nibbles: d * q + m."""
    q = _nibbles(_packed(blocks[:, 4:])).view(torch.uint8)
    return Decoded(q, _half(blocks, 0), _half(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> Decoded:
    """d, 4 bytes of fifth bits, 16 bytes of nibbles: d * (q - 16)."""
    q = _nibbles(_packed(blocks[:, 6:])).bitwise_or_(_spread(blocks[:, 2:6]))
    return Decoded(q.view(torch.int8).sub_(16), _half(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> Decoded:
    """d, m, 4 bytes of fifth bits, 16 bytes of nibbles: d * q + m."""
    q = _nibbles(_packed(blocks[:, 8:])).bitwise_or_(_spread(blocks[:, 4:8]))
    return Decoded(q.view(torch.uint8), _half(blocks, 0), _half(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> Decoded:
    """d, 32 signed bytes: d * q."""
    return Decoded(blocks[:, 2:].view(torch.int8), _half(blocks, 0))


def _q4_k(blocks: torch.Tensor) -> Decoded:
    """d, dmin, 12 bytes of scales, 4 x 32 bytes of nibbles, for 8 parts: d * scale * q - dmin * min."""
    q = _nibbles(_packed(blocks[:, 16:]).view(-1, 4, 4)).view(torch.uint8)
    return Decoded(q.view(-1, 256), *_k_scales(blocks))


def _q5_k(blocks: torch.Tensor) -> Decoded:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles: bit s of each is of part s."""
    low = _nibbles(_packed(blocks[:, 48:]).view(-1, 4, 4)).view(-1, 8, 4)
    q = low.bitwise_or_(_bits(_packed(blocks[:, 16:48]), 8, 1)).view(torch.uint8)
    return Decoded(q.view(-1, 256), *_k_scales(blocks))


def _q6_k(blocks: torch.Tensor) -> Decoded:
    """2 x 64 bytes of nibbles, 2 x 32 bytes of higher bits, 16 signed scales, d: d * scale * (q - 32).

    The q of each half are four groups of 32: low nibbles of its first and last 32 bytes, then their high ones.
    """
    low = _nibbles(_packed(blocks[:, :128]).view(-1, 2, 8)).view(-1, 2, 4, 4)
    q = low.bitwise_or_(_bits(_packed(blocks[:, 128:192]).view(-1, 2, 4), 4, 2)).view(torch.int8).sub_(32)
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))
    return Decoded(q.view(-1, 256), scale)


def _k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return scale and offset of the 8 parts of a Q4_K or Q5_K block.

    Three words of four bytes: six bits of scale, six of min for parts 0 to 3; for parts 4 to 7 a nibble of each in the
    third word, scale lower, and their two higher bits on top of the first two words.
    """
    first, second, third = _packed(blocks[:, 4:16], torch.int32).split(1, 1)
    scale = torch.cat((first & 0x3F3F3F3F, (third & 0x0F0F0F0F) | ((first >> 2) & 0x30303030)), 1)
    least = torch.cat((second & 0x3F3F3F3F, ((third >> 4) & 0x0F0F0F0F) | ((second >> 2) & 0x30303030)), 1)
    scale_BS, least_BS = scale.view(torch.uint8).float(), least.view(torch.uint8).float()
    return scale_BS.mul_(_half(blocks, 0)), least_BS.mul_(_half(blocks, 2)).neg_()


_DECODERS: dict[str, Callable[[torch.Tensor], Decoded]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
SUPPORTED = frozenset(PLAIN) | frozenset(_DECODERS)
_SIZES = {kind[0]: kind for kind in GGML_TYPES.values()}
