"""A run whose numbers are no longer finite: how it is noticed, lower rates, and what is said when they did not help."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from peft_core.errors import NotFinite, TrainingError
from peft_core.events import RateLowered
from peft_core.spec import TrainingConfig


class Diverged(Exception):
    """At a step, and what shows it."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"at step {step} {what}")
        self.step, self.what = step, what


def check_finite(step: int, loss: float, gradient_norm: float) -> None:
    """Raise Diverged unless both are."""
    infinity = float("inf")
    if not abs(loss) < infinity:
        raise Diverged(step, f"the loss is {loss}")
    if not gradient_norm < infinity:
        raise Diverged(step, f"the gradient norm is {gradient_norm}")


def multiply_rates(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, by: float
) -> None:
    """Those of now and all that the schedule has to come."""
    for group in optimizer.param_groups:
        group["lr"] *= by
        group["initial_lr"] *= by
    rates = scheduler.state_dict()
    rates |= {name: [rate * by for rate in rates[name]] for name in ("base_lrs", "_last_lr")}
    scheduler.load_state_dict(rates)


def failure_of(
    fault: Diverged, lowered: Sequence[RateLowered], config: TrainingConfig, step: int, device: torch.device
) -> TrainingError:
    """What happened after `step` completed ones, what was tried, and the likely cause."""
    tried = "; ".join(
        f"after step {event.step}, where {event.reason}, 1/{1 / event.factor:g} of the rate from step {event.back_to_step}"
        for event in lowered
    )
    rate_A, rate_B = config.rates
    other_rate = [
        f"Lower learning_rate, for instance to {rate_A * lowered[-1].factor:g}.",
        "Lower max_grad_norm, or raise warmup_ratio.",
    ]
    other_data = ["Try a smaller max_length or another seed: the examples are then cut or ordered differently."]
    if device.type != "cpu":
        other_data.append("Try device='cpu', which computes in float32.")
    if step == lowered[-1].back_to_step:
        cause = "No update lies between: not the rate, but the examples of this step or the arithmetic are the cause."
        suggestions = other_data
    elif all(event.step == fault.step for event in lowered):
        cause = "The likely cause is too high a rate, or, as it is the same step each time, its examples."
        suggestions = other_rate + other_data
    else:
        cause = "The likely cause is too high a rate."
        suggestions = other_rate
    rates = f"learning_rate = {rate_A:g}, {rate_B:g} for LoRA B"
    return TrainingError(
        f"At step {fault.step} {fault.what}: the run diverged ({rates}). {cause} Tried in vain: {tried}.",
        code=NotFinite.code,
        suggestions=suggestions,
        details={"step": fault.step, "tried": [event.model_dump(exclude={"kind"}) for event in lowered]},
    )
