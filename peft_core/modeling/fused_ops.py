"""A decoder block as a few autograd functions, with hand-written forward and backward passes that save little between them.

A norm saves its input and one number per token, the gated MLP saves gate and up, LoRA saves A x; the backward pass recomputes
everything else. Frozen weights get no gradient. Hidden states are float32; between products, and for the backward pass,
tensors have the projections' own type.

T tokens, D model size, I input features, O output features, F features of the MLP, H heads, E head size
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import silu

from peft_core.modeling.fused_linear import Projections

Grads = tuple[torch.Tensor | None, ...]


class LinearFunction(torch.autograd.Function):
    """Projections of x, side by side. Here and in the other functions `adapters` are A and B of each layer in turn."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, projections: Projections, *adapters: torch.Tensor | None) -> torch.Tensor:
        out_TO, down_TR = projections.forward(projections.to_buffer(x_TI), adapters)
        ctx.save_for_backward(x_TI, down_TR, *adapters)
        ctx.projections = projections
        return out_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> Grads:
        x_TI, down_TR, *adapters = ctx.saved_tensors
        grad_x, grad_adapters = ctx.projections.backward(
            grad_TO, x_TI, down_TR, adapters, grad_x=ctx.needs_input_grad[0]
        )
        return grad_x, None, *grad_adapters


class NormLinearsFunction(torch.autograd.Function):
    """Projections of the normalised x: query, key and value."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        w_D: torch.Tensor,
        epsilon: float,
        projections: Projections,
        *adapters: torch.Tensor | None,
    ) -> torch.Tensor:
        inverse_T1 = _inverse_rms(x_TD, epsilon)
        buffer_TX = projections.input_buffer(x_TD)
        _scaled(x_TD, inverse_T1, w_D, out=buffer_TX[:, : projections.inputs])
        out_TO, down_TR = projections.forward(buffer_TX, adapters)
        ctx.save_for_backward(x_TD.to(projections.dtype), w_D, inverse_T1, down_TR, *adapters)
        ctx.projections = projections
        return out_TO

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> Grads:
        x_TD, w_D, inverse_T1, down_TR, *adapters = ctx.saved_tensors
        y_TD = _scaled(x_TD, inverse_T1, w_D, out=torch.empty_like(x_TD, dtype=ctx.projections.dtype))
        grad_y, grad_adapters = ctx.projections.backward(
            grad_TO, y_TD, down_TR, adapters, grad_x=ctx.needs_input_grad[0]
        )
        grad_x = None if grad_y is None else _norm_backward(grad_y, x_TD, inverse_T1, w_D)
        return grad_x, None, None, None, *grad_adapters


class NormGatedFunction(torch.autograd.Function):
    """y = down(silu(gate(n)) * up(n)) with n the normalised input. `adapters`: of gate and up, then of down."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        w_D: torch.Tensor,
        epsilon: float,
        gate_and_up: Projections,
        down: Projections,
        *adapters: torch.Tensor | None,
    ) -> torch.Tensor:
        inverse_T1 = _inverse_rms(x_TD, epsilon)
        n_TX = gate_and_up.input_buffer(x_TD)
        _scaled(x_TD, inverse_T1, w_D, out=n_TX[:, : gate_and_up.inputs])
        gate_up_TO, first_down_TR = gate_and_up.forward(n_TX, adapters[:4])
        gate_TF, up_TF = (gate_up_TO[:, features] for features in gate_and_up.outputs)
        h_TX = down.input_buffer(gate_TF)
        torch.mul(silu(gate_TF), up_TF, out=h_TX[:, : down.inputs])
        out_TD, second_down_TR = down.forward(h_TX, adapters[4:])
        saved_TD = x_TD.to(gate_and_up.dtype)
        ctx.save_for_backward(saved_TD, w_D, inverse_T1, gate_up_TO, first_down_TR, second_down_TR, *adapters)
        ctx.gate_and_up, ctx.down = gate_and_up, down
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> Grads:
        x_TD, w_D, inverse_T1, gate_up_TO, first_down_TR, second_down_TR, *adapters = ctx.saved_tensors
        gate_TF, up_TF = (gate_up_TO[:, features] for features in ctx.gate_and_up.outputs)

        # 1. Through down and the gate: d silu(g) = sigmoid(g) (1 + g (1 - sigmoid(g))), in torch's own kernel.
        silu_TF = silu(gate_TF)
        grad_h_TF, second_grads = ctx.down.backward(grad_TD, silu_TF * up_TF, second_down_TR, adapters[4:], grad_x=True)
        grad_TO = torch.empty_like(gate_up_TO)
        grad_gate_TF, grad_up_TF = (grad_TO[:, features] for features in ctx.gate_and_up.outputs)
        torch.mul(silu_TF, grad_h_TF, out=grad_up_TF)
        torch.ops.aten.silu_backward.grad_input(grad_h_TF.mul_(up_TF), gate_TF, grad_input=grad_gate_TF)
        del grad_h_TF, silu_TF, gate_TF, up_TF, gate_up_TO

        # 2. Through gate and up.
        n_TD = _scaled(x_TD, inverse_T1, w_D, out=torch.empty_like(x_TD, dtype=ctx.gate_and_up.dtype))
        grad_n, first_grads = ctx.gate_and_up.backward(
            grad_TO, n_TD, first_down_TR, adapters[:4], grad_x=ctx.needs_input_grad[0]
        )
        grad_x = None if grad_n is None else _norm_backward(grad_n, x_TD, inverse_T1, w_D)
        return grad_x, None, None, None, None, *first_grads, *second_grads


