"""Frozen weights as their files have them, memory-mapped; one matrix at a time becomes float32 when it is computed with.

A mapped page belongs to the operating system's cache: it counts once for all processes, is never written, and goes when
memory is short.

T tokens, O output features or rows, I input features or columns, N chosen rows
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from peft_core.base_models.checkpoint_info import Checkpoint, TensorInfo, join_some, unusable
from peft_core.base_models.gguf_model import hugging_face_name, permuted_heads
from peft_core.errors import HeaderError
from peft_core.modeling.ggml import SUPPORTED, dequantise
from peft_core.modeling.memory import madvise_pageout

# Weights of a large matrix: 4 MB in float32, which stay in a cache, and in memory that the allocator has already.
_UNPACKED_AT_ONCE = 1 << 20
_KIND_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """A frozen weight W [O, I] in its stored form: bytes, and how to read them."""

    blocks: torch.Tensor
    """uint8 [O, bytes of a row]; bfloat16 [O, I] of a matrix that was moved to a device to be computed with so."""

    kind: str
    """ggml's name of the format, one of `ggml.SUPPORTED`."""

    columns: int

    heads: int | None = None
    """The rows of each of so many heads are interleaved, as llama.cpp's converter leaves q and k: the two halves of a head
    in turn. None: they are in order."""

    in_bfloat16: bool = False
    """Products are computed in bfloat16, summed in float32: W is of the kind BF16, and x is rounded. Where a device has units
    for it that is several times faster; elsewhere it is slower."""

    mapped: bool = False
    """It lies in a file, whose pages are read when they are needed."""

    @classmethod
    def of(cls, weights_OI: torch.Tensor) -> QuantisedMatrix:
        """Weights in memory, float32, float16 or bfloat16; shared, not copied, where each row is contiguous."""
        if weights_OI.dtype not in _KIND_OF or weights_OI.dim() != 2:
            raise ValueError(
                f"not a matrix of float32, float16 or bfloat16: {weights_OI.dtype}, {weights_OI.dim()} axes",
            )
        weights_OI = weights_OI.detach() if weights_OI.stride(1) == 1 else weights_OI.detach().contiguous()
        return cls(weights_OI.view(torch.uint8), _KIND_OF[weights_OI.dtype], weights_OI.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.blocks), self.columns

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form."""
        return self.blocks.nbytes

    @property
    def bfloat16(self) -> torch.Tensor:
        """W [O, I] where it is `in_bfloat16`: the stored weights themselves."""
        return self.blocks.view(torch.bfloat16)

    def whole(self) -> torch.Tensor:
        """W in float32 [O, I], not to be written to: of float32 storage it is the stored weights themselves."""
        return self._unpacked(self._in_order())

    def times(
        self,
        x_TI: torch.Tensor,
        bias_O: torch.Tensor | None = None,
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """W x + bias: float32 [T, O] of float32 [T, I], in `out` where that is given."""
        out_TO = torch.empty(len(x_TI), len(self.blocks), device=x_TI.device) if out is None else out
        if self.in_bfloat16:
            out_TO.copy_(linear(x_TI.bfloat16(), self.bfloat16))
        else:
            for start, stop in self._parts():
                torch.mm(x_TI, self._part(start, stop).T, out=out_TO[:, start:stop])
        return out_TO if bias_O is None else out_TO.add_(bias_O)

    def matmul_t(self, grad_TO: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """The gradient of x where `grad_TO` is that of W x: float32 [T, I], added to `into` if given."""
        if self.in_bfloat16:
            grad_TI = grad_TO.bfloat16() @ self.bfloat16
            return grad_TI.float() if into is None else into.add_(grad_TI)
        for start, stop in self._parts():
            part_PI = self._part(start, stop)
            if into is None:
                into = grad_TO[:, start:stop] @ part_PI
            else:
                into.addmm_(grad_TO[:, start:stop], part_PI)
        return into  # type: ignore[return-value]  # a matrix has rows

    def _parts(self) -> list[tuple[int, int]]:
        """Ranges of rows to unpack one after the other: a large W, such as an output head, is never there as a whole."""
        if self.kind == "F32" or len(self.blocks) * self.columns <= 2 * _UNPACKED_AT_ONCE:
            return [(0, len(self.blocks))]
        step = max(1, _UNPACKED_AT_ONCE // self.columns)
        return [(start, min(start + step, len(self.blocks))) for start in range(0, len(self.blocks), step)]

    def _part(self, start: int, stop: int) -> torch.Tensor:
        """W[start:stop] in float32, for as long as this thread unpacks no other."""
        if self.kind == "F32" or not self.blocks.is_cpu:
            return self.rows(start, stop)
        return self.rows(start, stop, _room.of(stop - start, self.columns))

    def rounded(self) -> QuantisedMatrix:
        """For products in bfloat16: a copy in memory, or itself where it is stored so."""
        in_place = self.blocks.storage_offset() % 2 == 0  # a file may begin with a header of any length
        if self.kind == "BF16" and self.heads is None and in_place:
            return replace(self, in_bfloat16=True)
        copy = replace(QuantisedMatrix.of(self.whole().bfloat16()), in_bfloat16=True)
        self.madvise_pageout()
        return copy

    def on(self, device: torch.device) -> QuantisedMatrix:
        """A copy on another device. What is bfloat16 is no bytes there: not every device looks at memory as another type."""
        blocks = self.bfloat16 if self.in_bfloat16 else self.blocks
        copy = replace(self, blocks=blocks.to(device, copy=True), mapped=False)
        self.madvise_pageout()
        return copy

    def madvise_pageout(self) -> None:
        """It is not needed for now: where it lies in a file, its pages need not count as memory of this process."""
        if self.mapped:
            madvise_pageout(self.blocks.data_ptr(), self.nbytes)

    def rows(self, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """W[start:stop] in float32, not to be written to; in `out`, or elsewhere where it need not be unpacked."""
        if self.heads is not None:
            chosen_N = torch.arange(*slice(start, stop).indices(len(self.blocks)), device=self.blocks.device)
            return self.select(chosen_N, out)
        return self._unpacked(self.blocks[start:stop], out)

    def select(self, indices_N: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """W[indices] in float32 [N, I], in `out`, or elsewhere as `rows`. Only the pages of these rows are read."""
        if self.heads is not None:
            size = len(self.blocks) // self.heads
            within = indices_N % size
            indices_N = indices_N - within + 2 * (within % (size // 2)) + within // (size // 2)
        return self._unpacked(self.blocks.index_select(0, indices_N), out)

    def _in_order(self) -> torch.Tensor:
        """The rows in order, as they are stored: smaller than what they become."""
        if self.heads is None:
            return self.blocks
        halves: torch.Tensor = self.blocks.unflatten(0, (self.heads, -1, 2))
        return halves.transpose(1, 2).flatten(0, 2)

    def _unpacked(self, blocks: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Some of the rows in float32."""
        if self.in_bfloat16:
            return blocks.view(torch.bfloat16).float()
        return dequantise(blocks, self.kind, self.columns, out)


