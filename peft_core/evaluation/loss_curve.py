"""The loss curve of a training run: its points, its layout as a chart, and the chart as a PNG.

The chart has positions and tick labels only. The report's template draws it as SVG; `render_png` draws it for clients that
show images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from peft_core.errors import sanitize
from peft_core.schemas.events import Event, HeldOutMeasured, RateLowered, StepCompleted
from peft_core.schemas.job_report import Points

Series = Literal["step", "smooth", "held_out"]
Position = tuple[float, float]

MAX_POINTS = 300  # of a series; a screen does not resolve more
WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 34  # margins
_TICKS = 5  # about so many on each axis

# Of the PNG.
_SCALE = 2  # pixels per unit of the chart
_HEADER = 32  # height of the title's line
_PAPER, _INK, _GRID = "#ffffff", "#555555", "#e6e6e6"
_STYLES: dict[Series, tuple[str, int, str]] = {  # colour, width, label
    "step": ("#c9d8ea", 1, ""),
    "smooth": ("#2563a8", 2, "training loss"),
    "held_out": ("#b5500f", 2, "held-out loss"),
}


@dataclass(frozen=True)
class LossCurve:
    steps: Points
    smooth: Points  # a moving average of `steps`
    held_out: Points  # on the sample that is evaluated during training

    @property
    def is_empty(self) -> bool:
        return not self.steps

    @property
    def finite(self) -> LossCurve:
        """The curve without losses that are not finite, as of a run that diverged."""

        def keep(points: Points) -> Points:
            return tuple((step, loss) for step, loss in points if math.isfinite(loss))

        return LossCurve(keep(self.steps), keep(self.smooth), keep(self.held_out))


def loss_curve(events: Iterable[Event]) -> LossCurve:
    """Collect the curve from the events of a run. Steps that a rollback repeated appear once, with their last loss."""
    steps: dict[int, float] = {}
    held_out: dict[int, float] = {}
    for event in events:
        match event:
            case StepCompleted(step=step, loss=loss):
                steps[step] = loss
            case HeldOutMeasured(step=step, loss=loss, whole_set=False):
                held_out[step] = loss
            case RateLowered(back_to_step=target):
                steps = {step: loss for step, loss in steps.items() if step <= target}
                held_out = {step: loss for step, loss in held_out.items() if step <= target}
    points = tuple(sorted(steps.items()))
    return LossCurve(_thin_out(points), _thin_out(_moving_average(points)), tuple(sorted(held_out.items())))


def _moving_average(points: Points) -> Points:
    """Average each point with its neighbours: a twentieth of the curve to either side, but at most 25 points."""
    reach = min(25, len(points) // 20)
    averaged = []
    for index, (step, _) in enumerate(points):
        neighbours = points[max(0, index - reach) : index + reach + 1]
        averaged.append((step, sum(loss for _, loss in neighbours) / len(neighbours)))
    return tuple(averaged)


def _thin_out(points: Sequence[tuple[int, float]]) -> Points:
    every = -(-len(points) // MAX_POINTS) or 1
    thinned = list(points[::every])
    if points and thinned[-1] != points[-1]:
        thinned.append(points[-1])
    return tuple(thinned)


@dataclass(frozen=True)
class Tick:
    position: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A curve on a canvas of WIDTH x HEIGHT units with its origin at the top left."""

    lines: dict[Series, tuple[Position, ...]]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def layout_chart(curve: LossCurve) -> Chart:
    """Scale a curve, which must not be empty, to the canvas. Losses that are not finite are omitted."""
    curve = curve.finite
    finite: dict[Series, Points] = {"step": curve.steps, "smooth": curve.smooth, "held_out": curve.held_out}
    losses = [loss for points in finite.values() for _, loss in points] or [0.0]
    last_step = max((step for points in finite.values() for step, _ in points), default=1)
    x_ticks, x_end = list(_round_numbers(0, last_step, integers=True)), last_step or 1
    y_ticks = list(_round_numbers(min(losses), max(losses)))
    low, high = min(y_ticks[0], *losses), max(y_ticks[-1], *losses)

    def x(step: float) -> float:
        return round(_LEFT + (WIDTH - _LEFT - _RIGHT) * step / x_end, 1)

    def y(loss: float) -> float:
        return round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * (loss - low) / ((high - low) or 1), 1)

    return Chart(
        lines={name: tuple((x(step), y(loss)) for step, loss in points) for name, points in finite.items()},
        x_ticks=tuple(Tick(x(step), f"{step:.0f}") for step in x_ticks),
        y_ticks=tuple(Tick(y(loss), f"{loss:.3g}") for loss in y_ticks),
    )


def _round_numbers(low: float, high: float, *, integers: bool = False) -> Iterator[float]:
    """Yield about _TICKS round numbers in the range: multiples of 1, 2 or 5 times a power of ten."""
    span = (high - low) or max(abs(high), 1.0)
    min_gap = span / _TICKS
    size = 10.0 ** math.floor(math.log10(min_gap))
    gap = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= min_gap)
    if integers:
        gap = max(1.0, round(gap))
    first = math.ceil(low / gap - 1e-9)
    last = max(first, math.floor(high / gap + 1e-9))
    for multiple in range(first, last + 1):
        yield multiple * gap


def render_png(curve: LossCurve, title: str) -> bytes:
    """Return a PNG of 1440 x 664 pixels. The curve must not be empty; a long title is cut."""
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 -- not needed before a client asks for the picture

    chart = layout_chart(curve)
    image = Image.new("RGB", (_SCALE * WIDTH, _SCALE * (HEIGHT + _HEADER)), _PAPER)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(_SCALE * 11)

    def at(x: float, y: float) -> Position:
        return _SCALE * x, _SCALE * (y + _HEADER)

    printable = sanitize(title, limit=90).encode("latin-1", "replace").decode("latin-1")  # all that the font has
    pen.text(at(chart.left, 8 - _HEADER), printable, fill=_INK, font=font)
    for tick in chart.y_ticks:
        pen.line([at(chart.left, tick.position), at(chart.right, tick.position)], fill=_GRID, width=_SCALE)
        pen.text(at(chart.left - 6, tick.position), tick.label, fill=_INK, font=font, anchor="rm")
    for tick in chart.x_ticks:
        pen.text(at(tick.position, chart.bottom + 12), tick.label, fill=_INK, font=font, anchor="mm")
    pen.text(at(chart.right, chart.bottom + 26), "step", fill=_INK, font=font, anchor="rm")
    legend_x = chart.right
    for name, (colour, width, label) in _STYLES.items():
        points = [at(x, y) for x, y in chart.lines[name]]
        if len(points) > 1:
            pen.line(points, fill=colour, width=_SCALE * width, joint="curve")
        if name == "held_out":
            for x, y in points:
                pen.ellipse([x - 6, y - 6, x + 6, y + 6], fill=colour)
        if label and points:
            pen.text(at(legend_x, 12), label, fill=colour, font=font, anchor="rm")
            legend_x -= 100
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
