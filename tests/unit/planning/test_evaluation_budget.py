"""An evaluation stays in proportion to the training, whatever its length."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from peft_core.planning.evaluation_budget import EvaluationBudget, budget_after_training, budget_of_evaluation

NOT_SHORT = st.floats(min_value=8000, max_value=1e9)


@given(NOT_SHORT)
def test_measuring_takes_at_most_a_quarter_of_the_training_time(trained_tokens: float) -> None:
    budget = budget_after_training(trained_tokens)
    assert budget.tokens * 2 / 3 <= 0.2 * trained_tokens + 2
    assert budget.memorisation_work <= 0.03 * trained_tokens


@given(NOT_SHORT, NOT_SHORT)
def test_more_training_never_measures_less(one: float, other: float) -> None:
    less, more = (budget_after_training(tokens) for tokens in sorted((one, other)))
    assert (less.windows, less.positions, less.memorisation_prompts) <= (
        more.windows,
        more.positions,
        more.memorisation_prompts,
    )


def test_a_long_training_and_a_large_repository_end_at_the_same_limits() -> None:
    longest, largest = budget_after_training(1e9), budget_of_evaluation(1e9, has_training_code=True)
    assert longest == EvaluationBudget(24_400, 5600, 30_000, memorisation_prompts=48)
    assert largest == EvaluationBudget(24_400, 5600, 56_000)


def test_a_short_training_is_measured_a_little() -> None:
    assert budget_after_training(0) == EvaluationBudget(720, 480, 1200, memorisation_prompts=0)


def test_retrieval_is_not_measured_without_the_training_code() -> None:
    with_code, without = (budget_of_evaluation(5000, has_training_code=kept) for kept in (True, False))
    assert without == replace(with_code, positions=0)
    assert without.tokens == with_code.tokens - with_code.positions
