"""Settings that follow from the base."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.planning.defaults import MEASURED_RATE, default_learning_rate, with_defaults
from peft_core.schemas.base_model import ModelShape
from peft_core.schemas.training import TrainingConfig


def shape(hidden_size: int) -> ModelShape:
    return ModelShape(
        parameters=1,
        hidden_size=hidden_size,
        intermediate_size=1,
        layers=1,
        heads=1,
        kv_heads=1,
        vocab_size=1,
        context_length=1,
    )


def test_the_bundled_base_gets_the_rate_that_was_measured_on_it() -> None:
    assert with_defaults(TrainingConfig(), shape(576)).rates == (MEASURED_RATE, 8 * MEASURED_RATE)


def test_a_rate_that_was_asked_for_stays() -> None:
    assert with_defaults(TrainingConfig(learning_rate=3e-3), shape(4096)).learning_rate == 3e-3


@pytest.mark.parametrize(("hidden_size", "rate"), [(896, 7.1e-4), (1536, 4.6e-4), (2048, 3.7e-4), (4096, 2.2e-4)])
def test_larger_bases_get_a_lower_rate(hidden_size: int, rate: float) -> None:
    assert default_learning_rate(hidden_size, 4) == rate


@given(st.integers(16, 576), st.integers(1, 256))
def test_smaller_bases_get_no_higher_rate_and_larger_batches_a_higher_one(hidden_size: int, batch_size: int) -> None:
    assert default_learning_rate(hidden_size, 4) == MEASURED_RATE
    assert default_learning_rate(hidden_size, batch_size + 1) >= default_learning_rate(hidden_size, batch_size)


def test_an_open_rate_is_not_taken_for_a_number() -> None:
    with pytest.raises(ValueError, match="still open"):
        _ = TrainingConfig().rates
