"""Compare what another runtime computes from the written file with PEFT in float32.

Equal text and a good loss are no evidence: with the rows of q and k in the wrong order, the loss of a real adapter was even a
little lower. So log-probabilities are compared position by position, and the adapter's effect by itself: a difference that the
number format causes is the same with and without the adapter and cancels out; a wrong conversion does not.

T positions, V vocabulary
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peft_core.base_models.tokenizer import BaseTokenizer
from peft_core.data.dataset import read_examples
from peft_core.errors import ExportError
from peft_core.evaluation.stdlib_code import stdlib_examples
from peft_core.llamacpp.worker.lora_pairs import Array
from peft_core.llamacpp.worker.score import LlamaScores, Position
from peft_core.modeling.adapter_model import ResidentModel
from peft_core.schemas.dataset import Example
from peft_core.schemas.export import Verification

POSITIONS = 200
DOCUMENTS = 4
TOP = 200  # likeliest tokens of a position that are compared
# Largest mean difference of a log-probability, by the type of the weights. Measured on the bundled base model: F32 0.0001, F16
# 0.007, types with 8 bits or fewer 0.2, because ggml rounds activations for them; a wrong conversion 0.5 to 2.6.
# With fewer than 8 bits there is no limit: rounding alone may destroy the update, which is measured and said.
LIMITS = {"f32": 0.05, "f16": 0.05, "bf16": 0.1, "q8_0": 0.35}
_EXACT_ENOUGH = ("f32", "f16", "bf16")  # for the adapter's effect to be compared by itself
MAX_EFFECT_ERROR = 0.1  # measured: 0.001 to 0.01 when right, 0.3 to 1 when wrong
_MEASURABLE_EFFECT = 1e-3
_MEASURABLE_GAIN = 0.02  # nats per token


@dataclass(frozen=True)
class HeldOutText:
    documents: tuple[tuple[int, ...], ...]
    name: str  # what it is, for the report

    @property
    def positions(self) -> int:
        return sum(len(document) - 1 for document in self.documents)


@dataclass(frozen=True, eq=False)
class Reference:
    """Log-probabilities in PEFT, for each document and position."""

    with_adapter: tuple[Array, ...]  # TV
    without_adapter: tuple[Array, ...]


def held_out_text(tokenizer: BaseTokenizer, held_out: Path | None, context_length: int) -> HeldOutText:
    """Choose documents: of the adapter's own held-out examples if they are still there, else of packaged library code."""
    if held_out is not None:
        documents = _documents([e for e in read_examples(held_out) if _is_plain(e)], tokenizer, context_length)
        if sum(map(len, documents)) >= POSITIONS // 2:
            return HeldOutText(documents, "held-out examples of the adapter's training")
    documents = _documents(stdlib_examples(), tokenizer, context_length)
    return HeldOutText(documents, "functions of Python's standard library")


def _is_plain(example: Example) -> bool:
    """Whether it is plain text: fill-in-the-middle and chat examples contain markers."""
    return all(segment.literal or segment.learn for segment in example.segments)


