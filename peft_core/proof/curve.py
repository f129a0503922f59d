"""The loss over a training, from its events."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft_core.events import Event, HeldOutMeasured, RateLowered, StepCompleted

Points = tuple[tuple[int, float], ...]  # (step, nats per token)
MAX_POINTS = 300  # of a curve that is drawn: more are finer than a screen


@dataclass(frozen=True)
class Curve:
    steps: Points  # of each step, as trained
    smooth: Points  # the same, averaged over neighbours
    held_out: Points  # the sample that is measured during training

    @property
    def is_empty(self) -> bool:
        return not self.steps


def curve_of(events: Iterable[Event]) -> Curve:
    """Steps that were trained again count as they came out at last."""
    steps: dict[int, float] = {}
    held_out: dict[int, float] = {}
    for event in events:
        match event:
            case StepCompleted(step=step, loss=loss):
                steps[step] = loss
            case HeldOutMeasured(step=step, loss=loss, whole_set=False):
                held_out[step] = loss
            case RateLowered(back_to_step=back):
                steps = {step: loss for step, loss in steps.items() if step <= back}
                held_out = {step: loss for step, loss in held_out.items() if step <= back}
    points = tuple(sorted(steps.items()))
    return Curve(_thinned(points), _thinned(_averaged(points)), tuple(sorted(held_out.items())))


def _averaged(points: Points) -> Points:
    """Each with its neighbours: a twentieth of the curve to either side, at most 25."""
    reach = min(25, len(points) // 20)
    averaged = []
    for at, (step, _) in enumerate(points):
        near = points[max(0, at - reach) : at + reach + 1]
        averaged.append((step, sum(loss for _, loss in near) / len(near)))
    return tuple(averaged)


def _thinned(points: Sequence[tuple[int, float]]) -> Points:
    every = -(-len(points) // MAX_POINTS) or 1
    kept = list(points[::every])
    if points and kept[-1] != points[-1]:
        kept.append(points[-1])
    return tuple(kept)
