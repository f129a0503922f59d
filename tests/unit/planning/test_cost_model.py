"""Estimates before a run are near what was measured, and change in the right direction."""

from __future__ import annotations

import os
from typing import Any

import psutil
import pytest

from peft_core.planning.cost_model import (
    CPU_FLOPS_PER_CORE,
    CostedPlan,
    compute_plans,
    estimate,
    flops_per_token,
    lora_parameters,
    memory_bytes,
    training_speed,
    uses_bf16_blocks,
)
from peft_core.schemas.dataset import SourceSummary
from peft_core.schemas.results import Estimate
from peft_core.schemas.task import ComputePlan
from peft_core.schemas.training import TrainingConfig
from tests.factories import SMOLLM2_SHAPE, make_base, make_source

FLOAT32 = ComputePlan()
BFLOAT16 = ComputePlan(weights="bfloat16")
FILE = ComputePlan(weights="file")
LEANEST = ComputePlan(weights="file", recompute_layers=True)


CONFIG = TrainingConfig(rank=16)


def memory(config: TrainingConfig = CONFIG, plan: ComputePlan = FLOAT32, device: str = "cpu") -> int:
    return memory_bytes(config, make_base(), device, plan)


def estimate_of(
    config: TrainingConfig = CONFIG,
    source: SourceSummary | None = None,
    device: str = "cpu",
    plan: ComputePlan = FLOAT32,
    measured: float | None = None,
) -> Estimate:
    base = make_base()
    speed = training_speed(base, device, measured, uses_bf16_blocks=uses_bf16_blocks(config, base, plan))
    return estimate(config, source or make_source(), CostedPlan(plan, memory(config, plan, device), speed))


@pytest.mark.parametrize(
    ("plan", "measured"),
    [
        (FLOAT32, 1.58e9),
        (BFLOAT16, 1.26e9),
        (ComputePlan(weights="bfloat16", recompute_layers=True), 0.97e9),
        (FILE, 1.15e9),
        (LEANEST, 0.81e9),
    ],
)
def test_estimated_memory_is_near_the_measured_peak_of_the_bundled_base(plan: ComputePlan, measured: float) -> None:
    assert memory(plan=plan) == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("config", "measured"),
    [(TrainingConfig(rank=16, batch_size=32), 2.24e9), (TrainingConfig(rank=16, precision="float32"), 2.33e9)],
)
def test_estimated_memory_on_a_gpu_is_near_what_torch_allocated(config: TrainingConfig, measured: float) -> None:
    assert memory(config, device="cuda") == pytest.approx(measured, rel=0.15)  # an H200


def test_estimated_memory_on_a_gpu_covers_batches_that_do_not_fill_up() -> None:
    assert 1.08e9 < memory(device="cuda") < 1.4e9  # 4 examples of about 235 tokens where 512 each are planned for


def test_plans_start_with_the_fastest_and_end_with_the_leanest() -> None:
    without, with_units = (compute_plans(CONFIG, make_base(), "cpu", cpu_bfloat16=units) for units in (False, True))
    assert (without[0], with_units[0]) == (FLOAT32, BFLOAT16)
    for plans in (without, with_units):
        assert plans[-1] == LEANEST
        assert min(plans, key=lambda plan: memory(plan=plan)) == LEANEST


def test_precision_float32_is_respected_although_bfloat16_would_be_faster() -> None:
    plans = compute_plans(TrainingConfig(precision="float32"), make_base(), "cpu", cpu_bfloat16=True)
    assert {plan.weights for plan in plans} == {"float32", "file"}


def test_an_unknown_family_is_planned_with_complete_weights_and_logits() -> None:
    unknown = make_base(model_type="gemma3_text", format="huggingface", size_bytes=2 * SMOLLM2_SHAPE.parameters)
    assert {plan.weights for plan in compute_plans(CONFIG, unknown, "cpu", cpu_bfloat16=True)} == {"float32"}
    # Its file is mapped while it is converted to float32, its blocks store more, and its logits are not chunked.
    more = memory_bytes(CONFIG, unknown, "cpu", FLOAT32) - memory()
    assert more > 2 * SMOLLM2_SHAPE.parameters + 4 * 3 * 512 * SMOLLM2_SHAPE.vocab_size


def test_the_adapter_has_as_many_parameters_as_peft_makes() -> None:
    # 19 593 064 bytes of float32 were written for rank 16, of which 59 KB are the header.
    assert lora_parameters(16, SMOLLM2_SHAPE) * 4 == pytest.approx(19_593_064, rel=0.005)


def test_longer_examples_dropout_and_a_higher_rank_take_more_memory() -> None:
    changed: tuple[dict[str, Any], ...] = ({"max_length": 1024}, {"dropout": 0.1}, {"rank": 64})
    for changes in changed:
        assert memory(TrainingConfig(**{"rank": 16, **changes})) > memory()


def test_steps_follow_from_epochs_and_batch_size_or_are_given() -> None:
    source = make_source(kind="records", examples=100, estimated_tokens=20_000)
    assert estimate_of(CONFIG, source).steps == 23  # 90 to train on, 4 a step
    assert estimate_of(TrainingConfig(rank=16, num_epochs=2), source).steps == 45
    assert estimate_of(TrainingConfig(rank=16, max_steps=7), source).steps == 7


def test_a_measured_speed_replaces_the_rule_of_thumb() -> None:
    measured, guessed = estimate_of(measured=1000.0), estimate_of()
    assert measured.seconds is not None
    assert guessed.seconds is not None
    assert measured.seconds < guessed.seconds
    assert "your last run" in measured.basis


def test_bf16_blocks_are_planned_to_be_faster() -> None:
    bf16, float32 = estimate_of(plan=BFLOAT16), estimate_of()
    assert bf16.seconds is not None
    assert float32.seconds is not None
    assert bf16.seconds < float32.seconds


def test_no_speed_is_invented_for_other_devices() -> None:
    assert estimate_of(device="mps").seconds is None


def test_the_estimate_plans_with_the_physical_cores_that_training_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical=True: 8 if logical else 4)
    speed = training_speed(make_base(), "cpu", None)
    assert speed.tokens_per_second == 4 * CPU_FLOPS_PER_CORE["float32"] / flops_per_token(SMOLLM2_SHAPE)
    assert "4 CPU cores" in speed.basis
