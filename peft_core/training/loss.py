"""Cross-entropy against a frozen head, without ever holding the logits of all positions.

N positions with a target, C positions of one chunk, D model size, V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch

from peft_core.compute.stored import StoredMatrix

_CHUNK = 256  # positions; 50 MB of logits at a vocabulary of 49152


class _FrozenHeadCrossEntropy(torch.autograd.Function):
    """The head is frozen, so all that backward needs is the gradient of the hidden states: forward computes it."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, head_VD: StoredMatrix, target_N: torch.Tensor) -> torch.Tensor:
        grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], _CHUNK):
            chunk = slice(start, start + _CHUNK)
            grad_CD = None if grad_ND is None else grad_ND[chunk]
            total += _chunk_loss(hidden_ND[chunk], head_VD, target_N[chunk], grad_CD)
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad, None, None


def _chunk_loss(
    hidden_CD: torch.Tensor, head_VD: StoredMatrix, target_C: torch.Tensor, grad_CD: torch.Tensor | None
) -> torch.Tensor:
    """Sum of the losses; the gradient of the hidden states goes into `grad_CD` if given.

    A function of its own so that one chunk's logits are gone before the next chunk's are made.
    """
    learn_C1 = (target_C >= 0)[:, None]  # IGNORED is negative
    target_C1 = target_C.clamp(min=0)[:, None]
    logits_CV = head_VD.times(hidden_CD.float())
    top_C1, top_at_C1 = logits_CV.max(dim=-1, keepdim=True)
    margin_C1 = top_C1 - logits_CV.gather(1, target_C1)
    probability_CV = torch.softmax(logits_CV, dim=-1, out=logits_CV)
    # -log softmax(z)_t = max(z) - z_t - log softmax(z)_max: no exp can underflow here
    loss_C1 = margin_C1 - probability_CV.gather(1, top_at_C1).log()
    loss = torch.where(learn_C1, loss_C1, 0.0).sum()
    if grad_CD is not None:
        # d loss / d logits = softmax - one-hot
        probability_CV.scatter_add_(1, target_C1, torch.full_like(margin_C1, -1.0))
        grad_CD.copy_(head_VD.times_transposed(probability_CV) * learn_C1)
    return loss


def frozen_head_cross_entropy(hidden_ND: torch.Tensor, head_VD: StoredMatrix, target_N: torch.Tensor) -> torch.Tensor:
    """Sum over N of -log softmax(hidden @ head.T)[target], nats, float32; exact, no sampling.

    Peak memory is C x V instead of N x V. Only `hidden_ND` gets a gradient. Negative targets are left out.
    """
    with torch.autocast(hidden_ND.device.type, enabled=False):  # the number formats are chosen above, one by one
        loss: torch.Tensor = _FrozenHeadCrossEntropy.apply(hidden_ND, head_VD, target_N)
    return loss


def frozen_head_scores(
    hidden_ND: torch.Tensor, head_VD: StoredMatrix, target_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(-log p(target) in nats, the likeliest token), each [N]. Without gradients, logits in chunks."""
    losses, likeliest = [], []
    with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
        for start in range(0, hidden_ND.shape[0], _CHUNK):
            chunk = slice(start, start + _CHUNK)
            loss_C, likeliest_C = logit_scores(head_VD.times(hidden_ND[chunk].float()), target_N[chunk])
            losses.append(loss_C)
            likeliest.append(likeliest_C)
    if not losses:
        return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    return torch.cat(losses), torch.cat(likeliest)


def logit_scores(logits_NV: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(-log p(target) in nats, the likeliest token), each [N]; float32 logits, which are overwritten: no second copy."""
    top_N, likeliest_N = logits_NV.max(dim=-1)
    margin_N = top_N - logits_NV.gather(1, target_N[:, None])[:, 0]
    loss_N = margin_N + logits_NV.sub_(top_N[:, None]).exp_().sum(dim=-1).log()
    return loss_N, likeliest_N
