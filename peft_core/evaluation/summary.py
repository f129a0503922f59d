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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rapidfuzz import fuzz

from peft_core.errors import NonFiniteError
from peft_core.evaluation.bootstrap import (
    PairedChange,
    PairedSum,
    ResamplingUnit,
    choose_resampling_unit,
    compare,
    sum_by_file,
)
from peft_core.schemas.evaluation import (
    Comparison,
    Continuation,
    Difference,
    Evaluation,
    InFileMetric,
    Share,
    Verdict,
)
from peft_core.schemas.frozen import FrozenModel

MIN_EFFECT = 0.01  # nats per token: 1 % of perplexity, which is less than two seeds differ by
FORGETTING_THRESHOLD = 0.3  # nats per token: perplexity on general code rises by a third
_QUOTED = 3  # completions in which the adapter gains most, and as many in which it loses most
_MIN_QUOTED_CHANGE = 0.05  # of edit similarity
MAX_QUOTED_TEXT = 1200  # characters


class ExampleScore(FrozenModel):
    """How well one model predicts one example."""

    file: str
    tokens: int  # with a target
    total_lines: int
    loss: float  # sum over the target tokens, nats
    lines: int  # predicted exactly, given all lines before them


class WindowScore(FrozenModel):
    """How many positions of one kind a model predicts exactly in one window of a file."""

    file: str
    metric: InFileMetric
    positions: int
    right: int


class Scores(FrozenModel):
    """How well one model predicts all examples."""

    key: str = ""  # of the training run
    held_out: tuple[ExampleScore, ...]
    general: tuple[ExampleScore, ...] = ()  # on code of Python's standard library
    in_file: tuple[WindowScore, ...] = ()  # in the middle of whole held-out files
    plain: tuple[ExampleScore, ...] = ()  # at the positions that are also measured with retrieved code
    retrieved: tuple[ExampleScore, ...] = ()  # there, with retrieved code
    items: tuple[ExampleScore, ...] = ()  # on held-out study items


@dataclass(frozen=True)
class QuotedPrompt:
    """The end of a text that models completed, and how the file continues."""

    file: str
    line: int  # of the first expected line, 1-based; 0: unknown
    text: str
    indentation: str  # at the end of the prompt, of the line that models write
    expected: str
    fills_gap: bool = False  # the prompt has what follows as well


@dataclass(frozen=True)
class Written:
    """What a model wrote after a prompt."""

    text: str = ""
    has_ended: bool = False  # by itself, and not because of a limit
    invents: bool | None = None  # a name that is not known; None: not measured


@dataclass(frozen=True)
class Measurement:
    """One model's scores, and what it wrote after each prompt. All models are measured on the same examples and prompts."""

    scores: Scores
    completions: Sequence[Written] = ()
    seconds: float = 0.0  # for the completions


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


def summarise(base: Measurement, adapter: Measurement, prompts: Sequence[QuotedPrompt], *, seed: int = 0) -> Evaluation:
    """Compare base model and adapter. There must be held-out scores; the rest may be empty."""
    held_out = base.scores.held_out
    changes = measure_changes(base, adapter, prompts, seed=seed)
    loss = _comparison(changes.loss)
    general_loss = None if changes.general_loss is None else _comparison(changes.general_loss)
    verdict, reason = decide_verdict(loss, general_loss, unit=changes.unit)
    continuations = [
        _to_continuation(prompt, one.text, two.text)
        for prompt, one, two in zip(prompts, base.completions, adapter.completions, strict=True)
    ]
    return Evaluation(
        verdict=verdict,
        reason=reason,
        loss=loss,
        base_perplexity=perplexity(loss.base),
        adapter_perplexity=perplexity(loss.adapter),
        next_line=changes.next_line and _comparison(changes.next_line),
        edit_similarity=changes.edit_similarity and _comparison(changes.edit_similarity),
        in_file={metric: _share(change) for metric, change in changes.in_file.items()},
        general_loss=general_loss,
        forgets=forgets(general_loss),
        files=len({score.file for score in held_out}),
        examples=len(held_out),
        tokens=sum(score.tokens for score in held_out),
        lines=sum(score.total_lines for score in held_out),
        prompts=len(prompts),
        general_tokens=sum(score.tokens for score in base.scores.general),
        seconds=round(base.seconds + adapter.seconds, 1),
        resampled=changes.unit,
        gains=_largest_changes(continuations, sign=1),
        losses=_largest_changes(continuations, sign=-1),
    )


@dataclass(frozen=True)
class ShareChange:
    """A share of positions with two models."""

    change: PairedChange
    positions: int
    files: int


@dataclass(frozen=True)
class Changes:
    """Every metric of two models that are measured on the same text. None: it was not measured."""

    unit: ResamplingUnit
    loss: PairedChange
    next_line: PairedChange | None
    edit_similarity: PairedChange | None
    general_loss: PairedChange | None
    in_file: Mapping[InFileMetric, ShareChange]


