"""Linear layers with LoRA that read the same input, computed together: y = W x + bias + s B A x of each, side by side.

PEFT computes W x, B A x, the scaling and the sum one by one for each layer, and autograd keeps each result. Here A of all
layers is one product; in bfloat16, so is all that comes after it.

T tokens, I input features, O output features and R ranks of all layers together, X = I + R
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from peft_core.modeling.quantised import QuantisedMatrix

Adapters = Sequence[torch.Tensor | None]
"""A [rank, I] and B [outputs, rank] of each layer in turn; None, None for a layer without."""


class Layer(NamedTuple):
    """The frozen half of a linear layer, and the shape of its adapter; rank 0: it has none."""

    W: QuantisedMatrix
    bias_O: torch.Tensor | None
    rank: int
    scaling: float


class Projections(ABC):
    """Some layers, their frozen weights in one form or another. Inputs, outputs and gradients are of `dtype`."""

    dtype: torch.dtype

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.scalings = [layer.scaling for layer in layers]
        self.inputs = layers[0].W.shape[1]
        self.sizes = [layer.W.shape[0] for layer in layers]
        self.outputs = _ranges(self.sizes)  # of each layer, in O
        self.ranks = _ranges([layer.rank for layer in layers])  # of each layer, in R
        self.rank = self.ranks[-1].stop

    @abstractmethod
    def room(self, x_TI: torch.Tensor) -> torch.Tensor:
        """[T, I] for an input of this shape to be written to, with room behind each row for what `forward` needs."""

    def placed(self, x_TI: torch.Tensor) -> torch.Tensor:
        """An input that exists already, with that room."""
        return self.room(x_TI).copy_(x_TI)

    @abstractmethod
    def _product(self, x_TI: torch.Tensor, down_TR: torch.Tensor, adapters: Adapters) -> torch.Tensor:
        """W x + bias + s B (A x) of all layers, [T, O]; `x_TI` as `room` gave it."""

    @abstractmethod
    def _product_transposed(
        self,
        grad_TO: torch.Tensor,
        adapters: Adapters,
        *,
        grad_x: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The gradients of x by way of W alone, and of A x: [T, I] if `grad_x`, [T, R]."""

    def forward(self, x_TI: torch.Tensor, adapters: Adapters) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs [T, O] of all layers side by side, and A x [T, R] for `backward`. `x_TI` as `room` gave it."""
        down_TR = x_TI @ self._downward(adapters).T if self.rank else x_TI.new_empty(len(x_TI), 0)
        return self._product(x_TI, down_TR, adapters), down_TR

    def backward(
        self,
        grad_TO: torch.Tensor,
        x_TI: torch.Tensor,
        down_TR: torch.Tensor,
        adapters: Adapters,
        *,
        grad_x: bool,
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Gradients of x, if `grad_x`, and of the adapters; theirs in float32. After the `forward` of the same adapters."""
        grad_TI, grad_down_TR = self._product_transposed(grad_TO, adapters, grad_x=grad_x)
        if self.rank == 0:
            return grad_TI, [None] * len(adapters)
        if grad_TI is not None:
            grad_TI = torch.addmm(grad_TI, grad_down_TR, self._downward(adapters))
        grad_A_RI = (grad_down_TR.T @ x_TI).float()
        grads: list[torch.Tensor | None] = []
        for A, scaling, outputs, ranks in zip(adapters[::2], self.scalings, self.outputs, self.ranks, strict=True):
            if A is None:
                grads += [None, None]
                continue
            grad_B = (grad_TO[:, outputs].T @ down_TR[:, ranks]).float()
            grads += [grad_A_RI[ranks], grad_B.mul_(scaling)]
        return grad_TI, grads

    def _downward(self, adapters: Adapters) -> torch.Tensor:
        return torch.cat([A for A in adapters[::2] if A is not None]).to(self.dtype)


