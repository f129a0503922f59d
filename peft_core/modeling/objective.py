"""The loss of a micro-batch: by fast paths that were checked against the model's own forward, or by that forward.

T tokens, N positions with a target, D model size, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import structlog
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_core.base_models.families import LOGIT_SETTINGS
from peft_core.modeling import attention
from peft_core.modeling.batches import IGNORED, Document, MicroBatch, join, micro_batches
from peft_core.modeling.lm_head import ChunkedLMHead, logit_scores
from peft_core.modeling.load import FrozenLinear, matrix_of
from peft_core.modeling.memory import set_malloc_trim
from peft_core.modeling.mps import fixed_shapes
from peft_core.modeling.quantised import Bf16Matrix, FrozenMatrix
from peft_core.planning.cost_model import micro_capacity
from peft_core.system.failures import describe_error, is_out_of_memory

_log = structlog.get_logger(__name__)

_PROBE_LENGTHS = (7, 5)
_WINDOWS = ("sliding_window", "attention_chunk_size")  # settings that limit how far attention reaches
# Tolerated rounding of logits in 16 bits, relative to their spread. Measured with the bundled base model: another attention
# kernel 0.03, documents that attend to each other 0.7, a head that rounds its result 0.006.
_PACKED_ROUNDING, _HEAD_ROUNDING = 0.1, 0.02


@dataclass
class Objective:
    """How to compute the loss of a micro-batch with one base model.

    `packed`: a micro-batch holds several documents, otherwise one. `head`: set if the output head is a plain matrix, so that
    logits can be computed in chunks.
    """

    model: PreTrainedModel  # PEFT injects the adapter into its modules, so this is base and adapter in turn
    packed: bool
    head: ChunkedLMHead | None
    capacity: int  # maximum tokens of a micro-batch; 0: one document each
    multiple_of: int | None = None  # of the tokens of every micro-batch, on devices that need few shapes
    recomputes: bool = False  # gradient checkpointing is on

    @property
    def context_tokens(self) -> int | None:
        """The longest document that it computes as the model itself does; None: the configuration has no limit."""
        names = ["max_position_embeddings", *(_WINDOWS if self.packed else ())]
        limits = [getattr(self.model.config, name, None) for name in names]
        return min((limit for limit in limits if limit is not None), default=None)

    def batches(self, documents: Iterable[Document], device: torch.device) -> Iterator[MicroBatch]:
        """Yield all documents, each once, in micro-batches."""
        return micro_batches(documents, self.capacity, device, self.multiple_of)

    def reduce_memory(self, tokens: int, longest: int) -> bool:
        """Use less memory from now on: smaller micro-batches, then gradient checkpointing. Return False if both are exhausted.

        `tokens`: of the micro-batch that was too large. `longest`: tokens of the longest document, which is never split.
        """
        set_malloc_trim()
        least = longest if self.multiple_of is None else -(-longest // self.multiple_of) * self.multiple_of
        if self.packed and tokens > least:  # a single document cannot be divided
            self.capacity = max(least, tokens // 2)
            return True
        return self.enable_gradient_checkpointing()

    def enable_gradient_checkpointing(self) -> bool:
        """Save only the input of each layer, and recompute the rest in the backward pass (Chen et al., arXiv 1604.06174).

        Costs a third of the speed, and frees most of the memory that grows with the tokens of a micro-batch. Returns False if
        it is on already, or the model has no layers that support it.
        """
        # transformers marks layers by this class; fused blocks may have replaced their forward
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if self.recomputes or not layers:
            return False
        self.recomputes = True
        set_malloc_trim()
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        return True

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        """Return the sum of -log p(target) over the N targets of a micro-batch in nats, a float32 scalar."""
        if self.head is not None:
            hidden_TD = _hidden(self.model, batch, packed=self.packed)
            return self.head.cross_entropy(hidden_TD[batch.source_N], batch.target_N)
        logits_TV = _logits(self.model, batch, packed=self.packed)
        return cross_entropy(logits_TV[batch.source_N].float(), batch.target_N, reduction="sum", ignore_index=IGNORED)

    def scores(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return -log p(target) in nats and the most likely token for each target, without gradients."""
        is_target_N = batch.target_N != IGNORED
        target_N = batch.target_N.clamp(min=0)
        if self.head is not None:
            hidden_TD = _hidden(self.model, batch, packed=self.packed)
            loss_N, likeliest_N = self.head.scores(hidden_TD[batch.source_N], target_N)
        else:
            logits_TV = _logits(self.model, batch, packed=self.packed)
            loss_N, likeliest_N = logit_scores(logits_TV[batch.source_N].float(), target_N)
        return loss_N[is_target_N], likeliest_N[is_target_N]