def measure_changes(
    first: Measurement, second: Measurement, prompts: Sequence[QuotedPrompt], *, seed: int = 0
) -> Changes:
    """Compare two models by every metric, each with its paired bootstrap."""
    unit = choose_resampling_unit(score.file for score in first.scores.held_out)
    held_out = list(zip(first.scores.held_out, second.scores.held_out, strict=True))
    general = zip(first.scores.general, second.scores.general, strict=True)
    written = list(zip(prompts, first.completions, second.completions, strict=True))
    loss = _compare([(one.file, PairedSum(one.loss, two.loss, one.tokens)) for one, two in held_out], unit, seed)
    if loss is None:
        raise ValueError("nothing was measured")
    return Changes(
        unit=unit,
        loss=loss,
        next_line=_compare(
            [(one.file, PairedSum(one.lines, two.lines, one.total_lines)) for one, two in held_out], unit, seed
        ),
        edit_similarity=_compare(
            [
                (prompt.file, PairedSum(similarity(one.text, prompt), similarity(two.text, prompt), 1))
                for prompt, one, two in written
            ],
            unit,
            seed,
        ),
        general_loss=_compare(
            [(one.file, PairedSum(one.loss, two.loss, one.tokens)) for one, two in general], "files", seed
        ),
        in_file=_in_file(
            [
                (one.file, one.metric, PairedSum(one.right, two.right, one.positions))
                for one, two in zip(first.scores.in_file, second.scores.in_file, strict=True)
            ]
            + [sums for prompt, one, two in written for sums in _of_written(prompt, one, two)],
            seed,
        ),
    )


def _of_written(prompt: QuotedPrompt, one: Written, two: Written) -> Iterator[tuple[str, InFileMetric, PairedSum]]:
    """Yield what is counted in the completions of one prompt by two models."""
    if one.invents is not None and two.invents is not None:
        yield prompt.file, InFileMetric.INVENTED_NAMES, PairedSum(one.invents, two.invents, 1)
    if prompt.fills_gap:
        yield prompt.file, InFileMetric.STOPS, PairedSum(stops_in_place(one, prompt), stops_in_place(two, prompt), 1)


def stops_in_place(written: Written, prompt: QuotedPrompt) -> bool:
    """Return whether a model ends by itself after as many lines as are missing; blank ones do not count."""
    lines = [len(_strip_lines(text).splitlines()) for text in (written.text, prompt.expected)]
    return written.has_ended and lines[0] == lines[1]


def _in_file(counted: Sequence[tuple[str, InFileMetric, PairedSum]], seed: int) -> dict[InFileMetric, ShareChange]:
    """Compare two models by what was counted in (file, metric, sums). Fewer than five files: windows are resampled."""
    changes = {}
    for metric in InFileMetric:
        sums = [(file, paired) for file, each, paired in counted if each is metric]
        files = {file for file, _ in sums}
        if (change := _compare(sums, choose_resampling_unit(files), seed)) is not None:
            changes[metric] = ShareChange(change, round(sum(paired.weight for _, paired in sums)), len(files))
    return changes


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
            f"the loss on general code rises by {general_loss.change:.3f} nats per token{interval_text(general_loss)}, "
            f"more than the held-out loss falls ({loss.change:+.3f})"
        )
    moved = f"the held-out loss {'falls' if loss.change < 0 else 'rises'} by {abs(loss.change):.3f} nats per token"
    if doubt := doubt_about(loss, unit=unit):
        return Verdict.NO_DIFFERENCE, f"{moved}{interval_text(loss)}, {doubt}"
    return (Verdict.HELPS if loss.change < 0 else Verdict.HARMS), f"{moved}{interval_text(loss)}"


def doubt_about(loss: Comparison | Difference, *, unit: ResamplingUnit) -> str:
    """Return why a change of the loss shows no difference, as the end of a sentence; empty if it shows one."""
    if loss.low is None or loss.high is None:
        return f"but there are too few {unit} to distinguish this from chance"
    if loss.low <= 0 <= loss.high:
        return "which may be chance"
    return "which is negligible" if abs(loss.change) < MIN_EFFECT else ""


def interval_text(change: Comparison | Difference) -> str:
    """Return the interval in brackets after a space, if there is one."""
    return "" if change.low is None else f" (95 % interval {change.low:+.3f} to {change.high:+.3f})"


def similarity(completion: str, prompt: QuotedPrompt) -> float:
    return round(edit_similarity(completion, prompt.expected), 4)


def quoted(text: str) -> str:
    """Return the beginning of a text, short enough for a report."""
    return text[:MAX_QUOTED_TEXT]


def edit_similarity(completion: str, expected: str) -> float:
    """Return twice the number of characters in common, in order, over the number of all characters (0 to 1).

    CrossCodeEval and RepoBench use this measure. Indentation, trailing spaces and blank lines are ignored.
    """
    return float(fuzz.ratio(_strip_lines(completion), _strip_lines(expected))) / 100


def _strip_lines(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())


def _compare(sums: Sequence[tuple[str, PairedSum]], unit: ResamplingUnit, seed: int) -> PairedChange | None:
    return compare(sum_by_file(sums) if unit == "files" else [paired for _, paired in sums], seed=seed)


def _share(share: ShareChange) -> Share:
    return Share(**_comparison(share.change).model_dump(), positions=share.positions, files=share.files)


def _comparison(change: PairedChange) -> Comparison:
    return Comparison(base=change.first, adapter=change.second, change=change.change, low=change.low, high=change.high)


def _to_continuation(prompt: QuotedPrompt, base: str, adapter: str) -> Continuation:
    return Continuation(
        file=prompt.file,
        line=prompt.line,
        prompt=prompt.text[-MAX_QUOTED_TEXT:],
        expected=quoted(prompt.expected),
        base=quoted(prompt.indentation + base),
        adapter=quoted(prompt.indentation + adapter),
        base_similarity=similarity(base, prompt),
        adapter_similarity=similarity(adapter, prompt),
    )


def _largest_changes(continuations: Sequence[Continuation], *, sign: int) -> tuple[Continuation, ...]:
    def gain(continuation: Continuation) -> float:
        return sign * (continuation.adapter_similarity - continuation.base_similarity)

    quotable = [continuation for continuation in continuations if gain(continuation) >= _MIN_QUOTED_CHANGE]
    return tuple(sorted(quotable, key=gain, reverse=True)[:_QUOTED])
