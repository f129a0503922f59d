"""What counts as equal: rounding does, and nothing else."""

from __future__ import annotations

import pytest

from peft_core.devices.tolerance import memory_note, needs_emulation, tolerance, why_different
from peft_core.schemas.device_check import GradientDifference

ROUNDING = GradientDifference(loss=1e-3, gradient=0.03, worst=0.08, worst_tensor="layers.3.mlp.up_proj, A", scale=2e-3)


def test_rounding_of_three_times_the_emulated_size_is_tolerated_and_of_five_times_is_not() -> None:
    allowed = tolerance(ROUNDING)
    assert why_different(ROUNDING.model_copy(update={"gradient": 0.09, "worst": 0.24}), allowed) == ""
    reason = why_different(ROUNDING.model_copy(update={"gradient": 0.15}), allowed)
    assert reason == "the gradient differs by 15 % (tolerance 12 %)"


def test_one_wrong_tensor_is_named_although_the_whole_gradient_agrees() -> None:
    found = ROUNDING.model_copy(update={"worst": 0.5})
    assert (
        why_different(found, tolerance(ROUNDING)) == "that of layers.3.mlp.up_proj, A differs by 50 % (tolerance 32 %)"
    )


def test_a_gradient_of_another_length_is_found_below_the_tolerance_of_its_direction() -> None:
    found = ROUNDING.model_copy(update={"gradient": 0.06, "scale": 0.05})
    assert why_different(found, tolerance(ROUNDING)).startswith("the length of the gradient differs by 5 %")


def test_float32_is_held_to_a_thousandth() -> None:
    allowed = tolerance(None)
    assert (allowed.gradient, allowed.worst, allowed.loss, allowed.scale) == (1e-3, 1e-3, 1e-3, 1e-3)
    assert not needs_emulation("float32")
    assert all(map(needs_emulation, ("tf32", "float16", "bfloat16")))


def test_nothing_that_differs_as_much_as_random_numbers_is_tolerated() -> None:
    chaotic = GradientDifference(loss=1.0, gradient=1.0, worst=1.4, worst_tensor="x", scale=1.0)
    assert tolerance(chaotic).gradient < 1
    assert why_different(chaotic, tolerance(chaotic))


def test_nan_exceeds_every_tolerance() -> None:
    nan = float("nan")
    found = GradientDifference(loss=nan, gradient=nan, worst=nan, worst_tensor="x", scale=nan)
    assert why_different(found, tolerance(ROUNDING)).startswith("the loss differs by nan")


@pytest.mark.parametrize(("measured", "is_noted"), [(None, False), (900, False), (1190, False), (1210, True)])
def test_memory_is_noted_if_it_is_a_fifth_above_the_estimate(measured: int | None, is_noted: bool) -> None:
    assert bool(memory_note(measured, 1000)) is is_noted
