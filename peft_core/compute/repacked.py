"""Quantised weights in memory: a byte each, and float32 factors. The same to the last bit, and unpacked five times faster.

ggml packs for size, and for kernels that take its blocks apart as they multiply; in torch's passes that costs 2 to 3 ns a
weight, a tenth of the time of a training. Here every q lies ready as int8, and three passes are left: convert, multiply, add.

A row is I bytes of q, its scales, and its offsets where the format has any.

O rows, I columns, S parts of a row that have factors of their own, X bytes of a row
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from peft_core.compute.ggml import AT_A_TIME, Decoded, decode, write

BYTES_PER_WEIGHT = 1.25  # at most: two factors for 32 weights, or one for 16


class Form(NamedTuple):
    """How rows are made."""

    parts: int  # S
    offsets: bool


def repack(blocks: torch.Tensor, kind: str) -> tuple[torch.Tensor, Form]:
    """uint8 [O, X] of rows in ggml's format `kind`, which has blocks."""
    rows = len(blocks)
    q_BC, *factors = (None if tensor is None else tensor.reshape(rows, -1) for tensor in decode(blocks, kind))
    joined = [tensor.contiguous().view(torch.uint8) for tensor in (q_BC, *factors) if tensor is not None]
    scale_OS, offset_OS = factors
    assert scale_OS is not None  # noqa: S101 -- every format has one
    return torch.cat(joined, dim=1), Form(scale_OS.shape[1], offsets=offset_OS is not None)


def unpack(rows_OX: torch.Tensor, form: Form, columns: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [O, I], in `out` or new memory."""
    out = torch.empty(len(rows_OX), columns, device=rows_OX.device) if out is None else out
    step = max(1, AT_A_TIME // columns) if rows_OX.is_cpu else max(1, len(rows_OX))
    for some_OX, target_OI in zip(rows_OX.split(step), out.split(step), strict=True):
        write(_decoded(some_OX, form, columns), target_OI)
    return out


def _decoded(rows_OX: torch.Tensor, form: Form, columns: int) -> Decoded:
    border = columns + 4 * form.parts
    offset_OS = rows_OX[:, border:].view(torch.float32) if form.offsets else None
    return Decoded(rows_OX[:, :columns].view(torch.int8), rows_OX[:, columns:border].view(torch.float32), offset_OS)
