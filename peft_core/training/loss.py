"""Cross-entropy against a frozen head, without ever holding the logits of all positions.

N positions with a target, C positions of one chunk, D model size, V vocabulary
"""

from __future__ import annotations

from typing import Any

import torch

from peft_core.compute.stored import StoredMatrix
from peft_core.estimate import LOSS_POSITIONS


class FrozenHead:
    """An output head W, and room for the logits of a chunk, which stays: fresh memory for each takes a quarter longer."""

    def __init__(self, W_VD: StoredMatrix) -> None:
        self._W_VD = W_VD
        self.release()

    def cross_entropy(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        """Sum over N of -log softmax(hidden @ W.T)[target], nats, float32; exact, no sampling.

        Peak memory is C x V instead of N x V. Only `hidden_ND` gets a gradient. Negative targets are left out.
        """
        with torch.autocast(hidden_ND.device.type, enabled=False):  # the number formats are chosen here, one by one
            loss: torch.Tensor = _CrossEntropy.apply(hidden_ND, self, target_N)
        return loss

    def scores(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(-log p(target) in nats, the likeliest token), each [N]. Without gradients, logits in chunks."""
        losses, likeliest = [], []
        with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
            for hidden_CD, target_C in zip(
                hidden_ND.split(LOSS_POSITIONS), target_N.split(LOSS_POSITIONS), strict=True
            ):
                loss_C, likeliest_C = logit_scores(self.logits(hidden_CD), target_C)
                losses.append(loss_C)
                likeliest.append(likeliest_C)
        return torch.cat(losses), torch.cat(likeliest)

    def logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """float32 [C, V], in memory that the next chunk takes again."""
        logits_CV = self._room(len(hidden_CD), hidden_CD.device)
        if self._W_VD.in_bfloat16:
            narrow_CV = self._narrow_CV[: len(hidden_CD)]
            return logits_CV.copy_(torch.mm(hidden_CD.bfloat16(), self._W_VD.bfloat16.T, out=narrow_CV))
        return self._W_VD.times(hidden_CD.float(), out=logits_CV)

    def gradient(self, grad_CV: torch.Tensor) -> torch.Tensor:
        """That of the hidden states, float32 [C, D], where `grad_CV` is that of the logits."""
        if self._W_VD.in_bfloat16:
            return (self._narrow_CV[: len(grad_CV)].copy_(grad_CV) @ self._W_VD.bfloat16).float()
        return self._W_VD.times_transposed(grad_CV)

    def release(self) -> None:
        """Give up the room for logits; it is made anew when it is needed."""
        self._logits_CV, self._narrow_CV = self._rooms(0, torch.device("cpu"))

    def _room(self, positions: int, device: torch.device) -> torch.Tensor:
        if len(self._logits_CV) < positions or self._logits_CV.device != device:
            enough = min(LOSS_POSITIONS, max(positions, 2 * len(self._logits_CV)))
            self._logits_CV, self._narrow_CV = self._rooms(0, device)
            self._logits_CV, self._narrow_CV = self._rooms(enough, device)  # both, or neither
        return self._logits_CV[:positions]

    def _rooms(self, positions: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """For logits in float32, and for what is multiplied in bfloat16 where it is."""
        vocabulary = len(self._W_VD.blocks)
        narrow = positions if self._W_VD.in_bfloat16 else 0
        return (
            torch.empty(positions, vocabulary, device=device),
            torch.empty(narrow, vocabulary, dtype=torch.bfloat16, device=device),
        )


class _CrossEntropy(torch.autograd.Function):
    """The head is frozen, so all that backward needs is the gradient of the hidden states: forward computes it."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, head: FrozenHead, target_N: torch.Tensor) -> torch.Tensor:
        grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], LOSS_POSITIONS):
            chunk = slice(start, start + LOSS_POSITIONS)
            grad_CD = None if grad_ND is None else grad_ND[chunk]
            total += _chunk_loss(hidden_ND[chunk], head, target_N[chunk], grad_CD)
        if grad_ND is not None:
            ctx.save_for_backward(grad_ND)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_ND,) = ctx.saved_tensors
        return grad_ND * grad, None, None


def _chunk_loss(
    hidden_CD: torch.Tensor, head: FrozenHead, target_C: torch.Tensor, grad_CD: torch.Tensor | None
) -> torch.Tensor:
    """Sum of the losses; the gradient of the hidden states goes into `grad_CD` if given."""
    learn_C1 = (target_C >= 0)[:, None]  # IGNORED is negative
    target_C1 = target_C.clamp(min=0)[:, None]
    logits_CV = head.logits(hidden_CD)
    top_C1, top_at_C1 = logits_CV.max(dim=-1, keepdim=True)
    margin_C1 = top_C1 - logits_CV.gather(1, target_C1)
    probability_CV = torch.softmax(logits_CV, dim=-1, out=logits_CV)
    # -log softmax(z)_t = max(z) - z_t - log softmax(z)_max: no exp can underflow here
    loss_C1 = margin_C1 - probability_CV.gather(1, top_at_C1).log()
    loss = torch.where(learn_C1, loss_C1, 0.0).sum()
    if grad_CD is not None:
        # d loss / d logits = softmax - one-hot
        probability_CV.scatter_add_(1, target_C1, torch.full_like(margin_C1, -1.0))
        grad_CD.copy_(head.gradient(probability_CV) * learn_C1)
    return loss


def logit_scores(logits_NV: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(-log p(target) in nats, the likeliest token), each [N]; float32 logits, which are overwritten: no second copy."""
    top_N, likeliest_N = logits_NV.max(dim=-1)
    margin_N = top_N - logits_NV.gather(1, target_N[:, None])[:, 0]
    loss_N = margin_N + logits_NV.sub_(top_N[:, None]).exp_().sum(dim=-1).log()
    return loss_N, likeliest_N
