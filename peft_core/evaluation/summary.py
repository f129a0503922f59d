"""From the scores of base model and adapter on each example to one Evaluation with a verdict.

The verdict follows from two rules.

1. The held-out loss decides. If it changes by at least MIN_EFFECT and the 95 % confidence interval of the change excludes
   zero, the adapter helps (the loss falls) or harms (it rises). Otherwise there is no demonstrable difference. Without an
   interval (fewer than five files and fewer than five examples) there is none either.
2. An adapter also harms if it forgets, regardless of the held-out loss: the loss on general code rises by more than
   FORGETTING_THRESHOLD, with an interval above zero, and by more than the held-out loss falls.

Exact lines and edit similarity are reported but do not decide. On small held-out sets their changes are smaller than their
noise, and small models commonly lower the loss without changing either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz

from peft_core.errors import NonFiniteError
from peft_core.evaluation.bootstrap import PairedSum, ResamplingUnit, choose_resampling_unit, compare, sum_by_file
from peft_core.schemas.evaluation import Comparison, Continuation, Evaluation, Verdict
from peft_core.schemas.frozen import FrozenModel

MIN_EFFECT = 0.01  # nats per token: 1 % of perplexity, which is less than two seeds differ by
FORGETTING_THRESHOLD = 0.3  # nats per token: perplexity on general code rises by a third
_QUOTED = 3  # completions in which the adapter gains most, and as many in which it loses most
_MIN_QUOTED_CHANGE = 0.05  # of edit similarity
_MAX_QUOTED_TEXT = 1200  # characters


class ExampleScore(FrozenModel):
    """How well one model predicts one example."""

    file: str
    tokens: int  # with a target
    total_lines: int
    loss: float  # sum over the target tokens, nats
    lines: int  # predicted exactly, given all lines before them


class Scores(FrozenModel):
    """How well one model predicts all examples."""

    key: str = ""  # of the training run
    held_out: tuple[ExampleScore, ...]
    general: tuple[ExampleScore, ...] = ()  # on code of Python's standard library


@dataclass(frozen=True)
class Completion:
    """What both models wrote for one prompt."""

    file: str
    line: int
    prompt: str
    expected: str
    base: str
    adapter: str


def mean_loss(scores: Sequence[ExampleScore]) -> float:
    """Return the mean over all target tokens, in nats.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    return require_finite(sum(score.loss for score in scores) / sum(score.tokens for score in scores))


def require_finite(held_out_loss: float) -> float:
    """Return the loss.

    Raises:
        NonFiniteError: it is NaN or infinite.
    """
    if not math.isfinite(held_out_loss):
        raise NonFiniteError(
            f"the loss on the held-out examples is {held_out_loss}",
            suggestions=["Lower learning_rate.", "Try device='cpu', which computes in float32."],
        )
    return held_out_loss


def perplexity(loss: float) -> float:
    """Return exp(loss), capped near the largest float: an untrained model would overflow it."""
    return math.exp(min(loss, 709.0))


def summarise(base: Scores, adapter: Scores, completions: Sequence[Completion], *, seed: int = 0) -> Evaluation:
    """Compare the scores of both models on the same examples. There must be held-out scores; the rest may be empty."""
    held_out = base.held_out
    unit = choose_resampling_unit(score.file for score in held_out)
    loss = _compare(held_out, adapter.held_out, _loss_sum, unit, seed)
    if loss is None:
        raise ValueError("nothing was measured")
    general_loss = _compare(base.general, adapter.general, _loss_sum, "files", seed)
    verdict, reason = decide_verdict(loss, general_loss, unit=unit)
    continuations = [_to_continuation(completion) for completion in completions]
    return Evaluation(
        verdict=verdict,
        reason=reason,
        loss=loss,
        base_perplexity=perplexity(loss.base),
        adapter_perplexity=perplexity(loss.adapter),
        next_line=_compare(held_out, adapter.held_out, _exact_line_sum, unit, seed),
        edit_similarity=_compare_similarity(continuations, unit, seed),
        general_loss=general_loss,
        forgets=forgets(general_loss),
        files=len({score.file for score in held_out}),
        examples=len(held_out),
        tokens=sum(score.tokens for score in held_out),
        lines=sum(score.total_lines for score in held_out),
        prompts=len(completions),
        general_tokens=sum(score.tokens for score in base.general),
        resampled=unit,
        gains=_largest_changes(continuations, sign=1),
        losses=_largest_changes(continuations, sign=-1),
    )


