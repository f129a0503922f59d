"""Chunked cross-entropy against a frozen output head: the logits of all positions never exist at the same time.

Hand-written because published kernels of this kind (Liger, cut-cross-entropy) run on CUDA alone.

N positions with a target, C positions of one chunk, R rows of a chunk that are in float32, D model size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from peft_core.modeling.quantised import Bf16Matrix, FrozenMatrix
from peft_core.planning.cost_model import LOGITS_IN_FLOAT32, LOSS_POSITIONS


class ChunkedLMHead:
    """An output head W with a buffer for the logits of one chunk, because fresh memory for each one is a quarter slower."""

    def __init__(self, W_VD: FrozenMatrix) -> None:
        self._W_VD = W_VD
        self.positions = LOSS_POSITIONS["bfloat16" if isinstance(W_VD, Bf16Matrix) else "float32"]  # of a chunk
        self.release()

    def cross_entropy(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> torch.Tensor:
        """Return the sum over N of -log softmax(hidden @ W.T)[target] in nats, a float32 scalar; exact, without sampling.

        Peak memory is C x V instead of N x V. Only `hidden_ND` gets a gradient. Negative targets are ignored.
        """
        with torch.autocast(hidden_ND.device.type, enabled=False):  # this code chooses the number formats itself
            loss: torch.Tensor = _CrossEntropy.apply(hidden_ND, self, target_N)
        return loss

    def scores(self, hidden_ND: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return -log p(target) in nats and the most likely token, each [N], without gradients."""
        losses, likeliest = [], []
        with torch.no_grad(), torch.autocast(hidden_ND.device.type, enabled=False):
            for hidden_CD, target_C in zip(
                hidden_ND.split(self.positions), target_N.split(self.positions), strict=True
            ):
                for rows, logits_RV in self.float32_rows(self.logits(hidden_CD)):
                    loss_R, likeliest_R = logit_scores(logits_RV, target_C[rows])
                    losses.append(loss_R)
                    likeliest.append(likeliest_R)
        return torch.cat(losses), torch.cat(likeliest)

    def logits(self, hidden_CD: torch.Tensor) -> torch.Tensor:
        """Return the logits [C, V] in the head's product type. The next call overwrites them."""
        logits_CV = self._logits_buffer(len(hidden_CD), hidden_CD.device)
        if isinstance(self._W_VD, Bf16Matrix):  # stay in bf16: `matmul` would make a float32 copy
            return torch.mm(hidden_CD.bfloat16(), self._W_VD.storage.T, out=logits_CV)
        return self._W_VD.matmul(hidden_CD.float(), out=logits_CV)

    def float32_rows(self, logits_CV: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield (rows, logits [R, V] in float32): float32 logits in one piece, others copied to a buffer, R rows at a time."""
        if logits_CV.dtype == torch.float32:
            yield slice(None), logits_CV
            return
        positions, vocabulary = logits_CV.shape
        step = max(1, LOGITS_IN_FLOAT32 // vocabulary if logits_CV.is_cpu else positions)
        buffer_RV = torch.empty(min(step, positions), vocabulary, device=logits_CV.device)
        for start in range(0, max(1, positions), step):  # one empty piece if there are no positions
            rows = slice(start, start + step)
            logits_RV = logits_CV[rows]
            yield rows, buffer_RV[: len(logits_RV)].copy_(logits_RV)

    def gradient(self, grad_CV: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the hidden states, float32 [C, D], from that of the logits in their own type."""
        return self._W_VD.matmul_t(grad_CV)

    def release(self) -> None:
        """Free the logits buffer; the next chunk allocates it again."""
        self._logits_CV = self._empty(0, torch.device("cpu"))

    def _logits_buffer(self, positions: int, device: torch.device) -> torch.Tensor:
        if len(self._logits_CV) < positions or self._logits_CV.device != device:
            size = min(self.positions, max(positions, 2 * len(self._logits_CV)))
            self.release()  # so that the two buffers do not exist at the same time
            self._logits_CV = self._empty(size, device)
        return self._logits_CV[:positions]

    def _empty(self, positions: int, device: torch.device) -> torch.Tensor:
        return torch.empty(positions, self._W_VD.shape[0], dtype=self._W_VD.product_dtype, device=device)


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradient in its forward pass. The head is frozen, so only the hidden states have a gradient."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: torch.Tensor, head: ChunkedLMHead, target_N: torch.Tensor) -> torch.Tensor:
        grad_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        for start in range(0, hidden_ND.shape[0], head.positions):
            chunk = slice(start, start + head.positions)
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
    hidden_CD: torch.Tensor, head: ChunkedLMHead, target_C: torch.Tensor, grad_CD: torch.Tensor | None
) -> torch.Tensor:
    """Return the sum of the losses, and write the gradient of the hidden states into `grad_CD` if given."""
    learn_C1 = (target_C >= 0)[:, None]  # IGNORED is negative
    target_C1 = target_C.clamp(min=0)[:, None]
    logits_CV = head.logits(hidden_CD)
    losses = []
    for rows, logits_RV in head.float32_rows(logits_CV):
        target_R1 = target_C1[rows]
        top_R1, top_at_R1 = logits_RV.max(dim=-1, keepdim=True)
        margin_R1 = top_R1 - logits_RV.gather(1, target_R1)
        probability_RV = torch.softmax(logits_RV, dim=-1, out=logits_RV)
        # -log softmax(z)_t = max(z) - z_t - log softmax(z)_max: no exp can underflow here
        losses.append(margin_R1 - probability_RV.gather(1, top_at_R1).log())
        if grad_CD is not None:
            # d loss / d logits = softmax - one-hot
            probability_RV.scatter_add_(1, target_R1, torch.full_like(margin_R1, -1.0))
            if logits_CV.dtype != torch.float32:
                logits_CV[rows] = probability_RV
    if grad_CD is not None:
        grad_CD.copy_(head.gradient(logits_CV) * learn_C1)
    return torch.where(learn_C1, torch.cat(losses), 0.0).sum()


def logit_scores(logits_NV: torch.Tensor, target_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return -log p(target) in nats and the most likely token, each [N]. Overwrites the float32 logits to save a copy."""
    top_N, likeliest_N = logits_NV.max(dim=-1)
    margin_N = top_N - logits_NV.gather(1, target_N[:, None])[:, 0]
    loss_N = margin_N + logits_NV.sub_(top_N[:, None]).exp_().sum(dim=-1).log()
    return loss_N, likeliest_N
