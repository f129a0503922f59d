"""The loss curve of a training run: its points, its layout as a chart, and the chart as a PNG.

The chart has positions and tick labels only. The report's template draws it as SVG; `render_png` draws it for clients that
show images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from peft_core.errors import sanitize
from peft_core.schemas.events import Event, HeldOutMeasured, RateLowered, StepCompleted
from peft_core.schemas.job_report import Points

if TYPE_CHECKING:
    from PIL import ImageDraw, ImageFont

Series = Literal["step", "smooth", "held_out", "whole"]
Position = tuple[float, float]

MAX_POINTS = 300  # of a series; a screen does not resolve more
WIDTH, HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 14, 34  # margins
_TICKS = 5  # about so many on each axis

# Of the PNG: 800 pixels wide, with letters that can be read in a panel of 350 pixels.
_SCALE = 800 / WIDTH  # pixels per unit of the chart
_FONT = 22  # pixels
_HEADER = 62  # height of the lines with title and legend, in units of the chart
_FOOTER = 22  # of the line with the name of the axis
_MAX_TITLE = 66
_DOT = 5  # pixels
_PAPER, _INK, _GRID = "#ffffff", "#555555", "#e6e6e6"
_STYLES: dict[Series, tuple[str, int, str]] = {  # colour, width, label
    "step": ("#c9d8ea", 1, ""),
    "smooth": ("#2563a8", 2, "training loss"),
    "held_out": ("#b5500f", 2, "held-out sample"),
    "whole": ("#7a1f5c", 0, "all held-out"),
}


@dataclass(frozen=True)
class LossCurve:
    steps: Points
    smooth: Points  # a moving average of `steps`
    held_out: Points  # on the sample that is evaluated during training
    whole: Points = ()  # on all held-out examples: of the base model at step 0, and of the adapter at the step of its weights

    @property
    def is_empty(self) -> bool:
        return not self.steps

    @property
    def finite(self) -> LossCurve:
        """The curve without losses that are not finite, as of a run that diverged."""

        def keep(points: Points) -> Points:
            return tuple((step, loss) for step, loss in points if math.isfinite(loss))

        return LossCurve(*map(keep, (self.steps, self.smooth, self.held_out, self.whole)))


def loss_curve(events: Iterable[Event]) -> LossCurve:
    """Collect the curve from the events of a run. Steps that a rollback repeated appear once, with their last loss."""
    steps: dict[int, float] = {}
    held_out: dict[int, float] = {}
    whole: dict[int, float] = {}
    for event in events:
        match event:
            case StepCompleted(step=step, loss=loss):
                steps[step] = loss
            case HeldOutMeasured(step=step, loss=loss, whole_set=False):
                held_out[step] = loss
            case HeldOutMeasured(step=step, loss=loss):
                whole[step] = loss
            case RateLowered(back_to_step=target):
                steps = {step: loss for step, loss in steps.items() if step <= target}
                held_out = {step: loss for step, loss in held_out.items() if step <= target}
    points = tuple(sorted(steps.items()))
    return LossCurve(
        _thin_out(points),
        _thin_out(_moving_average(points)),
        tuple(sorted(held_out.items())),
        tuple(sorted(whole.items())),
    )


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
    finite: dict[Series, Points] = {
        "step": curve.steps,
        "smooth": curve.smooth,
        "held_out": curve.held_out,
        "whole": curve.whole,
    }
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
        y_ticks=tuple(Tick(y(loss), label) for loss, label in zip(y_ticks, _equal_decimals(y_ticks), strict=True)),
    )


def _equal_decimals(numbers: Sequence[float]) -> list[str]:
    """Format numbers with as many decimals as the one that needs most of them, but at most three."""
    decimals = next((count for count in range(3) if all(abs(n - round(n, count)) < 1e-9 for n in numbers)), 3)
    return [f"{number:.{decimals}f}" for number in numbers]


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
    """Return a PNG 800 pixels wide. The curve must not be empty; a long title is cut."""
    from PIL import Image, ImageDraw, ImageFont  # noqa: PLC0415 -- not needed before a client asks for the picture

    chart = layout_chart(curve)
    image = Image.new("RGB", (round(_SCALE * WIDTH), round(_SCALE * (HEIGHT + _HEADER + _FOOTER))), _PAPER)
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(_FONT)

    def at(x: float, y: float) -> Position:
        return _SCALE * x, _SCALE * (y + _HEADER)

    printable = (
        sanitize(title, limit=_MAX_TITLE).replace("…", "...").encode("latin-1", "replace").decode("latin-1")
    )  # all that the font has
    pen.text(at(6, 8 - _HEADER), printable, fill=_INK, font=font)
    legend_x = 6.0
    for name, (colour, _, label) in _STYLES.items():
        if label and chart.lines[name]:
            pen.text(at(legend_x, 36 - _HEADER), label, fill=colour, font=font)
            legend_x += (font.getlength(label) + _FONT) / _SCALE
    pen.text(at(chart.right, 36 - _HEADER), "nats per token", fill=_INK, font=font, anchor="ra")
    for tick in chart.y_ticks:
        pen.line([at(chart.left, tick.position), at(chart.right, tick.position)], fill=_GRID, width=2)
        pen.text(at(chart.left - 6, tick.position), tick.label, fill=_INK, font=font, anchor="rm")
    for tick in chart.x_ticks:
        is_last = tick.position > chart.right - 20
        anchor, x = ("rm", chart.right) if is_last else ("mm", tick.position)
        pen.text(at(x, chart.bottom + 18), tick.label, fill=_INK, font=font, anchor=anchor)
    pen.text(at((chart.left + chart.right) / 2, chart.bottom + 40), "step", fill=_INK, font=font, anchor="mm")
    for name, (colour, width, _) in _STYLES.items():
        points = [at(x, y) for x, y in chart.lines[name]]
        if width and len(points) > 1:
            pen.line(points, fill=colour, width=round(width * 1.5), joint="curve")
        if name in ("held_out", "whole"):
            for x, y in points:
                pen.ellipse([x - _DOT, y - _DOT, x + _DOT, y + _DOT], fill=colour)
    _label_losses(
        pen,
        [(*at(*position), loss) for position, (_, loss) in zip(chart.lines["whole"], curve.finite.whole, strict=True)],
        font,
    )
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _label_losses(
    pen: ImageDraw.ImageDraw,
    points: Sequence[tuple[float, float, float]],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
) -> None:
    """Write the loss at each (x, y, loss): beside the point, on the side that is inside the picture, on white."""
    for x, y, loss in points:
        is_right = x > _SCALE * WIDTH / 2
        where, anchor = (x - 3 * _DOT, "rm") if is_right else (x + 3 * _DOT, "lm")
        text = f"{loss:.3f}"
        pen.rectangle(pen.textbbox((where, y), text, font=font, anchor=anchor), fill=_PAPER)
        pen.text((where, y), text, fill=_STYLES["whole"][0], font=font, anchor=anchor)