class SeparateLora(Projections):
    """Weights as they are stored, in files too: layer after layer, in float32."""

    dtype = torch.float32

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self._layers = tuple(layers)

    def room(self, x_TI: torch.Tensor) -> torch.Tensor:
        return torch.empty(x_TI.shape, device=x_TI.device)

    def placed(self, x_TI: torch.Tensor) -> torch.Tensor:
        return x_TI

    def _product(self, x_TI: torch.Tensor, down_TR: torch.Tensor, adapters: Adapters) -> torch.Tensor:
        out_TO = torch.empty(len(x_TI), self.outputs[-1].stop, device=x_TI.device)
        for layer, outputs, ranks, B in zip(self._layers, self.outputs, self.ranks, adapters[1::2], strict=True):
            own = layer.W.times(x_TI, layer.bias_O, out=out_TO[:, outputs])
            if B is not None:
                own.addmm_(down_TR[:, ranks], B.T, alpha=layer.scaling)
        return out_TO

    def _product_transposed(
        self,
        grad_TO: torch.Tensor,
        adapters: Adapters,
        *,
        grad_x: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        grad_TI: torch.Tensor | None = None
        grad_down_TR = torch.empty(len(grad_TO), self.rank, device=grad_TO.device)
        for layer, outputs, ranks, B in zip(self._layers, self.outputs, self.ranks, adapters[1::2], strict=True):
            if grad_x:
                grad_TI = layer.W.matmul_t(grad_TO[:, outputs], grad_TI)
            if B is not None:
                grad_down_TR[:, ranks] = (grad_TO[:, outputs] @ B).mul_(layer.scaling)
        return grad_TI, grad_down_TR


class ConcatenatedLora(Projections):
    """Weights in bfloat16, in one matrix [W | s B]: with [x | A x] that is all of y, and its transpose all of the gradient.

    Products this slim take as long as their memory does; as columns of a large one they cost next to nothing, while ranks are
    small against the inputs. `forward` writes B into it anew.
    """

    dtype = torch.bfloat16

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        device = layers[0].W.blocks.device
        self._W_OX = torch.zeros(
            self.outputs[-1].stop,
            self.inputs + self.rank,
            dtype=torch.bfloat16,
            device=device,
        )  # B of one layer is nothing to the others
        for layer, outputs in zip(layers, self.outputs, strict=True):
            self._W_OX[outputs, : self.inputs] = layer.W.bfloat16
        biases = [
            torch.zeros(layer.W.shape[0], device=device) if layer.bias_O is None else layer.bias_O for layer in layers
        ]
        self._bias_O = torch.cat(biases).bfloat16() if any(layer.bias_O is not None for layer in layers) else None

    def stored(self) -> list[QuantisedMatrix]:
        """W of each layer, in the memory that it has here."""
        return [
            replace(QuantisedMatrix.of(self._W_OX[outputs, : self.inputs]), in_bfloat16=True)
            for outputs in self.outputs
        ]

    def room(self, x_TI: torch.Tensor) -> torch.Tensor:
        x_TX = torch.empty(len(x_TI), self.inputs + self.rank, dtype=self.dtype, device=x_TI.device)
        return x_TX[:, : self.inputs]

    def _product(self, x_TI: torch.Tensor, down_TR: torch.Tensor, adapters: Adapters) -> torch.Tensor:
        x_TX = x_TI.as_strided((len(x_TI), self.inputs + self.rank), x_TI.stride())
        x_TX[:, self.inputs :] = down_TR
        for B, scaling, outputs, ranks in zip(adapters[1::2], self.scalings, self.outputs, self.ranks, strict=True):
            if B is not None:
                torch.mul(B, scaling, out=self._W_OX[outputs, self.inputs :][:, ranks])
        return linear(x_TX, self._W_OX, self._bias_O)

    def _product_transposed(
        self,
        grad_TO: torch.Tensor,
        adapters: Adapters,
        *,
        grad_x: bool,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        del adapters  # B is in the matrix
        if not grad_x:
            return None, grad_TO @ self._W_OX[:, self.inputs :]
        grad_TX = grad_TO @ self._W_OX
        return grad_TX[:, : self.inputs], grad_TX[:, self.inputs :].contiguous()


def project(layers: Sequence[Layer]) -> Projections:
    """Layers that have one input, in the form that is fast for their weights."""
    return ConcatenatedLora(layers) if all(layer.W.in_bfloat16 for layer in layers) else SeparateLora(layers)


def _ranges(sizes: Sequence[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise((0, *accumulate(sizes)))]