def _documents(
    examples: Sequence[Example], tokenizer: BaseTokenizer, context_length: int
) -> tuple[tuple[int, ...], ...]:
    length = min(POSITIONS // DOCUMENTS + 1, context_length - 1)
    tokenised = [tuple(tokenizer.ids(example.text)[:length]) for example in examples]
    tokenised = [document for document in tokenised if len(document) > 2]
    random.Random("export").shuffle(tokenised)  # noqa: S311 -- a sample, not a secret
    return tuple(sorted(tokenised, key=len, reverse=True)[:DOCUMENTS])


def reference(model: ResidentModel, adapter: str | None, text: HeldOutText) -> Reference:
    """Compute the log-probabilities with and without the adapter that is registered as `adapter`; None: there is none."""
    model.select(None)
    without = tuple(_log_probs(model, document) for document in text.documents)
    if adapter is None:
        return Reference(without, without)
    model.select(adapter)
    return Reference(tuple(_log_probs(model, document) for document in text.documents), without)


def _log_probs(model: ResidentModel, document: tuple[int, ...]) -> Array:
    ids = torch.tensor([document[:-1]], device=model.causal.device)
    with torch.inference_mode():
        logits = model.causal(input_ids=ids, use_cache=False).logits[0].float()
        return np.asarray(torch.log_softmax(logits, dim=-1).cpu().numpy())


def compare_scores(text: HeldOutText, ours: Reference, theirs: LlamaScores, kind: str) -> Verification:
    """Compare with llama.cpp. `kind` is the type of the matrices that it computed with.

    Raises:
        ExportError: It computes something else.
    """
    there, here = _sparse(theirs.with_adapter, ours.with_adapter)
    differences = np.abs(there - here)
    base_difference = runtime_gain = kept = None
    gain = _loss(text, ours.without_adapter) - _loss(text, ours.with_adapter)
    if (without := theirs.without_adapter) is not None:
        base_there, base_here = _sparse(without, ours.without_adapter)
        base_difference = _mean(np.abs(base_there - base_here))
        runtime_gain = _target_loss(without) - _target_loss(theirs.with_adapter)
        kept = _part(runtime_gain, gain)
    effect, effect_error = _effect(text, ours, theirs)
    return judged(
        Verification(
            status="verified",
            runtime=theirs.runtime,
            positions=text.positions,
            text=text.name,
            mean_difference=_mean(differences),
            max_difference=float(differences.max()),
            base_difference=base_difference,
            limit=LIMITS.get(kind),
            effect=effect,
            effect_error=effect_error if kind in _EXACT_ENOUGH else None,
            gain=gain,
            runtime_gain=runtime_gain,
            kept=kept,
        )
    )


def judged(verification: Verification) -> Verification:
    """Return it with rounded figures, if they are within the limits.

    Raises:
        ExportError: They are not.
    """
    difference, limit, error = verification.mean_difference, verification.limit, verification.effect_error
    assert difference is not None  # noqa: S101 -- the callers measured it
    if limit is None:
        limit = math.inf
    if not (difference < limit and (error is None or error < MAX_EFFECT_ERROR)):
        wrong_effect = f"; {100 * error:.0f} % of the adapter's effect differs" if error is not None else ""
        raise ExportError(
            f"The written file computes something else than the adapter in {verification.runtime}: log-probabilities "
            f"differ by {difference:.3f} on average (limit {limit:g}){wrong_effect}. It was deleted.",
            code="export_not_equal",
            suggestions=["Export it in another form", "Report it, with the log"],
            details=verification.model_dump(),
        )
    numbers = {name: round(value, 5) for name, value in verification.model_dump().items() if isinstance(value, float)}
    return verification.model_copy(update=numbers)


def compare_references(
    text: HeldOutText, ours: Reference, theirs: Reference, runtime: str, limit: float
) -> Verification:
    """Compare two sets of complete log-probabilities.

    Raises:
        ExportError: They differ.
    """
    differences = [np.abs(b - a) for a, b in zip(ours.with_adapter, theirs.with_adapter, strict=True)]
    gain = _loss(text, ours.without_adapter) - _loss(text, ours.with_adapter)
    runtime_gain = _loss(text, theirs.without_adapter) - _loss(text, theirs.with_adapter)
    effects = [np.abs(a - b) for a, b in zip(ours.with_adapter, ours.without_adapter, strict=True)]
    return judged(
        Verification(
            status="verified",
            runtime=runtime,
            positions=text.positions,
            text=text.name,
            mean_difference=_mean(np.concatenate(differences)),
            max_difference=float(max(difference.max() for difference in differences)),
            limit=limit,
            effect=_mean(np.concatenate(effects)),
            gain=gain,
            runtime_gain=runtime_gain,
            kept=_part(runtime_gain, gain),
        )
    )


def _sparse(theirs: Sequence[Sequence[Position]], ours: Sequence[Array]) -> tuple[Array, Array]:
    """Return the log-probabilities of the runtime's likeliest tokens, there and in PEFT."""
    there: list[float] = []
    here: list[Any] = []
    for positions, log_probs_TV in zip(theirs, ours, strict=True):
        for position, log_probs_V in zip(positions, log_probs_TV, strict=True):
            there += position.log_probs
            here.append(log_probs_V[list(position.ids)])
    return np.asarray(there, np.float64), np.concatenate(here).astype(np.float64)


def _effect(text: HeldOutText, ours: Reference, theirs: LlamaScores) -> tuple[float, float | None]:
    """Return the mean change of a next token's and of likely tokens' log-probability, and the part of it that differs there."""
    changes_here: list[float] = []
    changes_there: list[float] = []
    without = theirs.without_adapter
    for number, document in enumerate(text.documents):
        for n in range(len(document) - 1):
            on, off = ours.with_adapter[number][n], ours.without_adapter[number][n]
            if without is None:
                ids = list(theirs.with_adapter[number][n].ids)
                changes_here += (on[ids] - off[ids]).tolist()
                continue
            there_on = _by_token(theirs.with_adapter[number][n], document[n + 1])
            there_off = _by_token(without[number][n], document[n + 1])
            common = sorted(there_on.keys() & there_off.keys())
            changes_here += (on[common] - off[common]).tolist()
            changes_there += [there_on[token] - there_off[token] for token in common]
    here = np.asarray(changes_here)
    effect = _mean(np.abs(here))
    if not changes_there or effect < _MEASURABLE_EFFECT:
        return effect, None
    return effect, _mean(np.abs(np.asarray(changes_there) - here)) / effect


def _by_token(position: Position, target: int) -> dict[int, float]:
    return {**dict(zip(position.ids, position.log_probs, strict=True)), target: position.target}


def _loss(text: HeldOutText, log_probs: Sequence[Array]) -> float:
    """Return the mean of -log p of the next tokens, in nats."""
    values = [
        -rows_TV[np.arange(len(document) - 1), list(document[1:])]
        for document, rows_TV in zip(text.documents, log_probs, strict=True)
    ]
    return _mean(np.concatenate(values))


def _target_loss(scores: Sequence[Sequence[Position]]) -> float:
    return _mean(-np.asarray([position.target for positions in scores for position in positions]))


def _part(runtime_gain: float, gain: float) -> float | None:
    """Return the part of the gain that is left, unless there was too little of it."""
    return runtime_gain / gain if abs(gain) >= _MEASURABLE_GAIN else None


def _mean(values: Array) -> float:
    return float(np.mean(values, dtype=np.float64))


def require_positions(text: HeldOutText) -> None:
    """Raise ExportError if there is no text to compare on."""
    if not text.positions:
        raise ExportError("There is no text to compare on: the tokenizer gives no tokens.", code="export_no_text")