class NormFunction(torch.autograd.Function):
    """y = w x / rms(x) over the last axis (Zhang and Sennrich, arXiv 1910.07467); w is frozen, y has the type of x."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, w_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        inverse_T1 = _inverse_rms(x_TD, epsilon)
        ctx.save_for_backward(x_TD, w_D, inverse_T1)
        return _scaled(x_TD, inverse_T1, w_D, out=torch.empty_like(x_TD, memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> Grads:
        x_TD, w_D, inverse_T1 = ctx.saved_tensors
        grad_x: torch.Tensor = _norm_backward(grad_TD, x_TD, inverse_T1, w_D)
        return grad_x.to(x_TD.dtype), None, None


class RotationFunction(torch.autograd.Function):
    """Rotary positions (Su et al., arXiv 2104.09864): the halves of each head are the parts of complex numbers."""

    @staticmethod
    def forward(ctx: Any, x_THE: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor) -> torch.Tensor:
        ctx.angles = cos_T1E, sin_T1E  # all layers share them: autograd would save a copy for each
        return _rotated(x_THE, cos_T1E, sin_T1E, sign=1.0)

    @staticmethod
    def backward(ctx: Any, grad_THE: torch.Tensor) -> Grads:
        return _rotated(grad_THE, *ctx.angles, sign=-1.0), None, None


def _rotated(x_THE: torch.Tensor, cos_T1E: torch.Tensor, sin_T1E: torch.Tensor, *, sign: float) -> torch.Tensor:
    """Rotate in float32, the type of the angles; return the type of x."""
    half = x_THE.shape[-1] // 2
    cos, sin = cos_T1E[..., :half], sin_T1E[..., :half]
    first, second = x_THE.float().split(half, -1)
    out_THE = torch.empty(x_THE.shape, dtype=torch.float32, device=x_THE.device)
    torch.mul(first, cos, out=out_THE[..., :half]).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_THE[..., half:]).addcmul_(first, sin, value=sign)
    return out_THE.to(x_THE.dtype)


def _inverse_rms(x_TD: torch.Tensor, epsilon: float) -> torch.Tensor:
    norm_T1: torch.Tensor = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True, dtype=torch.float32)
    return norm_T1.square_().div_(x_TD.shape[-1]).add_(epsilon).rsqrt_()


def _scaled(x_TD: torch.Tensor, inverse_T1: torch.Tensor, w_D: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Write the normalised x, computed in float32, to `out` of any type."""
    scaled_TD: torch.Tensor = torch.mul(x_TD * inverse_T1, w_D, out=out)
    return scaled_TD


def _norm_backward(
    grad_TD: torch.Tensor, x_TD: torch.Tensor, inverse_T1: torch.Tensor, w_D: torch.Tensor
) -> torch.Tensor:
    """Return the gradient of x in float32; does not modify `grad_TD`."""
    grad_TD = grad_TD * w_D
    unit_TD = x_TD * inverse_T1
    along_T1 = (grad_TD * unit_TD).mean(dim=-1, keepdim=True)
    return grad_TD.addcmul_(unit_TD, along_T1, value=-1).mul_(inverse_T1)
