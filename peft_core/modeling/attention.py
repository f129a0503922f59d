"""Causal attention for packed sequences: several documents end to end, none of which attends to another.

B batch (always 1), H heads, K key/value heads, T tokens of all documents, L tokens of one document, D head size
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import structlog
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from peft_core.base_models.families import UNSUPPORTED_ATTENTION
from peft_core.modeling.attention_bf16 import Bf16Attention
from peft_core.modeling.mps import fixed_shapes
from peft_core.system.failures import describe_error, is_out_of_memory

_log = structlog.get_logger(__name__)

NAME = "peft_mcp_documents"


def register() -> None:
    """Register this attention with transformers under NAME."""
    AttentionInterface.register(NAME, attend_within_documents)
    AttentionMaskInterface.register(NAME, _no_mask)


def attend_within_documents(
    module: torch.nn.Module,
    query_BHTD: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    document_lengths: tuple[int, ...] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Compute attention as transformers calls it; `document_lengths` comes through the model's keyword arguments.

    Returns [B, T, H, D]. Without lengths the sequence is one document. Each document is purely causal, so that no mask is
    needed. The work is the sum of L^2 instead of T^2.

    Raises:
        NotImplementedError: the model asks for a variant of attention that is not implemented, such as capped scores.
    """
    del module, attention_mask
    if unsupported := [name for name in UNSUPPORTED_ATTENTION if others.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(unsupported)}")
    call = _Call(query_BHTD, key_BKTD, value_BKTD, document_lengths or (query_BHTD.shape[2],), dropout, scaling)
    kernel = next(kernel for accepts, kernel in _KERNELS if accepts(call))
    return kernel(call), None


class _Call(NamedTuple):
    query_BHTD: torch.Tensor
    key_BKTD: torch.Tensor
    value_BKTD: torch.Tensor
    lengths: tuple[int, ...]
    dropout: float
    scaling: float | None

    @property
    def is_plain(self) -> bool:
        """Whether there is no dropout and values are as wide as queries (DeepSeek's are narrower)."""
        return self.dropout == 0.0 and self.value_BKTD.shape[-1] == self.query_BHTD.shape[-1]


def _is_padded(call: _Call) -> bool:
    return fixed_shapes(call.query_BHTD.device) is not None


def _attend_padded(call: _Call) -> torch.Tensor:
    query_BHTD = call.query_BHTD
    heads = query_BHTD.shape[1]  # MPS supports no grouped heads before torch 2.13
    key_BHTD, value_BHTD = _repeated(call.key_BKTD, heads), _repeated(call.value_BKTD, heads)
    return attend_with_mask(query_BHTD, key_BHTD, value_BHTD, call.lengths, dropout=call.dropout, scaling=call.scaling)


def _runs_on_cpu(call: _Call) -> bool:
    return call.query_BHTD.is_cpu and call.query_BHTD.dtype in _ON_CPU and call.is_plain


def _attend_on_cpu(call: _Call) -> torch.Tensor:
    scale = call.query_BHTD.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    out_BTHD: torch.Tensor = _ON_CPU[call.query_BHTD.dtype].apply(*call[:3], call.lengths, scale)
    return out_BTHD


def _attend_each_document(call: _Call) -> torch.Tensor:
    query_BHTD, key_BKTD, value_BKTD = call[:3]
    if query_BHTD.dtype == torch.float32:  # the memory-efficient CUDA kernels for float32 support no grouped heads
        key_BKTD, value_BKTD = (_repeated(x, query_BHTD.shape[1]) for x in (key_BKTD, value_BKTD))
    grouped = query_BHTD.shape[1] != key_BKTD.shape[1]
    out_BLHD = [
        scaled_dot_product_attention(
            query_BHLD,
            key_BKLD,
            value_BKLD,
            dropout_p=call.dropout,
            is_causal=True,
            scale=call.scaling,
            enable_gqa=grouped,
        ).transpose(1, 2)
        for query_BHLD, key_BKLD, value_BKLD in _documents(call.lengths, query_BHTD, key_BKTD, value_BKTD)
    ]
    return torch.cat(out_BLHD, dim=1)


def _runs_flash(call: _Call) -> bool:
    """Return whether flash attention's kernel accepts the call: bf16 on a CUDA GPU, with a common head size."""
    query_BHTD = call.query_BHTD
    size = query_BHTD.shape[-1]
    fits = query_BHTD.is_cuda and query_BHTD.dtype == torch.bfloat16 and size % 8 == 0 and size <= 128
    return fits and call.is_plain and _has_flash(query_BHTD.device)


def _attend_by_flash(call: _Call) -> torch.Tensor:
    return _flash(*call[:3], call.lengths, call.scaling)


