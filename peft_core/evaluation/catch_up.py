"""From the scores of a continued adapter and of the new one to what was gained and what was lost.

The held-out examples are of two kinds: code that is new or has changed, and a sample of what the parent or an ancestor held
out. An update loses if the loss on the latter rises by at least MIN_EFFECT with a 95 % confidence interval above zero: then it
has been paid for with what the adapter knew.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft_core.evaluation.bootstrap import PairedSum, compare_examples
from peft_core.evaluation.summary import MIN_EFFECT, ExampleScore
from peft_core.schemas.evaluation import CatchUp, LossChange


def compare_with_parent(
    parent: str, before: Sequence[ExampleScore], after: Sequence[ExampleScore], is_old: Sequence[bool]
) -> CatchUp:
    """Compare the scores of both adapters on the same examples.

    Args:
        parent: Id of the continued adapter.
        before: Its scores.
        after: Scores of the new adapter, in the same order.
        is_old: For each example, whether it was held out before; it is new or changed otherwise.
    """
    old = loss_change(before, after, is_old)
    return CatchUp(
        parent=parent,
        changed=loss_change(before, after, [not each for each in is_old]),
        old=old,
        loses=old is not None and old.low is not None and old.low > 0 and old.change >= MIN_EFFECT,
    )


def loss_change(
    before: Sequence[ExampleScore], after: Sequence[ExampleScore], selected: Sequence[bool] | None = None
) -> LossChange | None:
    """Compare the scores of the selected examples, or of all; return None without any."""
    pairs = [
        (first.file, PairedSum(first.loss, second.loss, first.tokens))
        for first, second, is_selected in zip(before, after, selected or [True] * len(before), strict=True)
        if is_selected
    ]
    compared = compare_examples(pairs)
    if compared is None:
        return None
    return LossChange(
        before=compared.first,
        after=compared.second,
        change=compared.change,
        low=compared.low,
        high=compared.high,
        files=len({file for file, _ in pairs}),
        examples=len(pairs),
    )
