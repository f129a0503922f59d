"""The loss of a micro-batch: the fast way where the base allows it, the model's own way elsewhere. Same value.

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
# What 16 bits may make of logits, as a share of how far they spread. Of the bundled base: attention by another kernel 0.03,
# documents that see each other 0.7, a head that rounds its result 0.006.
_PACKED_ROUNDING, _HEAD_ROUNDING = 0.1, 0.02


@dataclass
class Objective:
    """How to compute the loss of a micro-batch with one base.

    `packed`: several documents go through the decoder at once, otherwise one. `head`: where it is a plain matrix, so that
    logits are never held as a whole.
    """

    model: PreTrainedModel  # PEFT injects the adapter into its modules, so this is base and adapter in turn
    packed: bool
    head: ChunkedLMHead | None
    capacity: int  # tokens of a micro-batch at most; 0 keeps every document by itself
    multiple_of: int | None = None  # tokens of every micro-batch, on devices that want few different shapes
    recomputes: bool = False  # what layers compute is not kept

    def batches(self, documents: Iterable[Document], device: torch.device) -> Iterator[MicroBatch]:
        """All documents, each once, as many at a time as are computed at once."""
        return micro_batches(documents, self.capacity, device, self.multiple_of)

    def reduce_memory(self, tokens: int, longest: int) -> bool:
        """Compute the same in a leaner way from now on, if there is one left.

        `tokens`: of the micro-batch that was too large. `longest`: of the longest document, which is not divided.
        """
        set_malloc_trim()
        least = longest if self.multiple_of is None else -(-longest // self.multiple_of) * self.multiple_of
        if self.packed and tokens > least:  # a document by itself stays by itself
            self.capacity = max(least, tokens // 2)
            return True
        return self.recompute_layers()

    def recompute_layers(self) -> bool:
        """From now on keep of each layer its input alone, and compute the rest again when gradients need it.

        Costs a third of the speed, and frees most of what grows with the tokens of a micro-batch (Chen et al., arXiv
        1604.06174). False where that is so already, or the model has no layers that can be computed again.
        """
        # transformers' mark of a layer; ours may have replaced its forward
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if self.recomputes or not layers:
            return False
        self.recomputes = True
        set_malloc_trim()
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        return True

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        """Sum of -log p(target) over the N targets of a micro-batch, nats, float32 scalar."""
        if self.head is not None:
            hidden_TD = _hidden(self.model, batch, packed=self.packed)
            return self.head.cross_entropy(hidden_TD[batch.source_N], batch.target_N)
        logits_TV = _logits(self.model, batch, packed=self.packed)
        return cross_entropy(logits_TV[batch.source_N].float(), batch.target_N, reduction="sum", ignore_index=IGNORED)

    def scores(self, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """(-log p(target) in nats, the likeliest token instead), one of each for a target. Without gradients."""
        learned_N = batch.target_N != IGNORED
        target_N = batch.target_N.clamp(min=0)
        if self.head is not None:
            hidden_TD = _hidden(self.model, batch, packed=self.packed)
            loss_N, likeliest_N = self.head.scores(hidden_TD[batch.source_N], target_N)
        else:
            logits_TV = _logits(self.model, batch, packed=self.packed)
            loss_N, likeliest_N = logit_scores(logits_TV[batch.source_N].float(), target_N)
        return loss_N[learned_N], likeliest_N[learned_N]


def probe_fast_paths(model: PreTrainedModel, max_length: int, *, uses_bf16_blocks: bool = False) -> Objective:
    """Try the fast ways on two tiny documents and keep those whose logits equal the model's own.

    A proof by example covers architectures that nobody listed: ones that ignore `document_lengths`, mix neighbours by
    convolution, cap attention or scale logits. What two short documents cannot show is read from the configuration.
    Leaves the model's attention set accordingly. `narrow_blocks`: they will be computed in bfloat16 on a CPU.
    """
    device = next(model.parameters()).device
    vocabulary = len(cast("nn.Embedding", model.get_input_embeddings()).weight)
    documents = [_probe(length, vocabulary) for length in _PROBE_LENGTHS]
    with torch.no_grad():
        own_TV = torch.cat([_logits(model, join([document], device), packed=False) for document in documents])
        packed = _can_pack(model, max_length) and _packs(model, documents, own_TV, device)
        if not packed and model.config._attn_implementation == attention.NAME:  # noqa: SLF001 -- no public name for it
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")  # noqa: SLF001 -- likewise
        head = ChunkedLMHead(_head(model)) if _has_plain_head(model) else None
        if head is not None and not _agrees(
            model,
            _head_logits(model, head, documents, device),
            own_TV,
            _HEAD_ROUNDING,
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
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    if any(window is not None and window < max_length for window in windows) or not model._supports_attention_backend:  # noqa: SLF001 -- transformers' own flag, it has no public name
        return False
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return True


def _packs(model: PreTrainedModel, documents: list[Document], own_TV: torch.Tensor, device: torch.device) -> bool:
    """Whether documents laid end to end come out as each by itself, the last one whatever stands before it.

    The second question finds in 16 bits what the first one cannot tell from rounding there, such as one layer of many that
    looks across the border: the same kernels compute the same numbers, so that nothing at all may change.
    """
    *before, last = documents
    others = [replace(document, ids_T=document.ids_T.flip(0)) for document in before]
    packed_TV, beside_others_TV = (_packed_logits(model, join([*some, last], device)) for some in (before, others))
    if packed_TV is None or beside_others_TV is None:
        return False
    last_LV, same_LV = (logits_TV[-len(last) :].float() for logits_TV in (packed_TV, beside_others_TV))
    unmoved = (last_LV - same_LV).abs().max() <= 1e-4 * last_LV.abs().max()
    return bool(unmoved) and _agrees(model, packed_TV, own_TV, _PACKED_ROUNDING)


def _packed_logits(model: PreTrainedModel, batch: MicroBatch) -> torch.Tensor | None:
    try:
        return _logits(model, batch, packed=True)
    except (TypeError, ValueError, RuntimeError) as error:
        # It takes no further arguments, or our attention is none for it.
        if is_out_of_memory(error):
            raise
        _log.info("packing_refused", reason=describe_error(error))
        return None


def _head_logits(
    model: PreTrainedModel,
    head: ChunkedLMHead,
    documents: list[Document],
    device: torch.device,
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
    assert isinstance(head, nn.Linear)  # noqa: S101 -- `_has_plain_head` was asked first
    return matrix_of(head)


def _agrees(model: PreTrainedModel, logits_TV: torch.Tensor, own_TV: torch.Tensor, rounding: float) -> bool:
    """Equal up to 1e-4 of the largest logit; in 16 bits, where a token's logits stand to each other up to `rounding`, r.m.s."""
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
    """Tokens from all over the vocabulary: the first ones are marks of a dialogue, over which bases are at a loss."""
    ids_T = torch.linspace(0.05 * vocabulary, 0.95 * vocabulary, length).int()
    return Document(ids_T=ids_T, learn_T=torch.arange(length) > 0)
