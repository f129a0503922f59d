"""What is chosen where the request leaves it open, and what is said about it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.errors import DataError
from peft_core.planning.cost_model import TOKENS_PER_EXAMPLE
from peft_core.planning.defaults import MIN_UNITS, PATIENCE_S, RANKS, choose_defaults
from peft_core.schemas.dataset import SourceSummary
from peft_core.schemas.training import TrainingConfig
from tests.factories import SMOLLM2_SHAPE, make_source


def source(units: int) -> SourceSummary:
    return make_source().model_copy(update={"examples": None, "estimated_tokens": TOKENS_PER_EXAMPLE * units})


def advised(
    units: int,
    config: TrainingConfig | None = None,
    speed: float | None = 150.0,
) -> tuple[TrainingConfig, str]:
    return choose_defaults(config or TrainingConfig(), SMOLLM2_SHAPE, source(units), speed)


@pytest.mark.parametrize(("units", "passes"), [(60, 3), (100, 3), (150, 2), (250, 2), (300, 1), (2000, 1)])
def test_a_small_code_base_is_passed_over_more_than_once(units: int, passes: int):
    config, why = advised(units)
    assert (config.num_epochs, config.max_steps) == (passes, None)
    assert f"about {units} units" in why


@pytest.mark.parametrize("units", [5_000, 100_000, 2_000_000])
@pytest.mark.parametrize("speed", [20.0, 150.0])
def test_nobody_waits_for_days_without_having_asked_for_it(units: int, speed: float):
    config, why = advised(units, speed=speed)
    if config.max_steps is not None:
        assert "set num_epochs = 1 for all" in why
        seconds = config.max_steps * config.batch_size * TOKENS_PER_EXAMPLE / speed
    else:
        seconds = units * TOKENS_PER_EXAMPLE * (1 - config.held_out_fraction) / speed
    assert seconds <= PATIENCE_S * 1.01


@given(units=st.integers(50, 400), speed=st.floats(0.5, 50))
def test_passes_are_given_up_before_a_pass_is_cut(units: int, speed: float):
    config, why = advised(units, speed=speed)
    share = 1 - config.held_out_fraction
    pass_s = units * TOKENS_PER_EXAMPLE * share / speed
    if pass_s > PATIENCE_S:
        assert config.max_steps is not None
        assert config.max_steps == max(1, int(math.ceil(units * share / config.batch_size) * PATIENCE_S / pass_s))
    else:
        assert config.max_steps is None
        assert config.num_epochs is not None
        suited = advised(units, speed=None)[0].num_epochs
        assert suited is not None
        assert config.num_epochs == min(suited, PATIENCE_S // pass_s)
        assert ("nobody said" in why) == (config.num_epochs < suited)


def test_what_is_said_of_the_time_is_so():
    units = 100
    speed = units * TOKENS_PER_EXAMPLE * 0.9 / (1.96 * 3600)  # one pass takes 1.96 hours
    config, why = advised(units, speed=speed)
    assert (config.num_epochs, config.max_steps) == (1, None)
    assert "One pass, because about 100 units make only 23 steps each" in why
    assert "three passes would take about 5.9 hours and nobody said that it may take more than 2 hours" in why
    config, why = advised(units, speed=speed / 2)
    assert config.max_steps == 11
    assert "11 of the 23 steps of a whole pass, because that would take about 3.9 hours" in why


def test_what_the_caller_says_is_done():
    asked = TrainingConfig(rank=4, max_steps=7)
    assert advised(100_000, asked) == (asked, "")
    asked = TrainingConfig(rank=16, num_epochs=5)
    assert advised(2_000_000, asked) == (asked, "")


def test_a_rank_has_room_for_what_there_is_to_learn():
    ranks = [advised(units, TrainingConfig(num_epochs=1))[0].rank for units in (100, 10_000, 80_000, 1_000_000)]
    assert ranks == sorted(ranks)
    assert (ranks[0], ranks[-1]) == (RANKS[0], RANKS[-1])
    assert advised(1_000_000, TrainingConfig(max_steps=100))[0].rank == RANKS[0], "a short run sees little of it"


def test_a_device_of_unknown_speed_makes_one_pass():
    config, why = advised(100_000, speed=None)
    assert config.num_epochs == 1
    assert "One pass" in why


def test_too_little_is_refused_with_figures_unless_it_is_insisted_on():
    with pytest.raises(DataError, match=rf"about 49 units .* at least {MIN_UNITS} .*Retrieval") as caught:
        advised(49)
    assert caught.value.code == "too_little_data"
    assert advised(50)[0].num_epochs == 3
    assert advised(10, TrainingConfig(allow_little_data=True))[0].num_epochs == 3


def test_records_are_counted_as_they_are():
    few = make_source().model_copy(update={"examples": 30, "estimated_tokens": 1_000_000})
    with pytest.raises(DataError, match="about 30 records"):
        choose_defaults(TrainingConfig(), SMOLLM2_SHAPE, few, None)


def test_no_rank_is_explained_where_only_some_modules_are_adapted() -> None:
    config, why = choose_defaults(
        TrainingConfig(target_modules=["q_proj"]),
        SMOLLM2_SHAPE,
        make_source(estimated_tokens=90_000),
        100.0,
    )
    assert config.rank == 16
    assert "Rank" not in why


def test_a_rank_that_does_not_hold_all_is_not_said_to() -> None:
    config, why = choose_defaults(TrainingConfig(), SMOLLM2_SHAPE, make_source(estimated_tokens=900_000_000), 1e7)
    assert config.rank == 64
    assert (
        "Rank 64, the most that is chosen: 19.5 million weights, for a part of what 900.0 million tokens teach." in why
    )
