"""What an update gained and what it lost, from the scores of its parent and of itself."""

from __future__ import annotations

import pytest

from peft_core.evaluation.catch_up import compare_with_parent
from peft_core.evaluation.summary import ExampleScore


def scores(files: int, per_token: float, spread: float = 0.0, prefix: str = "f") -> list[ExampleScore]:
    """Two examples of 100 tokens in each file; the loss alternates by `spread` around `per_token`."""
    return [
        ExampleScore(
            file=f"{prefix}{n // 2}.py",
            tokens=100,
            total_lines=0,
            loss=100 * (per_token + spread * (-1) ** (n // 2)),
            lines=0,
        )
        for n in range(2 * files)
    ]


def test_both_parts_are_compared_separately() -> None:
    before = [*scores(6, 1.0, prefix="old"), *scores(2, 2.0, prefix="changed")]
    after = [*scores(6, 1.1, prefix="old"), *scores(2, 1.5, prefix="changed")]
    result = compare_with_parent("parent", before, after, [True] * 12 + [False] * 4)
    assert result.parent == "parent"
    assert result.old is not None
    assert (result.old.before, result.old.after, result.old.change) == pytest.approx((1.0, 1.1, 0.1))
    assert (result.old.files, result.old.examples) == (6, 12)
    assert result.changed is not None
    assert result.changed.change == pytest.approx(-0.5)
    assert (result.changed.files, result.changed.examples) == (2, 4)
    assert result.loses
    assert "1.000 -> 1.100 (95 % interval +0.100 to +0.100; 12 examples in 6 files)" in result.in_words


@pytest.mark.parametrize(
    ("files", "after", "spread", "loses"),
    [
        (6, 1.05, 0.0, True),
        (6, 1.009, 0.0, False),  # below the smallest effect
        (6, 1.05, 0.3, False),  # may be chance
        (6, 0.9, 0.0, False),
        (2, 1.5, 0.0, False),  # too few examples for an interval
    ],
)
def test_an_update_loses_if_the_old_loss_rises_markedly_and_not_by_chance(
    files: int, after: float, spread: float, loses: bool
) -> None:
    before, now = scores(files, 1.0), scores(files, after, spread)
    assert compare_with_parent("p", before, now, [True] * len(now)).loses is loses


def test_a_part_without_examples_is_not_measured() -> None:
    result = compare_with_parent("p", scores(6, 1.0), scores(6, 1.0), [False] * 12)
    assert result.old is None
    assert not result.loses
    assert "on old not measured, as none of it is left" in result.in_words
    nothing_changed = compare_with_parent("p", scores(6, 1.0), scores(6, 1.0), [True] * 12)
    assert nothing_changed.changed is None
    assert "changed held-out code not measured, as none of it has changed" in nothing_changed.in_words
