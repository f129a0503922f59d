"""How much is compared, and what happens if a device must not train."""

from __future__ import annotations

from typing import Any

import pytest

from peft_core.errors import TrainingError
from peft_core.planning.device_check import Effort, expected_device_bytes, on_cpu, plan_effort, why_too_large
from peft_core.schemas.device_check import Outcome
from peft_core.schemas.task import ComputePlan, JobRequest
from peft_core.schemas.training import TrainingConfig
from tests.factories import SMOLLM2_SHAPE, make_base, make_device_check, make_request

DIFFERS = make_device_check(outcome=Outcome.DIFFERS, reason="the loss differs by 9 % (tolerance 1 %)")
MUCH = 1 << 45


def effort(parameters: float, *, layers: int = 32, model_type: str = "llama", available: int = MUCH) -> Effort:
    base = make_base(
        model_type=model_type, shape=SMOLLM2_SHAPE.model_copy(update={"parameters": int(parameters), "layers": layers})
    )
    return plan_effort(base, TrainingConfig(rank=16), cores=4, available_bytes=available)


def test_small_models_are_compared_completely_and_larger_ones_with_less_text() -> None:
    assert effort(135e6) == Effort(128, 32)
    assert effort(5e9) == Effort(64, 32)
    assert effort(10e9) == Effort(32, 32)


def test_of_a_model_that_takes_over_a_minute_the_first_layers_are_compared() -> None:
    found = effort(70e9, layers=80)
    assert (found.document_tokens, found.skipped) == (32, "")
    assert 2 <= found.layers < 80


def test_a_model_that_cannot_be_compared_in_part_is_skipped_with_the_reason() -> None:
    assert effort(70e9, model_type="unknown").skipped == "the CPU would take about 5 minutes for 64 tokens"


def test_a_copy_that_does_not_fit_into_memory_is_skipped_with_the_reason() -> None:
    found = effort(1e9, model_type="unknown", available=3_000_000_000)
    assert found.skipped.startswith("the CPU needs ")
    assert found.skipped.endswith("GB of memory for it, and has 3.0 GB")


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_the_device_is_expected_to_hold_the_estimate_without_optimiser_and_process(device: str) -> None:
    request = make_request(device=device)
    assert 0 < expected_device_bytes(request) < request.estimate.memory_bytes * 3


GB = 1_000_000_000


@pytest.mark.parametrize(
    ("device", "limit_mb", "asked_mb", "recommended", "words"),
    [
        ("cuda", None, None, None, ""),  # smaller micro-batches follow when it is full
        ("cuda", 4000, None, None, ""),
        ("cuda", 2000, None, None, "the limit max_memory_mb is 2000 MB"),
        ("cuda", 4000, 1500, None, "the limit max_memory_mb is 1500 MB"),
        ("mps", None, None, 20 * GB, ""),
        ("mps", None, None, 3 * GB, "the system recommends at most 3.00 GB"),
        ("mps", 2500, None, 3 * GB, "the limit max_memory_mb is 2500 MB"),
    ],
)
def test_a_device_is_too_small_only_where_a_limit_is_set_or_its_memory_is_that_of_the_computer(
    device: str, limit_mb: int | None, asked_mb: int | None, recommended: int | None, words: str
) -> None:
    request = make_request(device=device, config=TrainingConfig(rank=16, max_memory_mb=asked_mb))
    reason = why_too_large(request, 3 * GB, limit_mb=limit_mb, recommended_bytes=recommended)
    assert words in reason
    assert bool(reason) is bool(words)


def planned(available: int = MUCH, limit_mb: int | None = None, **config: Any) -> JobRequest:
    request = make_request(device="cuda", config=TrainingConfig(rank=16, **config))
    return on_cpu(request, DIFFERS, limit_mb=limit_mb, available_bytes=available, cpu_bfloat16=False)


def test_a_run_continues_with_the_fastest_plan_that_fits_the_cpu() -> None:
    fast, lean = planned(), planned(limit_mb=1000)
    assert (fast.device, fast.execution) == ("cpu", ComputePlan())
    assert lean.execution.weights == "file"
    assert lean.estimate.memory_bytes <= 1_000_000_000
    assert fast.estimate.seconds is not None
    assert fast.config == TrainingConfig(rank=16)


def test_without_enough_memory_one_error_says_what_is_missing() -> None:
    with pytest.raises(
        TrainingError, match=r"the CPU needs .* GB of memory for this training, and may take 0\.5 GB"
    ) as error:
        planned(available=500_000_000)
    assert error.value.code == "device_check_failed"
    assert "the loss differs by 9 %" in error.value.message
    assert len(error.value.message) < 400


def test_a_run_of_more_than_an_hour_on_the_cpu_is_not_begun_unless_its_time_is_limited() -> None:
    estimate = make_request().estimate.model_copy(update={"train_tokens": 10**9})
    request = make_request(device="cuda", estimate=estimate)
    rest: dict[str, Any] = {"limit_mb": None, "available_bytes": MUCH, "cpu_bfloat16": False}
    with pytest.raises(TrainingError, match=r"the CPU would take about \d+\.\d hours") as error:
        on_cpu(request, DIFFERS, **rest)
    assert "config.device='cpu'" in str(error.value)
    limited = request.model_copy(update={"config": TrainingConfig(rank=16, max_minutes=30)})
    assert on_cpu(limited, DIFFERS, **rest).device == "cpu"
