"""What an adapter understood of held-out study items, from the scores of both models."""

from __future__ import annotations

import pytest

from peft_core.evaluation.study import study_effect
from tests.unit.evaluation.test_catch_up import scores


def test_study_items_and_the_other_text_are_compared_separately() -> None:
    base = [*scores(6, 2.0, prefix="study of "), *scores(3, 1.0, prefix="code")]
    adapter = [*scores(6, 1.2, prefix="study of "), *scores(3, 0.9, prefix="code")]
    effect = study_effect(base, adapter, [score.file.startswith("study of ") for score in base])
    assert effect is not None
    assert effect.others is not None
    assert (effect.items.change, effect.others.change) == pytest.approx((-0.8, -0.1))
    assert (effect.items.files, effect.items.examples) == (6, 12)
    assert effect.in_words.startswith("Loss on held-out study items, about other APIs: 2.000 -> 1.200 (")


def test_without_a_held_out_item_there_is_nothing_to_compare() -> None:
    assert study_effect(scores(3, 1.0), scores(3, 0.9), [False] * 6) is None
