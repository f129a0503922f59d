"""From what was measured on each example to one Evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz

from peft_core.evaluation.bootstrap import PairedSum, Unit, by_file, compare, unit_for
from peft_core.schemas.evaluation import Comparison, Continuation, Evaluation, Verdict
from peft_core.schemas.frozen import FrozenModel

_SHOWN = 3  # continuations in which the adapter gains most, and in which it loses most
_MARKED = 0.05  # of edit similarity: less is no gain or loss worth showing
_MAX_SHOWN_TEXT = 1200  # characters


class Score(FrozenModel):
    """One model on one example."""

    loss: float  # sum over its target tokens, nats
    lines: int  # written exactly, given the lines before


@dataclass(frozen=True)
class PairedScore:
    """One example, and what both models made of it."""

    file: str
    tokens: int  # with a target
    lines: int
    base: Score
    adapter: Score


@dataclass(frozen=True)
class Completion:
    """What both models wrote from one prompt."""

    file: str
    line: int
    prompt: str
    expected: str
    base: str
    adapter: str


def evaluate(
    held_out: Sequence[PairedScore],
    general: Sequence[PairedScore],
    written: Sequence[Completion],
    *,
    seed: int = 0,
) -> Evaluation:
    """Compare. `held_out` must not be empty; `general` and `written` may be."""
    unit = unit_for(example.file for example in held_out)
    loss = _compare(held_out, lambda e: PairedSum(e.base.loss, e.adapter.loss, e.tokens), unit, seed)
    if loss is None:
        raise ValueError("nothing was measured")
    general_loss = _compare(general, lambda e: PairedSum(e.base.loss, e.adapter.loss, e.tokens), "files", seed)
    verdict, reason = judge(loss, general_loss, unit=unit)
    shown = [_continuation(one) for one in written]
    return Evaluation(
        verdict=verdict,
        reason=reason,
        loss=loss,
        base_perplexity=perplexity(loss.base),
        adapter_perplexity=perplexity(loss.adapter),
        next_line=_compare(held_out, lambda e: PairedSum(e.base.lines, e.adapter.lines, e.lines), unit, seed),
        edit_similarity=_compare_similarity(shown, unit, seed),
        general_loss=general_loss,
        forgets=forgets(general_loss),
        files=len({example.file for example in held_out}),
        examples=len(held_out),
        tokens=sum(example.tokens for example in held_out),
        lines=sum(example.lines for example in held_out),
        prompts=len(written),
        general_tokens=sum(example.tokens for example in general),
        resampled=unit,
        gains=_extremes(shown, sign=1),
        losses=_extremes(shown, sign=-1),
    )


def perplexity(loss: float) -> float:
    """Exp of the loss; 1.8e308 at most, where an untrained model would overflow."""
    return math.exp(min(loss, 709.0))


def _compare(
    examples: Sequence[PairedScore],
    tally: Callable[[PairedScore], PairedSum],
    unit: Unit,
    seed: int,
) -> Comparison | None:
    tallies = [(example.file, tally(example)) for example in examples]
    return compare(by_file(tallies) if unit == "files" else [one for _, one in tallies], seed=seed)


def _compare_similarity(written: Sequence[Continuation], unit: Unit, seed: int) -> Comparison | None:
    tallies = [(one.file, PairedSum(one.base_similarity, one.adapter_similarity, 1)) for one in written]
    return compare(by_file(tallies) if unit == "files" else [tally for _, tally in tallies], seed=seed)


def _continuation(written: Completion) -> Continuation:
    return Continuation(
        file=written.file,
        line=written.line,
        prompt=written.prompt[-_MAX_SHOWN_TEXT:],
        expected=written.expected[:_MAX_SHOWN_TEXT],
        base=written.base[:_MAX_SHOWN_TEXT],
        adapter=written.adapter[:_MAX_SHOWN_TEXT],
        base_similarity=round(edit_similarity(written.base, written.expected), 4),
        adapter_similarity=round(edit_similarity(written.adapter, written.expected), 4),
    )


def _extremes(written: Sequence[Continuation], *, sign: int) -> tuple[Continuation, ...]:
    def gain(one: Continuation) -> float:
        return sign * (one.adapter_similarity - one.base_similarity)

    marked = [one for one in written if gain(one) >= _MARKED]
    return tuple(sorted(marked, key=gain, reverse=True)[:_SHOWN])


# FOLDED FROM peft_core.evaluation.summary: The rule by which an adapter helps, makes no difference, or harms.
#
# 1. The loss on held-out text decides. It must change by MIN_EFFECT at least, and its 95 % interval must leave zero out:
#    below zero the adapter helps, above it harms, else no difference was shown. Without an interval (fewer than five files
#    and fewer than five examples) nothing is shown.
# 2. Whatever it does for the project, an adapter harms when it forgets: the loss on general code rises by more than FORGETS,
#    with an interval above zero, and by more than the held-out loss falls.
#
# Next lines and edit similarity are reported, and decide nothing: they move less than their noise on small held-out sets,
# and a loss that falls while they do not is the common case of a small model.
#

MIN_EFFECT = 0.01  # nats per token: one per cent of perplexity, below the noise between two seeds
FORGETS = 0.3  # nats per token: perplexity on general code up by a third


def forgets(general: Comparison | None) -> bool:
    return general is not None and general.low is not None and general.change > FORGETS and general.low > 0


def judge(loss: Comparison, general: Comparison | None, *, unit: str) -> tuple[Verdict, str]:
    """(verdict, why in one sentence). `unit`: what the intervals were drawn over."""
    if general is not None and forgets(general) and general.change > -loss.change:
        return Verdict.HARMS, (
            f"the loss on general code rises by {general.change:.3f} nats per token {_between(general)}, "
            f"more than the held-out loss falls ({loss.change:+.3f})"
        )
    moved = f"the held-out loss {'falls' if loss.change < 0 else 'rises'} by {abs(loss.change):.3f} nats per token"
    if loss.low is None or loss.high is None:
        return Verdict.NO_DIFFERENCE, f"{moved}, but on too few {unit} to tell it from chance"
    if loss.low <= 0 <= loss.high:
        return Verdict.NO_DIFFERENCE, f"{moved} {_between(loss)}, which may be chance"
    if abs(loss.change) < MIN_EFFECT:
        return Verdict.NO_DIFFERENCE, f"{moved} {_between(loss)}, which is next to nothing"
    return (Verdict.HELPS if loss.change < 0 else Verdict.HARMS), f"{moved} {_between(loss)}"


def _between(comparison: Comparison) -> str:
    return f"(95 % interval {comparison.low:+.3f} to {comparison.high:+.3f})"


# FOLDED FROM peft_core.evaluation.summary: How near a written text comes to the real one.


def edit_similarity(written: str, expected: str) -> float:
    """0 to 1: twice the characters in common, in order, over all characters, as CrossCodeEval and RepoBench measure it.

    Indentation and blank ends of lines do not count.
    """
    return float(fuzz.ratio(_visible(written), _visible(expected))) / 100


def _visible(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())
