"""Estimates before a run: near what was measured, and moving the right way."""

from __future__ import annotations

import pytest

from peft_core.planning.cost_model import compute_plans, estimate, lora_parameters, memory_bytes
from peft_core.schemas.task import ComputePlan
from peft_core.schemas.training import TrainingConfig
from tests.factories import SMOLLM2_SHAPE, make_base, make_source

FLOAT32 = ComputePlan()
BFLOAT16 = ComputePlan(weights="bfloat16")
FILE = ComputePlan(weights="file")
LEANEST = ComputePlan(weights="file", recompute_layers=True)


def memory(config: TrainingConfig | None = None, way: ComputePlan = FLOAT32, device: str = "cpu") -> int:
    return memory_bytes(config or TrainingConfig(), make_base(), device, way)


@pytest.mark.parametrize(
    ("way", "measured"),
    [
        (FLOAT32, 1.58e9),
        (BFLOAT16, 1.26e9),
        (ComputePlan(weights="bfloat16", recompute_layers=True), 0.97e9),
        (FILE, 1.15e9),
        (LEANEST, 0.81e9),
    ],
)
def test_memory_is_near_what_the_bundled_base_was_measured_to_take(way: ComputePlan, measured: float) -> None:
    assert memory(way=way) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("config", "measured"),
    [(TrainingConfig(batch_size=32), 2.24e9), (TrainingConfig(precision="float32"), 2.33e9)],
)
def test_memory_on_a_gpu_is_near_what_torch_took_of_one(config: TrainingConfig, measured: float) -> None:
    assert memory(config, device="cuda") == pytest.approx(measured, rel=0.15)  # an H200


def test_memory_on_a_gpu_is_no_less_than_was_taken_by_batches_that_did_not_fill_up() -> None:
    assert 1.08e9 < memory(device="cuda") < 1.4e9  # 4 examples of about 235 tokens where 512 each are planned for


def test_ways_to_compute_come_with_the_fastest_first_and_end_with_the_leanest() -> None:
    plain, units = (compute_plans(TrainingConfig(), make_base(), "cpu", cpu_bfloat16=there) for there in (False, True))
    assert (plain[0], units[0]) == (FLOAT32, BFLOAT16)
    for ways in (plain, units):
        assert ways[-1] == LEANEST
        assert min(ways, key=lambda way: memory(way=way)) == LEANEST


def test_precision_float32_is_kept_where_bfloat16_would_be_faster() -> None:
    ways = compute_plans(TrainingConfig(precision="float32"), make_base(), "cpu", cpu_bfloat16=True)
    assert {way.weights for way in ways} == {"float32", "file"}


def test_a_base_of_an_unknown_kind_is_planned_as_a_whole_and_with_room() -> None:
    unknown = make_base(model_type="gemma3_text", format="huggingface", size_bytes=2 * SMOLLM2_SHAPE.parameters)
    assert {way.weights for way in compute_plans(TrainingConfig(), unknown, "cpu", cpu_bfloat16=True)} == {"float32"}
    # Its file is mapped while it becomes float32, its blocks keep more, and its logits are there as a whole.
    more = memory_bytes(TrainingConfig(), unknown, "cpu", FLOAT32) - memory()
    assert more > 2 * SMOLLM2_SHAPE.parameters + 4 * 3 * 512 * SMOLLM2_SHAPE.vocab_size


def test_the_adapter_has_as_many_parameters_as_peft_makes() -> None:
    # 19 593 064 bytes of float32 were written for rank 16, of which 59 KB are the header.
    assert lora_parameters(16, SMOLLM2_SHAPE) * 4 == pytest.approx(19_593_064, rel=0.005)


def test_longer_examples_dropout_and_rank_take_more_memory() -> None:
    for config in (TrainingConfig(max_length=1024), TrainingConfig(dropout=0.1), TrainingConfig(rank=64)):
        assert memory(config) > memory()


def test_steps_follow_from_epochs_and_batch_or_are_given() -> None:
    source = make_source(kind="records", examples=100, estimated_tokens=20_000)
    assert estimate(TrainingConfig(), make_base(), source, "cpu", FLOAT32).steps == 23  # 90 to train on, 4 a step
    assert estimate(TrainingConfig(num_epochs=2), make_base(), source, "cpu", FLOAT32).steps == 45
    assert estimate(TrainingConfig(max_steps=7), make_base(), source, "cpu", FLOAT32).steps == 7


def test_a_measured_speed_replaces_the_guess_and_no_speed_is_invented_for_other_devices() -> None:
    source = make_source()
    measured = estimate(TrainingConfig(), make_base(), source, "cpu", FLOAT32, measured_tokens_per_second=1000.0)
    guessed = estimate(TrainingConfig(), make_base(), source, "cpu", FLOAT32)
    assert measured.seconds is not None
    assert guessed.seconds is not None
    assert measured.seconds < guessed.seconds
    assert "your last run" in measured.basis
    narrow = estimate(TrainingConfig(), make_base(), source, "cpu", BFLOAT16)
    assert narrow.seconds is not None
    assert narrow.seconds < guessed.seconds
    assert estimate(TrainingConfig(), make_base(), source, "mps", FLOAT32).seconds is None
