"""From the scores of both models to what an adapter understood of study items about APIs that it was not asked about."""

from __future__ import annotations

from collections.abc import Sequence

from peft_core.evaluation.catch_up import loss_change
from peft_core.evaluation.summary import ExampleScore
from peft_core.schemas.evaluation import StudyEffect


def study_effect(
    base: Sequence[ExampleScore], adapter: Sequence[ExampleScore], is_item: Sequence[bool]
) -> StudyEffect | None:
    """Compare both models on held-out study items, and on the other held-out text; None if no item is held out.

    `is_item`: for each example, whether it is a study item.
    """
    items = loss_change(base, adapter, is_item)
    others = loss_change(base, adapter, [not each for each in is_item])
    return None if items is None else StudyEffect(items=items, others=others)
