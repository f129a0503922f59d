"""The loss over a training, from its events."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from peft_core.errors import sanitize
from peft_core.schemas.events import Event, HeldOutMeasured, RateLowered, StepCompleted

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


# FOLDED FROM peft_core.evaluation.loss_curve: A loss curve laid out on a canvas: what the report's SVG and the
# picture draw alike.

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


# FOLDED FROM peft_core.evaluation.loss_curve: The loss curve as a PNG, for clients that show images. Pillow is
# imported when one is asked for.

_SCALE = 2  # points of the picture for one of the chart
_PAPER, _INK, _GRID = "#ffffff", "#555555", "#e6e6e6"
_LINES: dict[Kind, tuple[str, int, str]] = {
    "step": ("#c9d8ea", 1, ""),
    "smooth": ("#2563a8", 2, "training loss"),
    "held_out": ("#b5500f", 2, "held-out loss"),
}


def draw(curve: Curve, title: str) -> bytes:
    """PNG, 1440 x 664. `curve` must not be empty; `title` is cut to what fits."""
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 -- not at the server's start

    chart, head = lay_out(curve), 32
    image = Image.new("RGB", (_SCALE * WIDTH, _SCALE * (HEIGHT + head)), _PAPER)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(_SCALE * 11)

    def at(x: float, y: float) -> tuple[float, float]:
        return _SCALE * x, _SCALE * (y + head)

    printable = sanitize(title, limit=90).encode("latin-1", "replace").decode("latin-1")  # all that the font has
    pen.text(at(chart.left, 8 - head), printable, fill=_INK, font=font)
    for tick in chart.y_ticks:
        pen.line([at(chart.left, tick.at), at(chart.right, tick.at)], fill=_GRID, width=_SCALE)
        pen.text(at(chart.left - 6, tick.at), tick.label, fill=_INK, font=font, anchor="rm")
    for tick in chart.x_ticks:
        pen.text(at(tick.at, chart.bottom + 12), tick.label, fill=_INK, font=font, anchor="mm")
    pen.text(at(chart.right, chart.bottom + 26), "step", fill=_INK, font=font, anchor="rm")
    legend = chart.right
    for kind, (color, width, name) in _LINES.items():
        points = [at(x, y) for x, y in chart.lines[kind]]
        if len(points) > 1:
            pen.line(points, fill=color, width=_SCALE * width, joint="curve")
        if kind == "held_out":
            for x, y in points:
                pen.ellipse([x - 6, y - 6, x + 6, y + 6], fill=color)
        if name and points:
            pen.text(at(legend, 12), name, fill=color, font=font, anchor="rm")
            legend -= 100
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
