"""Linear layers that share an input, with their LoRA adapters, computed together: y = W x + bias + s B A x, side by side.

LoRA (Hu et al., arXiv 2106.09685) adds a low-rank update s B A to a frozen weight W. PEFT computes W x, B A x, the scaling and
the sum one by one for each layer, and autograd saves each result. Here the A matrices of all layers are one product, and in
bf16 everything after it is one product too.

T tokens, I input features, O output features and R ranks of all layers together, X = I + R
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from peft_core.modeling.quantised import Bf16Matrix, FrozenMatrix

Adapters = Sequence[torch.Tensor | None]
"""A [rank, I] and B [outputs, rank] of each layer in turn; None, None for a layer without an adapter."""


class Layer(NamedTuple):
    """The frozen part of a linear layer, and the shape of its adapter; rank 0 means no adapter."""

    W: FrozenMatrix
    bias_O: torch.Tensor | None
    rank: int
    scaling: float


class Projections(ABC):
    """Layers that share an input. Inputs, outputs and gradients are of `dtype`."""

    dtype: torch.dtype

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.scalings = [layer.scaling for layer in layers]
        self.inputs = layers[0].W.shape[1]
        self.sizes = [layer.W.shape[0] for layer in layers]
        self.outputs = _ranges(self.sizes)  # of each layer, in O
        self.ranks = _ranges([layer.rank for layer in layers])  # of each layer, in R
        self.rank = self.ranks[-1].stop

    @abstractmethod
    def input_buffer(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Return an uninitialised buffer for `forward`, on the device of `x_TI`.

        It is [T, I] or [T, X]: write the input to its first I columns; `forward` uses the rest.
        """

    def to_buffer(self, x_TI: torch.Tensor) -> torch.Tensor:
        """Return such a buffer that holds an existing input."""
        buffer_TX = self.input_buffer(x_TI)
        buffer_TX[:, : self.inputs] = x_TI
        return buffer_TX

    @abstractmethod
    def _product(self, buffer_TX: torch.Tensor, down_TR: torch.Tensor, adapters: Adapters) -> torch.Tensor:
        """Return W x + bias + s B (A x) of all layers, [T, O]."""

    @abstractmethod
    def _product_transposed(
        self, grad_TO: torch.Tensor, adapters: Adapters, *, grad_x: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Return the gradients of x through W alone, [T, I] if `grad_x`, and of A x, [T, R]."""

    def forward(self, buffer_TX: torch.Tensor, adapters: Adapters) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs [T, O] of all layers side by side, and A x [T, R] for `backward`.

        `buffer_TX`: from `input_buffer`, with the input in its first I columns.
        """
        x_TI = buffer_TX[:, : self.inputs]
        down_TR = x_TI @ self._down_matrix(adapters).T if self.rank else x_TI.new_empty(len(x_TI), 0)
        return self._product(buffer_TX, down_TR, adapters), down_TR

    def backward(
        self, grad_TO: torch.Tensor, x_TI: torch.Tensor, down_TR: torch.Tensor, adapters: Adapters, *, grad_x: bool
    ) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:
        """Return the gradients of x (None unless `grad_x`) and of the adapters (float32).

        Call it after `forward` with the same adapters: `ConcatenatedLora` holds B from there.
        """
        grad_TI, grad_down_TR = self._product_transposed(grad_TO, adapters, grad_x=grad_x)
        if self.rank == 0:
            return grad_TI, [None] * len(adapters)
        if grad_TI is not None:
            grad_TI = torch.addmm(grad_TI, grad_down_TR, self._down_matrix(adapters))
        grad_A_RI = (grad_down_TR.T @ x_TI).float()
        grads: list[torch.Tensor | None] = []
        for A, scaling, outputs, ranks in zip(adapters[::2], self.scalings, self.outputs, self.ranks, strict=True):
            if A is None:
                grads += [None, None]
                continue
            grad_B = (grad_TO[:, outputs].T @ down_TR[:, ranks]).float()
            grads += [grad_A_RI[ranks], grad_B.mul_(scaling)]
        return grad_TI, grads

    def _down_matrix(self, adapters: Adapters) -> torch.Tensor:
        """Return the A of all layers, [R, I]."""
        return torch.cat([A for A in adapters[::2] if A is not None]).to(self.dtype)


class SeparateLora(Projections):
    """Weights in any stored form, mapped files included; one product for each layer, in float32."""

    dtype = torch.float32

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        self._layers = tuple(layers)

    def input_buffer(self, x_TI: torch.Tensor) -> torch.Tensor:
        return torch.empty(x_TI.shape, device=x_TI.device)

    def to_buffer(self, x_TI: torch.Tensor) -> torch.Tensor:
        return x_TI

    def _product(self, buffer_TX: torch.Tensor, down_TR: torch.Tensor, adapters: Adapters) -> torch.Tensor:
        x_TI = buffer_TX  # this class needs no further columns
        out_TO = torch.empty(len(x_TI), self.outputs[-1].stop, device=x_TI.device)
        for layer, outputs, ranks, B in zip(self._layers, self.outputs, self.ranks, adapters[1::2], strict=True):
            own = layer.W.matmul(x_TI, layer.bias_O, out=out_TO[:, outputs])
            if B is not None:
                own.addmm_(down_TR[:, ranks], B.T, alpha=layer.scaling)
        return out_TO

    def _product_transposed(
        self, grad_TO: torch.Tensor, adapters: Adapters, *, grad_x: bool
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
    """Weights in bf16, concatenated as [W | s B]: multiplied by [x | A x] that is y, and its transpose gives the gradients.

    A product with a slim matrix is bound by memory bandwidth; as columns of a large matrix it is almost free while ranks are
    small against the inputs. `forward` writes the current B into the matrix.
    """

    dtype = torch.bfloat16

    def __init__(self, layers: Sequence[Layer]) -> None:
        super().__init__(layers)
        device = layers[0].W.device
        # Zeros, because a layer's rows have no part in the B columns of the other layers.
        self._W_OX = torch.zeros(self.outputs[-1].stop, self.inputs + self.rank, dtype=torch.bfloat16, device=device)
        for layer, outputs in zip(layers, self.outputs, strict=True):
            self._W_OX[outputs, : self.inputs] = layer.W.to_bf16().storage
        biases = [
            torch.zeros(layer.W.shape[0], device=device) if layer.bias_O is None else layer.bias_O for layer in layers
        ]
        self._bias_O = torch.cat(biases).bfloat16() if any(layer.bias_O is not None for layer in layers) else None

    def weights(self) -> list[Bf16Matrix]:
        """Return W of each layer as views of the concatenated matrix."""
        return [Bf16Matrix(self._W_OX[outputs, : self.inputs]) for outputs in self.outputs]

    def input_buffer(self, x_TI: torch.Tensor) -> torch.Tensor:
        return torch.empty(len(x_TI), self.inputs + self.rank, dtype=self.dtype, device=x_TI.device)

    def _product(self, buffer_TX: torch.Tensor, down_TR: torch.Tensor, adapters: Adapters) -> torch.Tensor:
        buffer_TX[:, self.inputs :] = down_TR
        for B, scaling, outputs, ranks in zip(adapters[1::2], self.scalings, self.outputs, self.ranks, strict=True):
            if B is not None:
                torch.mul(B, scaling, out=self._W_OX[outputs, self.inputs :][:, ranks])
        return linear(buffer_TX, self._W_OX, self._bias_O)

    def _product_transposed(
        self, grad_TO: torch.Tensor, adapters: Adapters, *, grad_x: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        del adapters  # `forward` wrote B into the matrix
        if not grad_x:
            return None, grad_TO @ self._W_OX[:, self.inputs :]
        grad_TX = grad_TO @ self._W_OX
        return grad_TX[:, : self.inputs], grad_TX[:, self.inputs :].contiguous()


def project(layers: Sequence[Layer]) -> Projections:
    """Return the faster form for layers that share an input: concatenated if all weights are for products in bf16."""
    return (
        ConcatenatedLora(layers) if all(isinstance(layer.W, Bf16Matrix) for layer in layers) else SeparateLora(layers)
    )


def _ranges(sizes: Sequence[int]) -> list[slice]:
    return [slice(start, stop) for start, stop in pairwise((0, *accumulate(sizes)))]
