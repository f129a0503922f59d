"""LoRA layers, gated MLPs and norms as single autograd functions: same mathematics, a quarter of the temporary tensors.

PEFT computes W x, B A x, the scaling and the sum one by one, each into a tensor of its own. Here the update is added in
place, of the gated MLP only gate and up are kept for the backward pass (silu(gate) * up is recomputed), and of a norm its
input and one number a token. Frozen weights get no gradient, and are read from their stored form when they are needed.

T tokens (all leading axes), I input features, O output features, R rank, F features of the MLP, D model size
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeGuard, cast

import structlog
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn.functional import linear, silu

from peft_core.compute.frozen import FrozenLinear, matrix_of
from peft_core.compute.stored import StoredMatrix

_log = structlog.get_logger(__name__)

_ADAPTER = "default"  # PEFT's name of the one adapter


class _LinearFunction(torch.autograd.Function):
    """y = W x + bias + s B A x."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: torch.Tensor,
        W: StoredMatrix,
        bias_O: torch.Tensor | None,
        A_RI: torch.Tensor,
        B_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        down_TR = x_TI @ A_RI.T
        ctx.save_for_backward(x_TI, A_RI, B_OR, down_TR)
        ctx.W, ctx.scaling = W, scaling
        return linear(x_TI, W.whole(), bias_O).addmm_(down_TR, B_OR.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_TI, A_RI, B_OR, down_TR = ctx.saved_tensors
        grad_down_TR = (grad_TO @ B_OR).mul_(ctx.scaling)
        grad_B_OR = (grad_TO.T @ down_TR).mul_(ctx.scaling)
        grad_x_TI = (grad_TO @ ctx.W.whole()).addmm_(grad_down_TR, A_RI) if ctx.needs_input_grad[0] else None
        return grad_x_TI, None, None, grad_down_TR.T @ x_TI, grad_B_OR, None


class _GatedFunction(torch.autograd.Function):
    """y = (W + s B A) h with h = silu(gate) * up; h is recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_TF: torch.Tensor,
        up_TF: torch.Tensor,
        W: StoredMatrix,
        A_RF: torch.Tensor,
        B_OR: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        h_TF = silu(gate_TF).mul_(up_TF)
        down_TR = h_TF @ A_RF.T
        ctx.save_for_backward(gate_TF, up_TF, A_RF, B_OR, down_TR)
        ctx.W, ctx.scaling = W, scaling
        return (h_TF @ W.whole().T).addmm_(down_TR, B_OR.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_TF, up_TF, A_RF, B_OR, down_TR = ctx.saved_tensors
        grad_down_TR = (grad_TO @ B_OR).mul_(ctx.scaling)
        grad_B_OR = (grad_TO.T @ down_TR).mul_(ctx.scaling)
        grad_h_TF = (grad_TO @ ctx.W.whole()).addmm_(grad_down_TR, A_RF)
        silu_TF = silu(gate_TF)
        grad_A_RF = grad_down_TR.T @ (silu_TF * up_TF)
        grad_up_TF = silu_TF.mul_(grad_h_TF)
        grad_gate_TF = torch.ops.aten.silu_backward(grad_h_TF.mul_(up_TF), gate_TF)
        return grad_gate_TF, grad_up_TF, None, grad_A_RF, grad_B_OR, None


class _NormFunction(torch.autograd.Function):
    """y = w x / rms(x) over the last axis (Zhang and Sennrich, arXiv 1910.07467); w is frozen."""

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, w_D: torch.Tensor, epsilon: float) -> torch.Tensor:
        norm_T1: torch.Tensor = torch.linalg.vector_norm(x_TD, dim=-1, keepdim=True)
        inverse_T1 = norm_T1.square_().div_(x_TD.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x_TD, w_D, inverse_T1)
        return (x_TD * inverse_T1).mul_(w_D)

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        x_TD, w_D, inverse_T1 = ctx.saved_tensors
        scaled_TD, unit_TD = grad_TD * w_D, x_TD * inverse_T1
        along_T1 = (scaled_TD * unit_TD).mean(dim=-1, keepdim=True)
        return scaled_TD.addcmul_(unit_TD, along_T1, value=-1).mul_(inverse_T1), None, None


@dataclass(frozen=True)
class Fused:
    """How many modules compute by one of the functions above."""

    linears: int
    gated_mlps: int
    norms: int


def fuse(model: PeftModel) -> Fused:
    """Let modules compute by the functions above, where that is the same mathematics.

    Those that differ (dropout, other formats than float32, another activation, a norm that adds one to its weight) stay
    as they are.
    """
    linears = [module for module in model.modules() if _is_plain(module)]
    for layer in linears:
        layer.forward = partial(_linear_forward, layer)  # type: ignore[method-assign]  # of this instance only
    gated = [module for module in model.modules() if _is_gated(module)]
    for mlp in gated:
        mlp.forward = partial(_gated_forward, mlp)  # likewise
    norms = [module for module in model.modules() if _is_norm(module)]
    for norm in norms:
        norm.forward = partial(_norm_forward, norm)  # likewise
    fused = Fused(linears=len(linears), gated_mlps=len(gated), norms=len(norms))
    _log.info("layers_fused", **asdict(fused))
    return fused


def _linear_forward(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    base = _frozen(layer)
    out: torch.Tensor = _LinearFunction.apply(x.reshape(-1, x.shape[-1]), matrix_of(base), base.bias, *_lora(layer))
    return out.view(*x.shape[:-1], out.shape[-1])


def _gated_forward(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = _projections(mlp)
    features = _frozen(gate).out_features
    out: torch.Tensor = _GatedFunction.apply(
        gate(x).view(-1, features), up(x).view(-1, features), matrix_of(_frozen(down)), *_lora(down)
    )
    return out.view(*x.shape[:-1], out.shape[-1])


def _norm_forward(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = _NormFunction.apply(x, norm.weight, _epsilon(norm))
    return out


def _epsilon(norm: nn.Module) -> float | None:
    value = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))  # the models' two names of it
    return value if isinstance(value, float) else None


def _projections(mlp: nn.Module) -> list[LoraLinear]:
    return [cast("LoraLinear", getattr(mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")]


def _frozen(layer: LoraLinear) -> nn.Linear:
    return cast("nn.Linear", layer.get_base_layer())


def _lora(layer: LoraLinear) -> tuple[torch.Tensor, torch.Tensor, float]:
    a, b = (cast("nn.Linear", matrices[_ADAPTER]) for matrices in (layer.lora_A, layer.lora_B))
    return a.weight, b.weight, layer.scaling[_ADAPTER]


def _is_plain(module: nn.Module | None) -> TypeGuard[LoraLinear]:
    """Whether a module computes W x + bias + s B A x in float32, and nothing else."""
    if type(module) is not LoraLinear or list(module.lora_A) != [_ADAPTER] or module.lora_variant:
        return False
    return (
        type(module.get_base_layer()) in (nn.Linear, FrozenLinear)
        and isinstance(module.lora_dropout[_ADAPTER], nn.Identity)
        and not module.lora_bias[_ADAPTER]
        and _frozen(module).weight.dtype == _lora(module)[0].dtype == torch.float32
    )


def _is_gated(module: nn.Module) -> bool:
    """Whether a module computes down(silu(gate(x)) * up(x)): it has the parts, and says so of a random input.

    While B is zero this compares the frozen part alone; the rest is the same function for every layer.
    """
    if not all(_is_plain(getattr(module, name, None)) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    gate, _, down = _projections(module)
    return _frozen(down).bias is None and _says_the_same(module, _gated_forward, _frozen(gate).in_features)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module computes w x / rms(x) with a frozen float32 w: it has the parts, and says so of a random input."""
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, nn.Parameter)
        and weight.dtype == torch.float32
        and not weight.requires_grad
        and _epsilon(module) is not None
        and _says_the_same(module, _norm_forward, weight.shape[0])
    )


def _says_the_same(
    module: nn.Module, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor], features: int
) -> bool:
    device = next(module.parameters()).device
    own_generator = torch.Generator(device).manual_seed(0)  # the run's random numbers stay as they are
    x_TI = torch.randn(4, features, device=device, generator=own_generator)
    with torch.no_grad():
        return torch.allclose(module(x_TI), forward(module, x_TI), rtol=1e-4, atol=1e-5)
