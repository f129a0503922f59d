"""What a decoder block computes, as few autograd functions: forward and backward written by hand, little kept between.

PEFT computes W x, B A x, the scaling and the sum one by one, and autograd keeps each result. Here the update is added in
place; of a norm its input and one number a token are kept, of the gated MLP gate and up; everything else is computed
again in the backward pass. Frozen weights get no gradient, and are read from their stored form when they are needed.

T tokens, D model size, I input features, O output features, R rank, F features of the MLP, H heads, E head size
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import silu

from peft_core.compute.stored import StoredMatrix

Grads = tuple[torch.Tensor | None, ...]


class Projection(NamedTuple):
    """The frozen half of a linear layer with LoRA; its A [R, I] and B [O, R] are None where it has no adapter."""

    W: StoredMatrix
    bias_O: torch.Tensor | None
    scaling: float

    def forward(self, x_TI: torch.Tensor, down_TR: torch.Tensor | None, B_OR: torch.Tensor | None) -> torch.Tensor:
        """W x + bias + s B (A x)."""
        out_TO = self.W.times(x_TI, self.bias_O)
        return out_TO if down_TR is None or B_OR is None else out_TO.addmm_(down_TR, B_OR.T, alpha=self.scaling)

    def backward(
        self,
        grad_TO: torch.Tensor,
        x_TI: torch.Tensor,
        down_TR: torch.Tensor | None,
        A_RI: torch.Tensor | None,
        B_OR: torch.Tensor | None,
        *,
        grad_x: bool,
        into: torch.Tensor | None = None,
    ) -> Grads:
        """Gradients of x (added to `into`, if `grad_x`), A and B."""
        grad_TI = self.W.times_transposed(grad_TO, into) if grad_x else None
        if down_TR is None or A_RI is None or B_OR is None:
            return grad_TI, None, None
        grad_down_TR = (grad_TO @ B_OR).mul_(self.scaling)
        if grad_TI is not None:
            grad_TI.addmm_(grad_down_TR, A_RI)
        return grad_TI, grad_down_TR.T @ x_TI, (grad_TO.T @ down_TR).mul_(self.scaling)


class LinearFunction(torch.autograd.Function):
    """y = W x + bias + s B A x."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: torch.Tensor, layer: Projection, A_RI: torch.Tensor | None, B_OR: torch.Tensor | None
    ) -> torch.Tensor:
        down_TR = _down(x_TI, A_RI)
        ctx.save_for_backward(x_TI, down_TR, A_RI, B_OR)
        ctx.layer = layer
        return layer.forward(x_TI, down_TR, B_OR)

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> Grads:
        grad_x, grad_A, grad_B = ctx.layer.backward(grad_TO, *ctx.saved_tensors, grad_x=ctx.needs_input_grad[0])
        return grad_x, None, grad_A, grad_B


