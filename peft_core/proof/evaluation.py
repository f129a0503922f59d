"""From what was measured on each example to one Evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft_core.measurements import Comparison, Continuation, Evaluation
from peft_core.proof.bootstrap import Tally, Unit, by_file, compare, unit_for
from peft_core.proof.similarity import edit_similarity
from peft_core.proof.verdict import forgets, judge
from peft_core.spec import Frozen

_SHOWN = 3  # continuations in which the adapter gains most, and in which it loses most
_MARKED = 0.05  # of edit similarity: less is no gain or loss worth showing
_MAX_SHOWN_TEXT = 1200  # characters


class Score(Frozen):
    """One model on one example."""

    loss: float  # sum over its target tokens, nats
    lines: int  # written exactly, given the lines before


@dataclass(frozen=True)
class Measured:
    """One example, and what both models made of it."""

    file: str
    tokens: int  # with a target
    lines: int
    base: Score
    adapter: Score


@dataclass(frozen=True)
class Written:
    """What both models wrote from one prompt."""

    file: str
    line: int
    prompt: str
    expected: str
    base: str
    adapter: str


def evaluate(
    held_out: Sequence[Measured], general: Sequence[Measured], written: Sequence[Written], *, seed: int = 0
) -> Evaluation:
    """Compare. `held_out` must not be empty; `general` and `written` may be."""
    unit = unit_for(example.file for example in held_out)
    loss = _compare(held_out, lambda e: Tally(e.base.loss, e.adapter.loss, e.tokens), unit, seed)
    if loss is None:
        raise ValueError("nothing was measured")
    general_loss = _compare(general, lambda e: Tally(e.base.loss, e.adapter.loss, e.tokens), "files", seed)
    verdict, reason = judge(loss, general_loss, unit=unit)
    shown = [_continuation(one) for one in written]
    return Evaluation(
        verdict=verdict,
        reason=reason,
        loss=loss,
        base_perplexity=perplexity(loss.base),
        adapter_perplexity=perplexity(loss.adapter),
        next_line=_compare(held_out, lambda e: Tally(e.base.lines, e.adapter.lines, e.lines), unit, seed),
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
    examples: Sequence[Measured], tally: Callable[[Measured], Tally], unit: Unit, seed: int
) -> Comparison | None:
    tallies = [(example.file, tally(example)) for example in examples]
    return compare(by_file(tallies) if unit == "files" else [one for _, one in tallies], seed=seed)


def _compare_similarity(written: Sequence[Continuation], unit: Unit, seed: int) -> Comparison | None:
    tallies = [(one.file, Tally(one.base_similarity, one.adapter_similarity, 1)) for one in written]
    return compare(by_file(tallies) if unit == "files" else [tally for _, tally in tallies], seed=seed)


def _continuation(written: Written) -> Continuation:
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