def forgets(general_loss: Comparison | None) -> bool:
    """Return whether the loss on general code has risen markedly, and not by chance."""
    return (
        general_loss is not None
        and general_loss.low is not None
        and general_loss.change > FORGETTING_THRESHOLD
        and general_loss.low > 0
    )


def decide_verdict(loss: Comparison, general_loss: Comparison | None, *, unit: ResamplingUnit) -> tuple[Verdict, str]:
    """Apply the rules in the module's docstring. Return the verdict and its reason as a clause."""
    if general_loss is not None and forgets(general_loss) and general_loss.change > -loss.change:
        return Verdict.HARMS, (
            f"the loss on general code rises by {general_loss.change:.3f} nats per token {_interval_text(general_loss)}, "
            f"more than the held-out loss falls ({loss.change:+.3f})"
        )
    moved = f"the held-out loss {'falls' if loss.change < 0 else 'rises'} by {abs(loss.change):.3f} nats per token"
    if loss.low is None or loss.high is None:
        return Verdict.NO_DIFFERENCE, f"{moved}, but there are too few {unit} to distinguish this from chance"
    moved += f" {_interval_text(loss)}"
    if loss.low <= 0 <= loss.high:
        return Verdict.NO_DIFFERENCE, f"{moved}, which may be chance"
    if abs(loss.change) < MIN_EFFECT:
        return Verdict.NO_DIFFERENCE, f"{moved}, which is negligible"
    return (Verdict.HELPS if loss.change < 0 else Verdict.HARMS), moved


def edit_similarity(completion: str, expected: str) -> float:
    """Return twice the number of characters in common, in order, over the number of all characters (0 to 1).

    CrossCodeEval and RepoBench use this measure. Indentation, trailing spaces and blank lines are ignored.
    """
    return float(fuzz.ratio(_strip_lines(completion), _strip_lines(expected))) / 100


def _strip_lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def _interval_text(comparison: Comparison) -> str:
    return f"(95 % interval {comparison.low:+.3f} to {comparison.high:+.3f})"


def _loss_sum(base: ExampleScore, adapter: ExampleScore) -> PairedSum:
    return PairedSum(base.loss, adapter.loss, base.tokens)


def _exact_line_sum(base: ExampleScore, adapter: ExampleScore) -> PairedSum:
    return PairedSum(base.lines, adapter.lines, base.total_lines)


def _compare(
    base: Sequence[ExampleScore],
    adapter: Sequence[ExampleScore],
    sum_of: Callable[[ExampleScore, ExampleScore], PairedSum],
    unit: ResamplingUnit,
    seed: int,
) -> Comparison | None:
    sums = [(before.file, sum_of(before, after)) for before, after in zip(base, adapter, strict=True)]
    return _compare_sums(sums, unit, seed)


def _compare_similarity(continuations: Sequence[Continuation], unit: ResamplingUnit, seed: int) -> Comparison | None:
    sums = [(each.file, PairedSum(each.base_similarity, each.adapter_similarity, 1)) for each in continuations]
    return _compare_sums(sums, unit, seed)


def _compare_sums(sums: Sequence[tuple[str, PairedSum]], unit: ResamplingUnit, seed: int) -> Comparison | None:
    return compare(sum_by_file(sums) if unit == "files" else [paired for _, paired in sums], seed=seed)


def _to_continuation(completion: Completion) -> Continuation:
    return Continuation(
        file=completion.file,
        line=completion.line,
        prompt=completion.prompt[-_MAX_QUOTED_TEXT:],
        expected=completion.expected[:_MAX_QUOTED_TEXT],
        base=completion.base[:_MAX_QUOTED_TEXT],
        adapter=completion.adapter[:_MAX_QUOTED_TEXT],
        base_similarity=round(edit_similarity(completion.base, completion.expected), 4),
        adapter_similarity=round(edit_similarity(completion.adapter, completion.expected), 4),
    )


def _largest_changes(continuations: Sequence[Continuation], *, sign: int) -> tuple[Continuation, ...]:
    def gain(continuation: Continuation) -> float:
        return sign * (continuation.adapter_similarity - continuation.base_similarity)

    quotable = [continuation for continuation in continuations if gain(continuation) >= _MIN_QUOTED_CHANGE]
    return tuple(sorted(quotable, key=gain, reverse=True)[:_QUOTED])
