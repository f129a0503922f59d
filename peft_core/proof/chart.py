"""A loss curve laid out on a canvas: what the report's SVG and the picture draw alike."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from peft_core.proof.curve import Curve, Points

WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 34
_TICKS = 5

Kind = Literal["step", "smooth", "held_out"]
Position = tuple[float, float]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Positions in units of the canvas, WIDTH x HEIGHT, the origin above on the left."""

    lines: dict[Kind, tuple[Position, ...]]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def lay_out(curve: Curve) -> Chart:
    """`curve` must not be empty. Losses beyond what is finite are left out."""
    series: dict[Kind, Points] = {"step": curve.steps, "smooth": curve.smooth, "held_out": curve.held_out}
    finite = {kind: [(step, loss) for step, loss in points if math.isfinite(loss)] for kind, points in series.items()}
    losses = [loss for points in finite.values() for _, loss in points] or [0.0]
    last_step = max((step for points in finite.values() for step, _ in points), default=1)
    x_ticks, x_end = list(_nice(0, last_step, whole=True)), last_step or 1
    y_ticks = list(_nice(min(losses), max(losses)))
    low, high = min(y_ticks[0], *losses), max(y_ticks[-1], *losses)

    def x(step: float) -> float:
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * step / x_end, 1)

    def y(loss: float) -> float:
        return round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (loss - low) / ((high - low) or 1), 1)

    return Chart(
        lines={kind: tuple((x(step), y(loss)) for step, loss in points) for kind, points in finite.items()},
        x_ticks=tuple(Tick(x(step), f"{step:.0f}") for step in x_ticks),
        y_ticks=tuple(Tick(y(loss), f"{loss:.3g}") for loss in y_ticks),
    )


def _nice(low: float, high: float, *, whole: bool = False) -> Iterator[float]:
    """Round numbers that lie in the range, a few."""
    span = (high - low) or max(abs(high), 1.0)
    raw = span / _TICKS
    size = 10.0 ** math.floor(math.log10(raw))
    gap = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= raw)
    if whole:
        gap = max(1.0, round(gap))
    first = math.ceil(low / gap - 1e-9)
    last = max(first, math.floor(high / gap + 1e-9))
    for number in range(first, last + 1):
        yield number * gap
