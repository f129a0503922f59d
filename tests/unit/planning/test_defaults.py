"""Settings that a request leaves open are chosen from the data and the base model, and the choice is explained."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.errors import DataError, InvalidArgument
from peft_core.planning.cost_model import TOKENS_PER_EXAMPLE, steps_of
from peft_core.planning.defaults import (
    CATCH_UP_RATE,
    DEFAULT_MAX_RUN_S,
    MEASURED_RATE,
    MIN_UNITS,
    RANKS,
    REPLAY_SHARE,
    TWO_EPOCHS_S,
    choose_catch_up,
    choose_defaults,
    default_learning_rate,
    require_complete,
    training_set,
)
from peft_core.schemas.dataset import CatchUpSpec, SourceSummary
from peft_core.schemas.training import TrainingConfig
from tests.factories import SMOLLM2_SHAPE, make_source


def source(units: int) -> SourceSummary:
    return make_source().model_copy(update={"examples": None, "estimated_tokens": TOKENS_PER_EXAMPLE * units})


def chosen(units: int, config: TrainingConfig | None = None, speed: float | None = 150.0) -> tuple[TrainingConfig, str]:
    return choose_defaults(config or TrainingConfig(), SMOLLM2_SHAPE, source(units), speed)


@pytest.mark.parametrize(("units", "epochs"), [(60, 3), (100, 3), (150, 2), (250, 2), (300, 1), (1000, 1)])
def test_a_small_code_base_gets_more_than_one_epoch_on_a_slow_machine_as_well(units: int, epochs: int):
    config, why = chosen(units, speed=30.0)
    assert (config.num_epochs, config.max_steps) == (epochs, None)
    assert f"about {round(units * 0.9)} examples" in why


@given(units=st.integers(300, 5_000), speed=st.floats(200, 20_000))
def test_a_second_epoch_is_made_if_both_take_at_most_half_an_hour(units: int, speed: float):
    config, why = chosen(units, speed=speed)
    both_s = 2 * training_set(source(units), config.held_out_fraction).tokens / speed
    assert config.num_epochs == (2 if both_s <= TWO_EPOCHS_S else 1)
    assert ("less than 30 minutes" in why) == (config.num_epochs == 2)


@pytest.mark.parametrize("units", [5_000, 100_000, 2_000_000])
@pytest.mark.parametrize("speed", [20.0, 150.0])
def test_a_run_without_a_requested_duration_stays_within_the_default_limit(units: int, speed: float):
    config, why = chosen(units, speed=speed)
    if config.max_steps is not None:
        assert "set num_epochs = 1 for all of them" in why
        seconds = config.max_steps * config.batch_size * TOKENS_PER_EXAMPLE / speed
    else:
        seconds = units * TOKENS_PER_EXAMPLE * (1 - config.held_out_fraction) / speed
    assert seconds <= DEFAULT_MAX_RUN_S * 1.01


@given(units=st.integers(50, 400), speed=st.floats(0.5, 15))  # so slow that half an hour allows no further epoch
def test_further_epochs_are_dropped_before_an_epoch_is_shortened(units: int, speed: float):
    config, why = chosen(units, speed=speed)
    share = 1 - config.held_out_fraction
    pass_s = units * TOKENS_PER_EXAMPLE * share / speed
    if pass_s > DEFAULT_MAX_RUN_S:
        assert config.max_steps is not None
        steps = math.ceil(round(units * share) / config.batch_size)
        assert config.max_steps == pytest.approx(max(1, int(steps * DEFAULT_MAX_RUN_S / pass_s)), abs=1)
    else:
        assert config.max_steps is None
        assert config.num_epochs is not None
        suited = chosen(units, speed=None)[0].num_epochs
        assert suited is not None
        assert config.num_epochs == min(suited, DEFAULT_MAX_RUN_S // pass_s)
        assert ("the default limit" in why) == (config.num_epochs < suited)


def test_the_explanation_of_the_duration_states_the_real_times():
    units = 100
    speed = units * TOKENS_PER_EXAMPLE * 0.9 / (1.96 * 3600)  # one pass takes 1.96 hours
    config, why = chosen(units, speed=speed)
    assert (config.num_epochs, config.max_steps) == (1, None)
    assert "One epoch, because about 90 examples make only 23 steps each" in why
    assert "three epochs would take about 5.9 hours and the default limit is 2 hours" in why
    config, why = chosen(units, speed=speed / 2)
    assert config.max_steps == 11
    assert "11 of the 23 steps of an epoch, because a full epoch would take about 3.9 hours" in why


def test_requested_settings_are_not_changed():
    for request in (
        TrainingConfig(rank=4, max_steps=7, learning_rate=1e-4),
        TrainingConfig(rank=16, num_epochs=5, learning_rate=1e-4),
    ):
        assert chosen(2_000_000, request) == (request, "")


def test_a_client_that_sends_every_default_of_the_schema_does_not_disable_the_choice_of_the_rank():
    properties = TrainingConfig.model_json_schema()["properties"]
    echoed = {name: schema["default"] for name, schema in properties.items() if "default" in schema}
    config, why = chosen(200_000, TrainingConfig.model_validate(echoed), speed=None)
    assert config.rank == 64
    assert "Rank 64" in why


def test_the_rank_grows_with_the_data():
    ranks = [chosen(units, TrainingConfig(num_epochs=1))[0].rank for units in (100, 10_000, 80_000, 1_000_000)]
    assert ranks == sorted(ranks)
    assert (ranks[0], ranks[-1]) == (RANKS[0], RANKS[-1])
    assert chosen(1_000_000, TrainingConfig(max_steps=100))[0].rank == RANKS[0], "a short run sees little of the data"


def test_a_device_of_unknown_speed_gets_one_epoch():
    config, why = chosen(100_000, speed=None)
    assert config.num_epochs == 1
    assert "One epoch" in why


def test_too_little_data_is_rejected_with_figures_unless_the_request_allows_it():
    with pytest.raises(DataError, match=rf"holds 49 units .* at least {MIN_UNITS} .*Retrieval") as caught:
        chosen(49)
    assert caught.value.code == "too_little_data"
    assert chosen(50)[0].num_epochs == 3
    assert chosen(10, TrainingConfig(allow_little_data=True))[0].num_epochs == 3


def test_records_are_counted_instead_of_estimated():
    few = make_source().model_copy(update={"examples": 30, "estimated_tokens": 1_000_000})
    with pytest.raises(DataError, match="holds 30 records"):
        choose_defaults(TrainingConfig(), SMOLLM2_SHAPE, few, None)


def test_the_rank_is_not_explained_if_only_some_modules_are_adapted() -> None:
    config, why = choose_defaults(
        TrainingConfig(target_modules=["q_proj"]), SMOLLM2_SHAPE, make_source(estimated_tokens=90_000), 100.0
    )
    assert config.rank == 16
    assert "Rank" not in why


def test_the_highest_rank_is_explained_as_too_small_for_all_of_the_data() -> None:
    config, why = choose_defaults(TrainingConfig(), SMOLLM2_SHAPE, make_source(estimated_tokens=900_000_000), 1e7)
    assert config.rank == 64
    assert (
        "Rank 64, the highest that is chosen automatically: its 19.5 million weights store part of what 900.0 million tokens "
        "teach." in why
    )


def test_the_bundled_base_gets_the_learning_rate_that_was_measured_on_it() -> None:
    assert chosen(100)[0].rates == (MEASURED_RATE, 8 * MEASURED_RATE)


@pytest.mark.parametrize(("hidden_size", "rate"), [(896, 7.1e-4), (1536, 4.6e-4), (2048, 3.7e-4), (4096, 2.2e-4)])
def test_larger_base_models_get_a_lower_learning_rate(hidden_size: int, rate: float) -> None:
    assert default_learning_rate(hidden_size, 4) == rate


@given(st.integers(16, 576), st.integers(1, 256))
def test_larger_batches_get_a_higher_learning_rate_and_smaller_base_models_do_not(
    hidden_size: int, batch_size: int
) -> None:
    assert default_learning_rate(hidden_size, 4) == MEASURED_RATE
    assert default_learning_rate(hidden_size, batch_size + 1) >= default_learning_rate(hidden_size, batch_size)


def test_settings_that_were_not_chosen_yet_cannot_be_read() -> None:
    with pytest.raises(ValueError, match="learning_rate has not been chosen"):
        _ = TrainingConfig().rates
    with pytest.raises(ValueError, match="rank has not been chosen"):
        _ = TrainingConfig().lora_alpha


@pytest.mark.parametrize("missing", ["rank", "learning_rate", "num_epochs"])
def test_a_worker_rejects_settings_that_the_planner_would_have_chosen(missing: str) -> None:
    complete = {"rank": 16, "learning_rate": 1e-3, "num_epochs": 1.0}
    require_complete(TrainingConfig.model_validate(complete))
    with pytest.raises(InvalidArgument, match=f"config.{missing} is missing"):
        require_complete(TrainingConfig.model_validate({**complete, missing: None}))


def catch_up(units: int, changed: int, **given: Any) -> tuple[TrainingConfig, CatchUpSpec, SourceSummary]:
    config = TrainingConfig(**given)
    full, _ = chosen(units, config)
    return choose_catch_up(config, full, source(units), changed)[:3]


@pytest.mark.parametrize("units", [100, 400, 3000])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_catching_up_takes_at_most_a_third_of_a_training_from_scratch(units: int, share: float) -> None:
    config, spec, reduced = catch_up(units, round(share * units))
    full, _ = chosen(units)
    assert config.num_epochs == 1.0
    assert spec.max_examples is not None
    assert reduced.training_set is not None
    assert reduced.training_set.examples <= spec.max_examples
    in_full = full.max_steps * full.batch_size if full.max_steps else (full.num_epochs or 1) * 0.9 * units
    assert spec.max_examples <= max(MIN_UNITS, in_full / 3)
    assert config.learning_rate == pytest.approx(CATCH_UP_RATE * MEASURED_RATE)


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_catching_up_takes_no_more_steps_than_the_setting_allows(batch_size: int) -> None:
    request = TrainingConfig(batch_size=batch_size)
    full, _ = choose_defaults(request, SMOLLM2_SHAPE, source(1000), 150.0, most_steps=5)
    config, spec, reduced, why = choose_catch_up(request, full, source(1000), 300, most_steps=5)
    assert spec.max_examples is not None
    assert reduced.training_set is not None
    assert reduced.training_set.examples == spec.max_examples
    assert steps_of(spec.max_examples, config.num_epochs or 0, batch_size) == 5
    assert why == "At most 5 steps, by the setting max_training_steps."


@pytest.mark.parametrize(("duration", "most_steps"), [({}, 100_000), ({"num_epochs": 2}, 5)])
def test_the_setting_does_not_limit_a_shorter_or_a_given_duration(duration: dict[str, Any], most_steps: int) -> None:
    request = TrainingConfig(**duration)
    full, _ = choose_defaults(request, SMOLLM2_SHAPE, source(1000), 150.0, most_steps=most_steps)
    limited = choose_catch_up(request, full, source(1000), 300, most_steps=most_steps)
    assert limited == choose_catch_up(request, full, source(1000), 300)
    assert not limited[-1]


def test_a_given_duration_and_learning_rate_are_used_when_catching_up() -> None:
    config, spec, reduced = catch_up(1000, 100, max_steps=7, learning_rate=1e-4)
    assert (config.max_steps, config.num_epochs, config.learning_rate) == (7, None, 1e-4)
    assert spec == CatchUpSpec(replay_share=REPLAY_SHARE, max_examples=None)
    assert reduced.training_set is not None
    assert reduced.training_set.examples == 200
