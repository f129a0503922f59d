"""`report.html`: one page that tells whether an adapter helps. Self-contained: opens offline, fetches and runs nothing.

Everything in it that comes from code, file names or foreign manifests is escaped, and may hold no control characters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files

import jinja2

from peft_core.proof.chart import HEIGHT, WIDTH, Chart, lay_out
from peft_core.proof.curve import Curve
from peft_core.results import Benefit, Comparison, Evaluation

_WORDS = {
    Benefit.HELPS: "The adapter helps",
    Benefit.NO_DIFFERENCE: "No difference could be shown",
    Benefit.HARMS: "The adapter harms",
}
_STAY = "\n\t"
_HIDDEN = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")  # control, format (which reorder text), private, surrogates, separators


@dataclass(frozen=True)
class Row:
    """One figure of the comparison, and where its interval lies on a strip of -1 to 1."""

    name: str
    note: str
    base: str
    adapter: str
    change: str
    interval: str
    strip: tuple[float, float, float] | None  # low, change, high
    better: bool | None  # None: the interval holds zero, or there is none


def render(
    *,
    title: str,
    subtitle: str,
    evaluation: Evaluation,
    curve: Curve | None,
    facts: Mapping[str, Mapping[str, str]],
) -> str:
    """`facts`: tables by heading, of what else is to be told."""
    template = _environment().from_string(
        files("peft_core.proof").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        title=title,
        subtitle=subtitle,
        verdict=_WORDS[evaluation.verdict],
        evaluation=evaluation,
        rows=list(_rows(evaluation)),
        chart=_chart(curve),
        width=WIDTH,
        height=HEIGHT,
        facts=facts,
        texts=[
            ("Where the adapter wrote better by most", evaluation.gains),
            ("Where it wrote worse by most", evaluation.losses),
        ],
    )


def shown(text: object) -> str:
    """As it can be printed: what is invisible, or reorders what stands beside it, becomes a replacement character."""
    return "".join(
        letter if letter in _STAY or unicodedata.category(letter) not in _HIDDEN else "\N{REPLACEMENT CHARACTER}"
        for letter in str(text)
    )


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["shown"] = shown
    environment.filters["points"] = lambda positions: " ".join(f"{x:g},{y:g}" for x, y in positions)
    return environment


def _chart(curve: Curve | None) -> Chart | None:
    return None if curve is None or curve.is_empty else lay_out(curve)


def _rows(evaluation: Evaluation) -> Iterator[Row]:
    loss = evaluation.loss
    yield _row("Held-out loss", "nats per token, lower is better; it decides", loss, lower_is_better=True)
    if evaluation.next_line is not None:
        note = f"of {evaluation.lines} lines, each given all before it; higher is better"
        yield _row("Next line exact", note, evaluation.next_line, percent=True)
    if evaluation.edit_similarity is not None:
        note = f"of up to three lines behind {evaluation.prompts} prompts; higher is better"
        yield _row("Edit similarity", note, evaluation.edit_similarity, percent=True)
    if evaluation.general_loss is not None:
        note = "nats per token of code from Python's standard library: what is forgotten; lower is better"
        yield _row("General code", note, evaluation.general_loss, lower_is_better=True)


def _row(name: str, note: str, figure: Comparison, *, lower_is_better: bool = False, percent: bool = False) -> Row:
    def say(value: float, *, sign: bool = False) -> str:
        number = f"{100 * value:+.1f}" if percent else f"{value:+.3f}"
        return (number if sign else number.lstrip("+")) + (" %" if percent and not sign else "")

    if figure.low is None or figure.high is None:
        interval, strip, better = "too little to tell", None, None
    else:
        interval = f"{say(figure.low, sign=True)} to {say(figure.high, sign=True)}"
        reach = 1.1 * max(abs(figure.low), abs(figure.high)) or 1.0
        strip = (figure.low / reach, figure.change / reach, figure.high / reach)
        better = None if figure.low <= 0 <= figure.high else (figure.change < 0) is lower_is_better
    return Row(
        name, note, say(figure.base), say(figure.adapter), say(figure.change, sign=True), interval, strip, better
    )