class _Room(threading.local):
    """Where a thread unpacks the weights that it computes with: fresh pages for each take an eighth of a training that spares
    memory.
    """

    def __init__(self) -> None:
        self._weights = torch.empty(0, dtype=torch.float32)

    def of(self, rows: int, columns: int) -> torch.Tensor:
        if len(self._weights) < rows * columns:
            with torch.inference_mode(mode=False):  # else it could be written to in that mode alone
                self._weights = torch.empty(rows * columns, dtype=torch.float32)
        return self._weights[: rows * columns].view(rows, columns)


_room = _Room()


class StoredWeights(NamedTuple):
    """All weights of a base by Hugging Face's parameter names; an output head that is the embedding is left out."""

    matrices: dict[str, QuantisedMatrix]

    vectors: dict[str, torch.Tensor]
    """Norms and biases in float32, copied: a small tensor that lies in a mapped file keeps all of its pages resident."""


def open_stored(checkpoint: Checkpoint) -> StoredWeights:
    """Map the files of a base. Nothing but the vectors is read or copied.

    Raises:
        BaseModelError: tensors in a format that cannot be computed with, or of more than two axes.
        HeaderError: a file cannot be mapped, or has become shorter since its header was read.
    """
    wanted = [
        (path, tensor, name)
        for path, tensor in checkpoint.stored
        if (name := _parameter(checkpoint, tensor)) in checkpoint.shapes
    ]
    _check(checkpoint, [tensor for _, tensor, _ in wanted])
    ends: dict[Path, int] = {}
    for path, tensor, _ in wanted:
        ends[path] = max(ends.get(path, 0), tensor.start + tensor.size)
    files = {path: _mapped(path, end) for path, end in ends.items()}
    stored = StoredWeights({}, {})
    for path, tensor, name in wanted:
        raw = files[path][tensor.start : tensor.start + tensor.size]
        heads = permuted_heads(checkpoint.config, tensor.name) if checkpoint.format == "gguf" else None
        if len(tensor.shape) == 1:
            stored.vectors[name] = _vector(raw, tensor, heads)
        elif tensor.dtype == "F64":
            stored.matrices[name] = QuantisedMatrix.of(_from_float64(raw).view(tensor.shape))
        else:
            blocks = raw.view(tensor.shape[0], -1)
            stored.matrices[name] = QuantisedMatrix(blocks, tensor.dtype, tensor.shape[1], heads, mapped=True)
    return stored


def _parameter(checkpoint: Checkpoint, tensor: TensorInfo) -> str:
    return tensor.name if checkpoint.format == "huggingface" else hugging_face_name(tensor.name) or ""


def _check(checkpoint: Checkpoint, tensors: list[TensorInfo]) -> None:
    readable = SUPPORTED | {"F64"} if checkpoint.format == "huggingface" else SUPPORTED
    odd = [f"{tensor.name} ({tensor.dtype})" for tensor in tensors if tensor.dtype not in readable]
    if odd:
        raise unusable(
            checkpoint.path,
            f"it has weights in formats that cannot be computed with: {join_some(odd)}",
            "Use a GGUF file of another quantisation, such as Q8_0 or Q4_K_M, or the model's Hugging Face directory",
        )
    deep = [f"{tensor.name} {tensor.shape}" for tensor in tensors if len(tensor.shape) not in (1, 2)]
    if deep:
        raise unusable(checkpoint.path, f"it has weights that are neither matrices nor vectors: {join_some(deep)}")


def _mapped(path: Path, end: int) -> torch.Tensor:
    """The first `end` bytes of a file, mapped. Private: whoever wrote to them would change a copy, not the file."""
    try:
        size = path.stat().st_size
        if size >= end:
            return torch.from_file(str(path), shared=False, size=end, dtype=torch.uint8)
    except (OSError, RuntimeError) as error:
        raise HeaderError(path, "cannot be mapped into memory") from error
    raise HeaderError(path, f"ends at byte {size}, before its last tensor does; it has changed")


def _vector(raw: torch.Tensor, tensor: TensorInfo, heads: int | None) -> torch.Tensor:
    raw = raw.clone()
    if tensor.dtype == "F64":
        return _from_float64(raw)
    values = dequantise(raw[None], tensor.dtype, tensor.shape[0])[0]
    return values if heads is None else values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten()


def _from_float64(raw: torch.Tensor) -> torch.Tensor:
    return raw.clone().view(torch.float64).float()
