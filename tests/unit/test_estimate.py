"""Estimates before a run: near what was measured, and moving the right way."""

from __future__ import annotations

import pytest

from peft_core.estimate import estimate, expected_device, lora_parameters, memory_bytes, smallest_memory_bytes
from peft_core.spec import TrainingConfig
from tests.factories import SMOLLM2_SHAPE, make_base, make_source


def test_memory_is_within_a_sixth_of_what_the_bundled_base_was_measured_to_take() -> None:
    assert memory_bytes(TrainingConfig(), make_base(), "cpu") == pytest.approx(1.78e9, rel=1 / 6)


def test_weights_that_stay_in_their_file_take_a_fifth_less() -> None:
    lean = memory_bytes(TrainingConfig(), make_base(), "cpu", "file")
    assert lean == pytest.approx(1.49e9, rel=1 / 6)
    assert lean < 0.85 * memory_bytes(TrainingConfig(), make_base(), "cpu")


def test_the_adapter_has_as_many_parameters_as_peft_makes() -> None:
    # 19 593 064 bytes of float32 were written for rank 16, of which 59 KB are the header.
    assert lora_parameters(16, SMOLLM2_SHAPE) * 4 == pytest.approx(19_593_064, rel=0.005)


def test_longer_examples_dropout_and_rank_take_more_memory() -> None:
    plain = memory_bytes(TrainingConfig(), make_base(), "cpu")
    for config in (TrainingConfig(max_length=1024), TrainingConfig(dropout=0.1), TrainingConfig(rank=64)):
        assert memory_bytes(config, make_base(), "cpu") > plain
    assert smallest_memory_bytes(make_base(), "cpu") < plain


def test_steps_follow_from_epochs_and_batch_or_are_given() -> None:
    source = make_source(kind="records", examples=100, estimated_tokens=20_000)
    assert estimate(TrainingConfig(), make_base(), source, "cpu").steps == 23  # 90 to train on, 4 a step
    assert estimate(TrainingConfig(num_epochs=2), make_base(), source, "cpu").steps == 45
    assert estimate(TrainingConfig(max_steps=7), make_base(), source, "cpu").steps == 7


def test_a_measured_speed_replaces_the_guess_and_no_speed_is_invented_for_other_devices() -> None:
    source = make_source()
    measured = estimate(TrainingConfig(), make_base(), source, "cpu", measured_tokens_per_second=1000.0)
    guessed = estimate(TrainingConfig(), make_base(), source, "cpu")
    assert measured.seconds is not None
    assert guessed.seconds is not None
    assert measured.seconds < guessed.seconds
    assert "your last run" in measured.basis
    assert estimate(TrainingConfig(), make_base(), source, "mps").seconds is None


def test_a_device_that_was_asked_for_is_taken_at_its_word() -> None:
    assert expected_device("cuda") == "cuda"
    assert expected_device("auto") in ("mps", "cuda", "cpu")
