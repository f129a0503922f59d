"""Which combination of adapter and retrieved code predicts held-out code best: from scores to a table with intervals.

Every column predicts the same lines. A column is a state of the model, with or without similar code of the training before the
prompt, as `generate(retrieve=true)` puts it there. The best column has the lowest loss; which others may be as good,
or whether even that is open, is said in words. A difference that is not shown is no proof that two columns are equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from peft_core.evaluation.bootstrap import PairedSum, compare_examples
from peft_core.evaluation.summary import ExampleScore, Scores, mean_loss
from peft_core.schemas.evaluation import Column, ColumnChange, ColumnName, Columns

MIN_POSITIONS = 5  # fewer give no interval


def summarise_columns(base: Scores, adapter: Scores, *, note: str, seed: int = 0) -> Columns | None:
    """Return the table; if there were too few positions, only `note`, which explains that; None without a note."""
    scores = {
        ColumnName.BASE: base.plain,
        ColumnName.BASE_RETRIEVED: base.retrieved,
        ColumnName.ADAPTER: adapter.plain,
        ColumnName.ADAPTER_RETRIEVED: adapter.retrieved,
    }
    first = scores[ColumnName.BASE]
    if not first:
        return Columns(text=note) if note else None
    best = min(scores, key=lambda name: mean_loss(scores[name]))  # of equal ones the simplest
    return Columns(
        best=best,
        text=_text(scores, best, seed),
        columns=tuple(_column(name, first, each, seed) for name, each in scores.items()),
        positions=len(first),
        files=len({score.file for score in first}),
        lines=sum(score.total_lines for score in first),
        tokens=sum(score.tokens for score in first),
    )


def _column(name: ColumnName, base: Sequence[ExampleScore], own: Sequence[ExampleScore], seed: int) -> Column:
    is_base = name is ColumnName.BASE
    lines = sum(score.lines for score in own) / max(1, sum(score.total_lines for score in own))
    return Column(
        name=name,
        loss=round(mean_loss(own), 6),
        exact_lines=round(lines, 6),
        loss_change=None if is_base else _loss_change(base, own, seed),
        lines_change=None if is_base else _lines_change(base, own, seed),
    )


def _loss_change(one: Sequence[ExampleScore], two: Sequence[ExampleScore], seed: int) -> ColumnChange | None:
    return _change([(a.file, PairedSum(a.loss, b.loss, a.tokens)) for a, b in zip(one, two, strict=True)], seed)


def _lines_change(one: Sequence[ExampleScore], two: Sequence[ExampleScore], seed: int) -> ColumnChange | None:
    return _change([(a.file, PairedSum(a.lines, b.lines, a.total_lines)) for a, b in zip(one, two, strict=True)], seed)


def _change(sums: Sequence[tuple[str, PairedSum]], seed: int) -> ColumnChange | None:
    change = compare_examples(sums, seed=seed)
    return None if change is None else ColumnChange(change=change.change, low=change.low, high=change.high)


def _text(scores: Mapping[ColumnName, Sequence[ExampleScore]], best: ColumnName, seed: int) -> str:
    losses = {name: mean_loss(each) for name, each in scores.items()}
    others = ", ".join(
        f"{name.in_words} {losses[name]:.3f}" for name in sorted(losses, key=losses.__getitem__) if name is not best
    )
    close = [
        name.in_words
        for name in scores
        if name is not best and not _differs(_loss_change(scores[best], scores[name], seed))
    ]
    chance = f" Its difference from {', '.join(close)} may be chance." if close else ""
    first = scores[best]
    size = f"{len(first)} positions, {sum(score.total_lines for score in first)} lines"
    return (
        f"With and without similar code of the training before the prompt ({size}), {best.in_words} has the lowest "
        f"loss, {losses[best]:.3f}; {others}.{chance}{_ADVICE[best]}"
    )


def _differs(change: ColumnChange | None) -> bool:
    return (
        change is not None and change.low is not None and change.high is not None and not change.low <= 0 <= change.high
    )


_ADVICE = {
    ColumnName.BASE: "",
    ColumnName.BASE_RETRIEVED: " generate(use_base=true, adapter_path=PROJECT, retrieve=true) uses it.",
    ColumnName.ADAPTER: "",
    ColumnName.ADAPTER_RETRIEVED: " Use generate(retrieve=true).",
}
