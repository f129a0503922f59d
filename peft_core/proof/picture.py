"""The loss curve as a PNG, for clients that show images. Pillow is imported when one is asked for."""

from __future__ import annotations

import io

from peft_core.proof.chart import HEIGHT, WIDTH, Kind, lay_out
from peft_core.proof.curve import Curve

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

    printable = "".join(letter if letter.isprintable() and ord(letter) < 256 else "?" for letter in title)
    pen.text(at(chart.left, 8 - head), printable[:90], fill=_INK, font=font)
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