@lru_cache
def _has_flash(device: torch.device) -> bool:
    """Try the kernel with two tiny documents, forward and backward: not every build of torch has it for every GPU."""
    query_1HTD = torch.zeros(1, 2, 8, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    key_1KTD = query_1HTD[:, :1]
    try:
        with torch.enable_grad():
            _flash(query_1HTD, key_1KTD, key_1KTD, (5, 3), None).sum().backward()
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        _log.info("flash_attention_refused", reason=describe_error(error))
        return False
    return True


def _flash(
    query_1HTD: torch.Tensor,
    key_1KTD: torch.Tensor,
    value_1KTD: torch.Tensor,
    lengths: tuple[int, ...],
    scaling: float | None,
) -> torch.Tensor:
    """Compute all documents in one call (Dao, arXiv 2307.08691), [1, T, H, D]. A kernel for each would cost more."""
    query_THD, key_TKD, value_TKD = (x[0].transpose(0, 1) for x in (query_1HTD, key_1KTD, value_1KTD))
    value_TKD = value_TKD.clone()  # else the saved view would keep the query and key alive, which share its memory
    ends, longest = _ends(lengths, query_THD.device), max(lengths)
    out_THD: torch.Tensor = _FLASH(
        query_THD, key_TKD, value_TKD, ends, ends, longest, longest, 0.0, True, False, scale=scaling
    )[0]
    return out_THD[None]


@lru_cache(maxsize=1)  # the layers of one micro-batch
def _ends(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return where documents begin and end among all tokens, int32 [documents + 1]."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def attend_with_mask(
    query_BHTD: torch.Tensor,
    key_BHTD: torch.Tensor,
    value_BHTD: torch.Tensor,
    lengths: tuple[int, ...],
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> torch.Tensor:
    """Compute the same with a mask: T^2 work, but shapes that do not depend on the documents. Returns [B, T, H, D]."""
    mask_TT = _mask(lengths, query_BHTD.device)
    out_BHTD = scaled_dot_product_attention(
        query_BHTD, key_BHTD, value_BHTD, attn_mask=mask_TT, dropout_p=dropout, scale=scaling
    )
    return out_BHTD.transpose(1, 2)


@lru_cache(maxsize=1)  # the layers of one micro-batch
def _mask(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return the mask [T, T]: a token attends to itself and earlier ones of its document. Empty rows give NaN on MPS."""
    document_T = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (document_T[:, None] == document_T[None]).tril().to(device)


class _DocumentAttention(torch.autograd.Function):
    """`scaled_dot_product_attention` on a CPU, by the kernels behind it, for all documents in one autograd function.

    Autograd would save keys and values once for each query head, and the result twice: for each document and concatenated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTD: torch.Tensor,
        key_BKTD: torch.Tensor,
        value_BKTD: torch.Tensor,
        lengths: tuple[int, ...],
        scale: float,
    ) -> torch.Tensor:
        batch, heads, tokens, size = query_BHTD.shape
        out_BTHD = torch.empty(batch, tokens, heads, size)
        sums_BHL = []
        parts = _documents(lengths, query_BHTD, key_BKTD, value_BKTD, out_BTHD.transpose(1, 2))
        for query_BHLD, key_BKLD, value_BKLD, out_BHLD in parts:
            out, sums = _ATTEND(query_BHLD, key_BKLD, value_BKLD, 0.0, True, scale=scale)
            out_BHLD.copy_(out)
            sums_BHL.append(sums)
        # A copy, without the query and key that share its memory:
        own_value = value_BKTD.transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(query_BHTD, key_BKTD, own_value, out_BTHD, *sums_BHL)
        ctx.lengths, ctx.scale = lengths, scale
        return out_BTHD

    @staticmethod
    def backward(ctx: Any, grad_BTHD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query_BHTD, key_BKTD, value_BKTD, out_BTHD, *sums_BHL = ctx.saved_tensors
        inputs = (query_BHTD, key_BKTD, value_BKTD)
        # A token's heads are contiguous in memory, as the projections before need them.
        gradients = [x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in inputs]
        parts = _documents(ctx.lengths, *inputs, out_BTHD.transpose(1, 2), grad_BTHD.transpose(1, 2), *gradients)
        heads, groups = query_BHTD.shape[1], key_BKTD.shape[1]
        for (query, key, value, out, grad_out, grad_query, grad_key, grad_value), sums in zip(
            parts, sums_BHL, strict=True
        ):
            repeated = (_repeated(x, heads) for x in (key, value))
            grads = _ATTEND_BACKWARD(grad_out, query, *repeated, out, sums, 0.0, True, scale=ctx.scale)
            grad_query.copy_(grads[0])
            for target, by_query_head in zip((grad_key, grad_value), grads[1:], strict=True):
                target.copy_(by_query_head.unflatten(1, (groups, -1)).sum(2))
        return *gradients, None, None


_ON_CPU = {torch.float32: _DocumentAttention, torch.bfloat16: Bf16Attention}
_ATTEND = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 -- what the public function calls
_FLASH = torch.ops.aten._flash_attention_forward  # noqa: SLF001 -- torch.nn.attention.varlen's, which older versions lack
_ATTEND_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001 -- its derivative


# In this order: the first kernel that accepts a call computes it. The last one accepts all.
_KERNELS: tuple[tuple[Callable[[_Call], bool], Callable[[_Call], torch.Tensor]], ...] = (
    (_is_padded, _attend_padded),  # MPS
    (_runs_on_cpu, _attend_on_cpu),  # float32 or bf16, without dropout
    (_runs_flash, _attend_by_flash),  # CUDA, bf16, without dropout
    (lambda _: True, _attend_each_document),
)


def _documents(lengths: tuple[int, ...], *tensors_BHTD: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield each document's slice of the tensors, along the tokens."""
    return zip(*(tensor.split(list(lengths), 2) for tensor in tensors_BHTD), strict=True)


def _repeated(x_BKTD: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat keys or values for each query head."""
    return x_BKTD if x_BKTD.shape[1] == heads else x_BKTD.repeat_interleave(heads // x_BKTD.shape[1], dim=1)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None
