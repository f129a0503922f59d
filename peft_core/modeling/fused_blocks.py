"""Fusion of a model's modules into the functions of `fused_ops`: complete Llama-like decoder blocks, single layers elsewhere.

Hand-written because Liger's and Unsloth's kernels run on CUDA alone; on CPUs this trains 3.8 times as fast as a plain Trainer.
No architecture is known by its name: a module qualifies by its parts, and by the same output for a random input.

T tokens (all leading axes), D model size, E head size; 1 is the batch dimension that models expect
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, TypeGuard, cast

import structlog
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from transformers.activations import SiLUActivation

from peft_core.modeling import attention
from peft_core.modeling.fused_linear import ConcatenatedLora, Layer, Projections, project
from peft_core.modeling.fused_ops import (
    LinearFunction,
    NormFunction,
    NormGatedFunction,
    NormLinearsFunction,
    RotationFunction,
)
from peft_core.modeling.load import FrozenLinear, matrix_of
from peft_core.modeling.mps import can_fuse

_log = structlog.get_logger(__name__)

_ADAPTER = "default"  # PEFT's name of the one adapter
_PROBE_LENGTHS = (7, 5)
_Matrices = tuple[torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True)
class FusionStats:
    """How many modules are fused. `linears`: single layers outside fused blocks."""

    blocks: int
    linears: int


def fuse(model: PeftModel) -> FusionStats:
    """Replace the forward of modules by hand-written functions that compute the same; other modules are left alone.

    Not fused are modules with dropout, with weights that are neither float32 nor stored (`FrozenLinear`), with another
    activation or norm, or whose attention is not the one for packed documents. On MPS nothing is (see mps.py).
    """
    if not can_fuse(next(model.parameters()).device):
        return FusionStats(blocks=0, linears=0)
    inside: set[int] = set()
    blocks = 0
    for block in _proven_blocks(model):
        for linears in (block.query_key_value, block.output, block.gate_and_up, block.down):
            linears.adopt_weights()
        block.module.forward = partial(_block_forward, block)  # of this instance only
        inside.update(map(id, block.module.modules()))
        blocks += 1
    alone = [module for module in model.modules() if id(module) not in inside and _is_plain(module)]
    for layer in alone:
        linears = _together(layer)
        linears.adopt_weights()
        layer.forward = partial(_linear_forward, linears)  # type: ignore[method-assign]  # of this instance only
    fused = FusionStats(blocks=blocks, linears=len(alone))
    _log.info("layers_fused", **asdict(fused))
    return fused


def _proven_blocks(model: PeftModel) -> Iterator[_Block]:
    """Yield the blocks that match their reference, one by one, because a block holds its weights twice until it is adopted."""
    rotary = next((module for name, module in model.named_modules() if name.endswith("rotary_emb")), None)
    reasons: set[str] = set()
    for module in list(model.modules()):
        block = _block_of(module, reasons)
        if block is None:
            continue
        if rotary is None:
            reasons.add("the model has no rotary embedding")
        elif _matches_reference(block, rotary):
            yield block
        else:
            reasons.add("the fused block's output differs from the block's own")
    if reasons:
        _log.info("blocks_not_fused", model=type(model.get_base_model()).__name__, reasons=sorted(reasons))


class _Norm(NamedTuple):
    w_D: torch.Tensor
    epsilon: float


@dataclass(frozen=True, eq=False)
class _Linears:
    """Linear layers that share an input, and their joint computation."""

    modules: tuple[nn.Module, ...]
    projections: Projections

    @property
    def adapters(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(matrix for module in self.modules for matrix in _adapter(module))

    def adopt_weights(self) -> None:
        """Make the modules use the weights of the joint computation, so that their own can be freed."""
        if isinstance(self.projections, ConcatenatedLora):
            for module, stored in zip(self.modules, self.projections.weights(), strict=True):
                base = cast("FrozenLinear", _frozen(module))
                base.stored.madvise_pageout()
                base.stored = stored


@dataclass(frozen=True, eq=False)
class _Block:
    """A decoder block: x + output(attend(q, k, v)) and x + down(silu(gate) * up), each of the normed x."""

    module: nn.Module
    attention: nn.Module
    first: _Norm
    second: _Norm
    query_key_value: _Linears
    output: _Linears
    gate_and_up: _Linears
    down: _Linears
    head_size: int
    scaling: float
    heads: tuple[_Norm, _Norm] | None  # norms of each query and key head, if any


_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_HEAD_NORMS = {"q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj"}


def _block_of(module: nn.Module, reasons: set[str]) -> _Block | None:
    """Return the module as a decoder block. If it has unsupported parts or settings, return None and add to `reasons`."""
    parts = dict(module.named_children())
    if set(parts) != _PARTS:
        return None  # no decoder block at all, as most modules
    attend, mlp = dict(parts["self_attn"].named_children()), dict(parts["mlp"].named_children())
    activation = mlp.pop("act_fn", None)
    head_norms = [_norm_of(attend.pop(name)) for name in sorted(_HEAD_NORMS, reverse=True) if name in attend]
    first, second = _norm_of(parts["input_layernorm"]), _norm_of(parts["post_attention_layernorm"])
    head_size, scaling, config = (getattr(parts["self_attn"], name, None) for name in ("head_dim", "scaling", "config"))
    requirements = {
        "attention has q, k, v and o projections only": set(attend) == _ATTENTION_PARTS,
        "the MLP has gate, up and down projections only": set(mlp) == _MLP_PARTS,
        "the activation is SiLU": isinstance(activation, (nn.SiLU, SiLUActivation)),
        "norms are frozen float32 RMS norms": None not in (first, second, *head_norms),
        "queries and keys are both normalised, or neither": len(head_norms) != 1,
        "attention has a head size and a scaling factor": isinstance(head_size, int) and isinstance(scaling, float),
        "attention has no dropout": not getattr(parts["self_attn"], "attention_dropout", None),
        "attention is that for packed documents": getattr(config, "_attn_implementation", None) == attention.NAME,
        "projections are plain frozen or LoRA layers": all(map(_is_projection, (*attend.values(), *mlp.values()))),
    }
    if unmet := [requirement for requirement, is_met in requirements.items() if not is_met]:
        reasons.update(f"not true that {requirement}" for requirement in unmet)
        return None
    return _Block(
        module=module,
        attention=parts["self_attn"],
        first=cast("_Norm", first),
        second=cast("_Norm", second),
        query_key_value=_together(attend["q_proj"], attend["k_proj"], attend["v_proj"]),
        output=_together(attend["o_proj"]),
        gate_and_up=_together(mlp["gate_proj"], mlp["up_proj"]),
        down=_together(mlp["down_proj"]),
        head_size=cast("int", head_size),
        scaling=cast("float", scaling),
        heads=cast("tuple[_Norm, _Norm]", tuple(head_norms)) if head_norms else None,
    )


def _block_forward(block: _Block, hidden_1TD: torch.Tensor, **others: Any) -> torch.Tensor:
    """Compute a block as transformers calls it. `others`: position_embeddings, document_lengths, and unused arguments."""
    x_TD = hidden_1TD.flatten(0, 1)
    tokens = x_TD.shape[0]

    # 1. Queries, keys and values, with their positions.
    together = block.query_key_value
    qkv_TO = NormLinearsFunction.apply(x_TD, *block.first, together.projections, *together.adapters)
    query, key, value = (
        out_TO.unflatten(1, (-1, block.head_size)) for out_TO in qkv_TO.split(together.projections.sizes, 1)
    )
    if block.heads is not None:
        query, key = (NormFunction.apply(x, *norm) for x, norm in zip((query, key), block.heads, strict=True))
    cos_T1E, sin_T1E = (angles[0][:, None] for angles in others["position_embeddings"])
    query, key = (RotationFunction.apply(x, cos_T1E, sin_T1E) for x in (query, key))

    # 2. Attention within each document.
    query, key, value = (x_THE[None].transpose(1, 2) for x_THE in (query, key, value))
    out_1THE, _ = attention.attend_within_documents(
        block.attention, query, key, value, None, scaling=block.scaling, document_lengths=others.get("document_lengths")
    )
    output = block.output
    x_TD = x_TD + LinearFunction.apply(out_1THE.reshape(tokens, -1), output.projections, *output.adapters)

    # 3. The gated MLP.
    first, last = block.gate_and_up, block.down
    x_TD = x_TD + NormGatedFunction.apply(
        x_TD, *block.second, first.projections, last.projections, *first.adapters, *last.adapters
    )
    return cast("torch.Tensor", x_TD.view_as(hidden_1TD))


def _linear_forward(linear: _Linears, x: torch.Tensor) -> torch.Tensor:
    x_TI = x.reshape(-1, x.shape[-1]).to(linear.projections.dtype)
    out_TO = LinearFunction.apply(x_TI, linear.projections, *linear.adapters)
    return cast("torch.Tensor", out_TO.to(x.dtype).view(*x.shape[:-1], -1))


def _together(*modules: nn.Module) -> _Linears:
    frozen = [_frozen(module) for module in modules]
    layers = [
        Layer(
            W=matrix_of(base),
            bias_O=base.bias,
            rank=module.r[_ADAPTER] if isinstance(module, LoraLinear) else 0,
            scaling=module.scaling[_ADAPTER] if isinstance(module, LoraLinear) else 0.0,
        )
        for module, base in zip(modules, frozen, strict=True)
    ]
    return _Linears(modules, project(layers))


def _adapter(layer: nn.Module) -> _Matrices:
    if not isinstance(layer, LoraLinear):
        return None, None
    a, b = (cast("nn.Linear", matrices[_ADAPTER]) for matrices in (layer.lora_A, layer.lora_B))
    return a.weight, b.weight


def _is_projection(module: nn.Module) -> bool:
    """Return whether a module is a frozen linear layer, with a plain adapter or without one."""
    return _is_plain(module) or _is_frozen(module)


def _is_plain(module: nn.Module | None) -> TypeGuard[LoraLinear]:
    """Return whether a module computes W x + bias + s B A x in float32, and nothing else."""
    if type(module) is not LoraLinear or list(module.lora_A) != [_ADAPTER] or module.lora_variant:
        return False
    return (
        _is_frozen(module.get_base_layer())
        and isinstance(module.lora_dropout[_ADAPTER], nn.Identity)
        and not module.lora_bias[_ADAPTER]
        and all(matrix is not None and matrix.dtype == torch.float32 for matrix in _adapter(module))
    )


def _is_frozen(module: object) -> bool:
    return type(module) is FrozenLinear or (type(module) is nn.Linear and module.weight.dtype == torch.float32)


def _norm_of(module: nn.Module) -> _Norm | None:
    weight = getattr(module, "weight", None)
    # Models use either name.
    epsilon: object = getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(weight, nn.Parameter) or weight.requires_grad:
        return None
    return _Norm(weight, epsilon) if weight.dtype == torch.float32 and isinstance(epsilon, float) else None


def _matches_reference(block: _Block, rotary: nn.Module) -> bool:
    """Return whether a block's own forward and the fused one agree on two tiny documents, up to rounding.

    B is still zero, so that this compares the frozen part alone; LoRA is the same function for every layer.
    """
    w_D = block.first.w_D
    own_generator = torch.Generator(w_D.device).manual_seed(0)  # leaves the run's random sequence unchanged
    x_1TD = torch.randn(1, sum(_PROBE_LENGTHS), len(w_D), device=w_D.device, generator=own_generator)
    positions_1T = torch.cat([torch.arange(length, device=w_D.device) for length in _PROBE_LENGTHS])[None]
    tolerance = 2e-2 if block.down.projections.dtype == torch.bfloat16 else 1e-4
    with torch.no_grad():
        others: Mapping[str, Any] = {
            "attention_mask": None,
            "position_ids": positions_1T,
            "position_embeddings": rotary(x_1TD, positions_1T),
            "document_lengths": _PROBE_LENGTHS,
        }
        own_1TD, fused_1TD = block.module(x_1TD, **others), _block_forward(block, x_1TD, **others)
    return bool((own_1TD - fused_1TD).abs().max() <= tolerance * own_1TD.abs().max())


def _frozen(layer: nn.Module) -> nn.Linear:
    return cast("nn.Linear", layer.get_base_layer() if isinstance(layer, LoraLinear) else layer)