class NormLinearsFunction(torch.autograd.Function):
    """Several linear layers of one normed input: query, key and value. `adapters` are A and B of each in turn."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        w_D: torch.Tensor,
        epsilon: float,
        layers: tuple[Projection, ...],
        *adapters: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        inverse_T1 = _inverse_rms(x_TD, epsilon)
        y_TD = _scaled(x_TD, inverse_T1, w_D)
        downs = [_down(y_TD, A_RI) for A_RI in adapters[::2]]
        ctx.save_for_backward(x_TD, w_D, inverse_T1, *downs, *adapters)
        ctx.layers = layers
        return tuple(
            layer.forward(y_TD, down_TR, B_OR)
            for layer, down_TR, B_OR in zip(layers, downs, adapters[1::2], strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Grads:
        x_TD, w_D, inverse_T1, *rest = ctx.saved_tensors
        count = len(ctx.layers)
        downs, adapters = rest[:count], rest[count:]
        y_TD = _scaled(x_TD, inverse_T1, w_D)
        grad_y: torch.Tensor | None = None
        grad_adapters: list[torch.Tensor | None] = []
        parts = zip(ctx.layers, grads, downs, adapters[::2], adapters[1::2], strict=True)
        for layer, grad_TO, down_TR, A_RI, B_OR in parts:
            grad_y, grad_A, grad_B = layer.backward(
                grad_TO, y_TD, down_TR, A_RI, B_OR, grad_x=ctx.needs_input_grad[0], into=grad_y
            )
            grad_adapters += [grad_A, grad_B]
        grad_x = None if grad_y is None else _norm_backward(grad_y, x_TD, inverse_T1, w_D)
        return grad_x, None, None, None, *grad_adapters


class NormGatedFunction(torch.autograd.Function):
    """y = down(silu(gate(n)) * up(n)) with n the normed input. `adapters` are A and B of gate, up and down in turn.

    Where products are computed in bfloat16, gate and up are kept in that format: they have no more digits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        w_D: torch.Tensor,
        epsilon: float,
        layers: tuple[Projection, Projection, Projection],
        *adapters: torch.Tensor | None,
    ) -> torch.Tensor:
        gate, up, down = layers
        A_gate, B_gate, A_up, B_up, A_down, B_down = adapters
        inverse_T1 = _inverse_rms(x_TD, epsilon)
        n_TD = _scaled(x_TD, inverse_T1, w_D)
        down_gate, down_up = _down(n_TD, A_gate), _down(n_TD, A_up)
        gate_TF = gate.forward(n_TD, down_gate, B_gate)
        up_TF = up.forward(n_TD, down_up, B_up)
        h_TF = silu(gate_TF).mul_(up_TF)
        down_down = _down(h_TF, A_down)
        kept = torch.bfloat16 if down.W.in_bfloat16 else torch.float32
        ctx.save_for_backward(
            x_TD, w_D, inverse_T1, gate_TF.to(kept), up_TF.to(kept), down_gate, down_up, down_down, *adapters
        )
        ctx.layers = layers
        return down.forward(h_TF, down_down, B_down)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> Grads:
        gate, up, down = ctx.layers
        x_TD, w_D, inverse_T1, gate_TF, up_TF, down_gate, down_up, down_down, *adapters = ctx.saved_tensors
        A_gate, B_gate, A_up, B_up, A_down, B_down = adapters
        gate_TF, up_TF = gate_TF.float(), up_TF.float()

        # 1. Through down and the gate: d silu(g) = sigmoid(g) (1 + g (1 - sigmoid(g))), in torch's own kernel.
        silu_TF = silu(gate_TF)
        grad_h_TF, grad_A_down, grad_B_down = down.backward(
            grad_TD, silu_TF * up_TF, down_down, A_down, B_down, grad_x=True
        )
        grad_up_TF = silu_TF.mul_(grad_h_TF)
        grad_gate_TF = torch.ops.aten.silu_backward(grad_h_TF.mul_(up_TF), gate_TF)
        del grad_h_TF, gate_TF, up_TF

        # 2. Through gate and up.
        n_TD = _scaled(x_TD, inverse_T1, w_D)
        needed = ctx.needs_input_grad[0]
        grad_n, grad_A_gate, grad_B_gate = gate.backward(grad_gate_TF, n_TD, down_gate, A_gate, B_gate, grad_x=needed)
        grad_n, grad_A_up, grad_B_up = up.backward(grad_up_TF, n_TD, down_up, A_up, B_up, grad_x=needed, into=grad_n)
        grad_x = None if grad_n is None else _norm_backward(grad_n, x_TD, inverse_T1, w_D)
        grad_adapters = (grad_A_gate, grad_B_gate, grad_A_up, grad_B_up, grad_A_down, grad_B_down)
        return grad_x, None, None, None, *grad_adapters


class NormFunction(torch.autograd.Function):
    """y = w x / rms(x) over the last axis (Zhang and Sennrich, arXiv 1910.07467); w is frozen."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, w_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        inverse_T1 = _inverse_rms(x_TD, epsilon)
        ctx.save_for_backward(x_TD, w_D, inverse_T1)
        return _scaled(x_TD, inverse_T1, w_D)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> Grads:
        x_TD, w_D, inverse_T1 = ctx.saved_tensors
        return _norm_backward(grad_TD.clone(), x_TD, inverse_T1, w_D), None, None


class RotationFunction(torch.autograd.Function):
    """Rotary positions (Su et al., arXiv 2104.09864): the halves of each head as the parts of complex numbers."""

    @staticmethod
    def forward(ctx: Any, x_THE: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos_T1E, sin_T1E)
        return _rotated(x_THE, cos_T1E, sin_T1E, sign=1.0)

    @staticmethod
    def backward(ctx: Any, grad_THE: torch.Tensor) -> Grads:
        return _rotated(grad_THE, *ctx.saved_tensors, sign=-1.0), None, None


def _rotated(x_THE: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor, *, sign: float) -> torch.Tensor:
    half = x_THE.shape[-1] // 2
    cos, sin = cos_T1E[..., :half], sin_T1E[..., :half]
    first, second = x_THE[..., :half], x_THE[..., half:]
    out_THE = torch.empty(x_THE.shape, dtype=x_THE.dtype, device=x_THE.device)
    torch.mul(first, cos, out=out_THE[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_THE[..., half:]).addcmul_(first, sin, value=sign)
    return out_THE


def _down(x_TI: torch.Tensor, A_RI: torch.Tensor | None) -> torch.Tensor | None:
    return None if A_RI is None else x_TI @ A_RI.T


def _inverse_rms(x_TD: torch.Tensor, epsilon: float) -> torch.Tensor:
    norm_T1: torch.Tensor = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
    return norm_T1.square_().div_(x_TD.shape[-1]).add_(epsilon).rsqrt_()


def _scaled(x_TD: torch.Tensor, inverse_T1: torch.Tensor, w_D: torch.Tensor) -> torch.Tensor:
    return (x_TD * inverse_T1).mul_(w_D)


def _norm_backward(
    grad_TD: torch.Tensor, x_TD: torch.Tensor, inverse_T1: torch.Tensor, w_D: torch.Tensor
) -> torch.Tensor:
    """The gradient of x, in the memory of `grad_TD`."""
    unit_TD = x_TD * inverse_T1
    along_T1 = (grad_TD.mul_(w_D) * unit_TD).mean(dim=-1, keepdim=True)
    return grad_TD.addcmul_(unit_TD, along_T1, value=-1).mul_(inverse_T1)