def probe_fast_paths(model: PreTrainedModel, max_length: int, *, uses_bf16_blocks: bool = False) -> Objective:
    """Try the fast paths on two tiny documents, and use those whose logits equal the model's own.

    The test covers unlisted architectures, such as those that ignore `document_lengths`, mix neighbours by convolution, cap
    attention or scale logits. What two short documents cannot show is read from the configuration. Sets the model's attention
    accordingly. `uses_bf16_blocks`: blocks will be computed in bf16 on a CPU, which allows larger micro-batches.
    """
    device = next(model.parameters()).device
    vocabulary = len(cast("nn.Embedding", model.get_input_embeddings()).weight)
    documents = [_probe(length, vocabulary) for length in _PROBE_LENGTHS]
    with torch.no_grad():
        own_TV = torch.cat([_logits(model, join([document], device), packed=False) for document in documents])
        packed = _can_pack(model, max_length) and _packs(model, documents, own_TV, device)
        if not packed and model.config._attn_implementation == attention.NAME:  # noqa: SLF001 -- no public name for it
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")  # noqa: SLF001 -- no public name for it
        head = ChunkedLMHead(_head(model)) if _has_plain_head(model) else None
        if head is not None and not _agrees(
            model, _head_logits(model, head, documents, device), own_TV, _HEAD_ROUNDING
        ):
            head = None
    _log.info("objective_chosen", documents_packed=packed, head_in_chunks=head is not None, model=type(model).__name__)
    return Objective(
        model=model,
        packed=packed,
        head=head,
        capacity=micro_capacity(max_length, device.type, uses_bf16_blocks=uses_bf16_blocks) if packed else 0,
        multiple_of=fixed_shapes(device),
    )


def _can_pack(model: PreTrainedModel, max_length: int) -> bool:
    config = model.config
    windows = [getattr(config, name, None) for name in _WINDOWS]
    if any(window is not None and window < max_length for window in windows) or not model._supports_attention_backend:  # noqa: SLF001 -- transformers' own flag, it has no public name
        return False
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return True


def _packs(model: PreTrainedModel, documents: list[Document], own_TV: torch.Tensor, device: torch.device) -> bool:
    """Return whether packed documents give the same logits as single ones, and the last one ignores what precedes it.

    The second test finds in 16 bits what the first cannot distinguish from rounding, such as one layer of many that attends
    across documents: the same kernels compute the same numbers, so that nothing may change.
    """
    *before, last = documents
    others = [replace(document, ids_T=document.ids_T.flip(0)) for document in before]
    packed_TV, after_others_TV = (_packed_logits(model, join([*first, last], device)) for first in (before, others))
    if packed_TV is None or after_others_TV is None:
        return False
    last_LV, same_LV = (logits_TV[-len(last) :].float() for logits_TV in (packed_TV, after_others_TV))
    is_unchanged = (last_LV - same_LV).abs().max() <= 1e-4 * last_LV.abs().max()
    return bool(is_unchanged) and _agrees(model, packed_TV, own_TV, _PACKED_ROUNDING)


def _packed_logits(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor | None:
    try:
        return _logits(model, batch, packed=True)
    except (TypeError, ValueError, RuntimeError) as error:
        # The model takes no further arguments, or does not support this attention.
        if is_out_of_memory(error):
            raise
        _log.info("packing_refused", reason=describe_error(error))
        return None


def _head_logits(
    model: PreTrainedModel, head: ChunkedLMHead, documents: list[Document], device: torch.device
) -> torch.Tensor:
    hidden_TD = torch.cat([_hidden(model, join([document], device), packed=False) for document in documents])
    return head.logits(hidden_TD)


def _hidden(model: PreTrainedModel, batch: MicroBatch, *, packed: bool) -> torch.Tensor:
    out = model.base_model(input_ids=batch.ids_1T, use_cache=False, **_packing(batch, packed=packed))
    hidden_TD: torch.Tensor = out.last_hidden_state[0]
    return hidden_TD


def _logits(model: PreTrainedModel, batch: MicroBatch, *, packed: bool) -> torch.Tensor:
    out = model(input_ids=batch.ids_1T, use_cache=False, **_packing(batch, packed=packed))
    logits_TV: torch.Tensor = out.logits[0]
    return logits_TV


def _packing(batch: MicroBatch, *, packed: bool) -> dict[str, Any]:
    return {"position_ids": batch.positions_1T, "document_lengths": batch.lengths} if packed else {}


def _has_plain_head(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    changed = any(getattr(model.config, name, None) not in (None, 1, 1.0) for name in LOGIT_SETTINGS)
    return (
        type(head) in (nn.Linear, FrozenLinear) and head.bias is None and model.base_model is not model and not changed
    )


def _head(model: PreTrainedModel) -> FrozenMatrix:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)  # noqa: S101 -- `_has_plain_head` was checked first
    return matrix_of(head)


def _agrees(model: PreTrainedModel, logits_TV: torch.Tensor, own_TV: torch.Tensor, rounding: float) -> bool:
    """Compare logits to 1e-4 of the largest one; in 16 bits, to `rounding` times the spread of a token's logits (RMS)."""
    difference_TV, own_TV = (logits_TV - own_TV).float(), own_TV.float()
    if not _computes_in_16_bits(model):
        return bool(difference_TV.abs().max() <= 1e-4 * own_TV.abs().max())
    difference, spread = (
        (x_TV - x_TV.mean(-1, keepdim=True)).square().mean().sqrt() for x_TV in (difference_TV, own_TV)
    )
    return bool(difference <= rounding * spread)


def _computes_in_16_bits(model: PreTrainedModel) -> bool:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return any(
        isinstance(layer.stored, Bf16Matrix) if isinstance(layer, FrozenLinear) else layer.weight.dtype != torch.float32
        for layer in layers
    )


def _probe(length: int, vocabulary: int) -> Document:
    """Return tokens from the whole vocabulary: its first tokens are dialogue markers, which base models handle badly."""
    ids_T = torch.linspace(0.05 * vocabulary, 0.95 * vocabulary, length).int()
    return Document(ids_T=ids_T, learn_T=torch.arange(length) > 0)
