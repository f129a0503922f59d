"""Causal attention for several documents laid end to end, none of which sees another.

B batch (always 1), H heads, K key/value heads, T tokens of all documents, L tokens of one document, D head size
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "peft_mcp_documents"


def register() -> None:
    """Make the attention known to transformers under NAME."""
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
    **_others: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it; `document_lengths` comes through the model's keyword arguments.

    Returns [B, T, H, D]. Without lengths the whole sequence is one document. Masks are not needed: each document is
    purely causal. Work is the sum of L^2 instead of T^2.
    """
    del module, attention_mask
    if query_BHTD.device.type == "mps":  # no grouped attention there before torch 2.13
        groups = query_BHTD.shape[1] // key_BKTD.shape[1]
        key_BKTD, value_BKTD = (x.repeat_interleave(groups, dim=1) for x in (key_BKTD, value_BKTD))
    grouped = query_BHTD.shape[1] != key_BKTD.shape[1]
    lengths = list(document_lengths or (query_BHTD.shape[2],))
    out_BLHD = [
        scaled_dot_product_attention(
            query_BHLD, key_BKLD, value_BKLD, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        ).transpose(1, 2)
        for query_BHLD, key_BKLD, value_BKLD in zip(
            query_BHTD.split(lengths, 2), key_BKTD.split(lengths, 2), value_BKTD.split(lengths, 2), strict=True
        )
    ]
    return torch.cat(out_BLHD, dim=1), None


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None
