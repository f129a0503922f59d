"""Where a CPU keeps what a forward pass saves for its backward pass: end to end, apart from all that lives shortly.

In the heap the two lie among each other. What is freed between two saved tensors is a hole too small for the next layer, so
that a pass of the bundled base took 380 MB for 250 MB saved, and faulted its pages in anew once they had been given back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

_BLOCK_BYTES = 64 << 20  # large enough for malloc to map it by itself; pages nobody wrote to take no memory
_ALIGNED = 64  # a line of cache, as torch aligns its own


@dataclass(frozen=True)
class _Saved:
    tensor: torch.Tensor
    of_pass: int


class ActivationArena:
    """Room for the saved tensors of one forward pass at a time, which stays until this object goes.

    Every saved tensor is copied, each time it is saved: for models that save few and none twice, as blocks in bfloat16 do.
    Weights, which are there anyway, are not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {_memory(weight) for weight in (*model.parameters(), *model.buffers())}
        self._blocks: list[torch.Tensor] = []
        self._pass = 0
        self._block = self._used = 0
        self.nbytes = 0  # of what the last pass saved

    @contextmanager
    def of_one_pass(self) -> Iterator[None]:
        """What is saved within lies here until this is entered again: the backward pass comes before that."""
        self._pass += 1
        self._block = self._used = self.nbytes = 0
        with saved_tensors_hooks(self._save, self._saved):
            yield

    def _save(self, tensor: torch.Tensor) -> _Saved:
        if not tensor.is_cpu or _memory(tensor) in self._weights:
            return _Saved(tensor, self._pass)
        return _Saved(self._room_like(tensor).copy_(tensor), self._pass)

    def _saved(self, saved: _Saved) -> torch.Tensor:
        if saved.of_pass != self._pass:
            raise RuntimeError(
                f"Pass {self._pass} has taken the room of pass {saved.of_pass}, whose gradients were due.",
            )
        return saved.tensor

    def _room_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of the same shape and type, in the same order of axes."""
        like = torch.empty_like(tensor, device="meta")
        size = like.numel() * like.element_size()
        return self._room(size).view(like.dtype).as_strided(like.shape, like.stride())

    def _room(self, size: int) -> torch.Tensor:
        self.nbytes += size
        padded = -(-size // _ALIGNED) * _ALIGNED
        while self._block < len(self._blocks) and self._used + padded > len(self._blocks[self._block]):
            self._block, self._used = self._block + 1, 0
        if self._block == len(self._blocks):
            self._blocks.append(torch.empty(max(padded, _BLOCK_BYTES), dtype=torch.uint8))
        start, self._used = self._used, self._used + padded
        return self._blocks[self._block][start : start + size]


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
