"""Frozen weight matrices: quantised, 16-bit or float32 bytes that are dequantised on use, and bf16 matrices.

A base model is memory-mapped, and one matrix at a time becomes float32 when a product needs it. Mapped pages belong to the
operating system's page cache: all processes share them, they are never dirty, and the kernel can drop them when memory is
short.

T tokens, O output features (rows), I input features (columns), N chosen rows, P rows of one chunk
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from peft_core.base_models.checkpoint_info import Checkpoint, TensorInfo, join_some, unusable
from peft_core.base_models.gguf_model import hugging_face_name, permuted_heads
from peft_core.errors import HeaderError
from peft_core.modeling.ggml import SUPPORTED, dequantise
from peft_core.modeling.memory import madvise_pageout

# Weights dequantised at a time from a large matrix: 4 MB of float32, which fits a CPU cache.
_CHUNK_WEIGHTS = 1 << 20
_KIND_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class FrozenMatrix(ABC):
    """A frozen weight W [O, I] that multiplies float32 activations."""

    product_dtype: torch.dtype
    """The type that products are computed in."""

    def __init__(self, storage: torch.Tensor, *, mapped: bool) -> None:
        self.storage = storage
        """W in its stored form; one row of the tensor for each row of W."""
        self.mapped = mapped
        """Whether `storage` is a view of a memory-mapped file."""

    @property
    @abstractmethod
    def kind(self) -> str:
        """Storage format by ggml's name, one of `ggml.SUPPORTED`."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(O, I)."""

    @property
    def device(self) -> torch.device:
        return self.storage.device

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form."""
        return self.storage.nbytes

    @abstractmethod
    def dequantise_all(self) -> torch.Tensor:
        """Return W in float32 [O, I]. Do not write to it: float32 storage is returned without a copy."""

    @abstractmethod
    def select(self, indices_N: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return W[indices] in float32 [N, I]; reads only the pages of these rows. Dequantised formats are written to `out`."""

    @abstractmethod
    def matmul(
        self, x_TI: torch.Tensor, bias_O: torch.Tensor | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return W x + bias in float32 [T, O] for a float32 x [T, I], in `out` if given."""

    @abstractmethod
    def matmul_t(self, grad_TO: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """Return the gradient of x in float32 [T, I], given the gradient of W x. It is added to `into` if given."""

    @abstractmethod
    def to_bf16(self) -> Bf16Matrix:
        """Return W for products in bf16: a copy in memory, or a view where W is stored as bf16 already."""

    @abstractmethod
    def to_device(self, device: torch.device) -> FrozenMatrix:
        """Return a copy on another device."""

    def madvise_pageout(self) -> None:
        """Drop this matrix's pages from the process's resident memory if it is mapped from a file."""
        if self.mapped:
            madvise_pageout(self.storage.data_ptr(), self.nbytes)


class Bf16Matrix(FrozenMatrix):
    """W in bf16, multiplied in bf16 with sums in float32.

    Several times faster than float32 on devices with bf16 units, slower elsewhere.
    """

    product_dtype = torch.bfloat16

    def __init__(self, weights_OI: torch.Tensor, *, mapped: bool = False) -> None:
        super().__init__(weights_OI.detach(), mapped=mapped)

    @property
    def kind(self) -> str:
        return "BF16"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.storage.shape
        return rows, columns

    def dequantise_all(self) -> torch.Tensor:
        return self.storage.float()

    def select(self, indices_N: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        del out
        return self.storage.index_select(0, indices_N).float()

    def matmul(
        self, x_TI: torch.Tensor, bias_O: torch.Tensor | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        out_TO = torch.empty(len(x_TI), len(self.storage), device=x_TI.device) if out is None else out
        out_TO.copy_(linear(x_TI.bfloat16(), self.storage))
        return out_TO if bias_O is None else out_TO.add_(bias_O)

    def matmul_t(self, grad_TO: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        grad_TI = grad_TO.bfloat16() @ self.storage
        return grad_TI.float() if into is None else into.add_(grad_TI)

    def to_bf16(self) -> Bf16Matrix:
        return self

    def to_device(self, device: torch.device) -> Bf16Matrix:
        copy = Bf16Matrix(self.storage.to(device, copy=True))
        self.madvise_pageout()
        return copy


class QuantisedMatrix(FrozenMatrix):
    """W as bytes in one of ggml's formats (float32 and 16-bit formats included), dequantised for each product in float32."""

    product_dtype = torch.float32

    def __init__(
        self, blocks: torch.Tensor, kind: str, columns: int, heads: int | None = None, *, mapped: bool = False
    ) -> None:
        """`blocks`: uint8 [O, bytes of a row]. `heads`: llama.cpp's converter interleaved the two halves of each of this many
        heads in the rows of q and k; None if the rows are in order.
        """
        super().__init__(blocks, mapped=mapped)
        self._kind = kind
        self._columns = columns
        self._heads = heads

    @classmethod
    def from_tensor(cls, weights_OI: torch.Tensor) -> QuantisedMatrix:
        """Wrap weights in memory (float32, float16 or bf16); shares them unless a row is not contiguous.

        Raises:
            ValueError: another type, or not a matrix.
        """
        if weights_OI.dtype not in _KIND_OF or weights_OI.dim() != 2:
            raise ValueError(
                f"weights must be a matrix of float32, float16 or bfloat16, not {weights_OI.dtype} "
                f"with {weights_OI.dim()} axes"
            )
        weights_OI = weights_OI.detach() if weights_OI.stride(1) == 1 else weights_OI.detach().contiguous()
        return cls(weights_OI.view(torch.uint8), _KIND_OF[weights_OI.dtype], weights_OI.shape[1])

    @property
    def kind(self) -> str:
        return self._kind

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.storage), self._columns

    def dequantise_all(self) -> torch.Tensor:
        return dequantise(self._in_row_order(), self._kind, self._columns)

    def select(self, indices_N: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        if self._heads is not None:
            size = len(self.storage) // self._heads
            within = indices_N % size
            indices_N = indices_N - within + 2 * (within % (size // 2)) + within // (size // 2)
        return dequantise(self.storage.index_select(0, indices_N), self._kind, self._columns, out)

    def rows(self, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return W[start:stop] in float32, in `out` unless the storage is float32. Do not write to it."""
        if self._heads is not None:
            chosen_N = torch.arange(*slice(start, stop).indices(len(self.storage)), device=self.device)
            return self.select(chosen_N, out)
        return dequantise(self.storage[start:stop], self._kind, self._columns, out)

    def matmul(
        self, x_TI: torch.Tensor, bias_O: torch.Tensor | None = None, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        out_TO = torch.empty(len(x_TI), len(self.storage), device=x_TI.device) if out is None else out
        for start, stop in self._chunks():
            torch.mm(x_TI, self._chunk(start, stop).T, out=out_TO[:, start:stop])
        return out_TO if bias_O is None else out_TO.add_(bias_O)

    def matmul_t(self, grad_TO: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        for start, stop in self._chunks():
            chunk_PI = self._chunk(start, stop)
            if into is None:
                into = grad_TO[:, start:stop] @ chunk_PI
            else:
                into.addmm_(grad_TO[:, start:stop], chunk_PI)
        return into  # type: ignore[return-value]  # a matrix has rows, so the loop runs

    def to_bf16(self) -> Bf16Matrix:
        is_aligned = self.storage.storage_offset() % 2 == 0  # a file may begin with a header of any length
        if self._kind == "BF16" and self._heads is None and is_aligned:
            return Bf16Matrix(self.storage.view(torch.bfloat16), mapped=self.mapped)
        copy = Bf16Matrix(self.dequantise_all().bfloat16())
        self.madvise_pageout()
        return copy

    def to_device(self, device: torch.device) -> QuantisedMatrix:
        copy = QuantisedMatrix(self.storage.to(device, copy=True), self._kind, self._columns, self._heads)
        self.madvise_pageout()
        return copy

    def _chunks(self) -> list[tuple[int, int]]:
        """Ranges of rows to dequantise one after the other, so that a large W is never dequantised completely."""
        if self._kind == "F32" or len(self.storage) * self._columns <= 2 * _CHUNK_WEIGHTS:
            return [(0, len(self.storage))]
        step = max(1, _CHUNK_WEIGHTS // self._columns)
        return [(start, min(start + step, len(self.storage))) for start in range(0, len(self.storage), step)]

    def _chunk(self, start: int, stop: int) -> torch.Tensor:
        """Return W[start:stop] in float32. On a CPU it is valid until this thread dequantises the next chunk."""
        if self._kind == "F32" or not self.storage.is_cpu:
            return self.rows(start, stop)
        return self.rows(start, stop, _scratch.buffer(stop - start, self._columns))

    def _in_row_order(self) -> torch.Tensor:
        """Return the stored rows in order. Reordering the stored form moves fewer bytes than reordering float32."""
        if self._heads is None:
            return self.storage
        halves: torch.Tensor = self.storage.unflatten(0, (self._heads, -1, 2))
        return halves.transpose(1, 2).flatten(0, 2)


class _Scratch(threading.local):
    """A thread's buffer for dequantised weights: fresh pages for each product took an eighth of a low-memory run's time."""

    def __init__(self) -> None:
        self._weights = torch.empty(0, dtype=torch.float32)

    def buffer(self, rows: int, columns: int) -> torch.Tensor:
        if len(self._weights) < rows * columns:
            with torch.inference_mode(mode=False):  # an inference tensor could not be written to outside inference mode
                self._weights = torch.empty(rows * columns, dtype=torch.float32)
        return self._weights[: rows * columns].view(rows, columns)


_scratch = _Scratch()


# --- The weights of a base model ---


class StoredWeights(NamedTuple):
    """All weights of a base model by Hugging Face's parameter names. A tied output head is not listed."""

    matrices: dict[str, QuantisedMatrix]

    vectors: dict[str, torch.Tensor]
    """Norms and biases in float32, copied: a view of a mapped file would keep its pages resident."""


def open_stored(checkpoint: Checkpoint) -> StoredWeights:
    """Map the files of a base model. Only vectors are read and copied.

    Raises:
        BaseCheckpointError: a tensor has an unsupported format, or more than two axes.
        HeaderError: a file cannot be mapped, or has become shorter since its header was read.
    """
    tensors = [
        (path, tensor, name)
        for path, tensor in checkpoint.stored
        if (name := _parameter_name(checkpoint, tensor)) in checkpoint.shapes
    ]
    _check_formats(checkpoint, [tensor for _, tensor, _ in tensors])
    ends: dict[Path, int] = {}
    for path, tensor, _ in tensors:
        ends[path] = max(ends.get(path, 0), tensor.start + tensor.size)
    files = {path: _map_file(path, end) for path, end in ends.items()}
    stored = StoredWeights({}, {})
    for path, tensor, name in tensors:
        raw = files[path][tensor.start : tensor.start + tensor.size]
        heads = permuted_heads(checkpoint.config, tensor.name) if checkpoint.format == "gguf" else None
        if len(tensor.shape) == 1:
            stored.vectors[name] = _vector(raw, tensor, heads)
        elif tensor.dtype == "F64":
            stored.matrices[name] = QuantisedMatrix.from_tensor(_from_float64(raw).view(tensor.shape))
        else:
            blocks = raw.view(tensor.shape[0], -1)
            stored.matrices[name] = QuantisedMatrix(blocks, tensor.dtype, tensor.shape[1], heads, mapped=True)
    return stored


def _parameter_name(checkpoint: Checkpoint, tensor: TensorInfo) -> str:
    return tensor.name if checkpoint.format == "huggingface" else hugging_face_name(tensor.name) or ""


def _check_formats(checkpoint: Checkpoint, tensors: list[TensorInfo]) -> None:
    supported = SUPPORTED | {"F64"} if checkpoint.format == "huggingface" else SUPPORTED
    unsupported = [f"{tensor.name} ({tensor.dtype})" for tensor in tensors if tensor.dtype not in supported]
    if unsupported:
        raise unusable(
            checkpoint.path,
            f"it has weights in unsupported formats: {join_some(unsupported)}",
            "Use a GGUF file of another quantisation, such as Q8_0 or Q4_K_M, or the model's Hugging Face directory",
        )
    deep = [f"{tensor.name} {tensor.shape}" for tensor in tensors if len(tensor.shape) not in (1, 2)]
    if deep:
        raise unusable(checkpoint.path, f"it has weights that are neither matrices nor vectors: {join_some(deep)}")


def _map_file(path: Path, end: int) -> torch.Tensor:
    """Map the first `end` bytes of a file. The mapping is private: a write would change a copy, not the file."""
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
