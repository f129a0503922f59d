"""`report.html`: one page that tells whether an adapter helps. Self-contained: opens offline, fetches and runs nothing.

Everything in it that comes from code, file names or foreign manifests is escaped, and may hold no control characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import jinja2

from peft_core.adapters.manifest import REPORT_NAME, Manifest, read_manifest
from peft_core.errors import sanitize
from peft_core.evaluation.loss_curve import HEIGHT, WIDTH, Chart, Curve, curve_of, lay_out
from peft_core.schemas.evaluation import Comparison, Evaluation, Verdict
from peft_core.schemas.events import Evaluated, Event
from peft_core.schemas.task import JobRequest


def write_evaluation_report(directory: Path, request: JobRequest, events: Iterable[Event]) -> None:
    """`report.html` in the job's directory: a published adapter never changes."""
    evaluations = [event.evaluation for event in events if isinstance(event, Evaluated)]
    if request.evaluated is None or not evaluations:
        return
    manifest = read_manifest(request.evaluated.adapter_path)
    trained_on = f"{manifest.base.name}, project {manifest.project_id}" if manifest else "not recorded"
    facts = {
        "adapter": str(request.evaluated.adapter_path),
        "trained on": trained_on,
        "measured with base": request.base.name,
        "data": str(request.found.path or "records"),
        "trained-on examples": "left out" if evaluations[-1].seen_in_training is not None else "not known",
    }
    page = render(
        title=f"{request.evaluated.adapter_path.name} on {request.base.name}",
        subtitle=f"Measured on {request.found.path or 'records'}",
        evaluation=evaluations[-1],
        curve=None,
        facts={"What was measured": facts},
    )
    (directory / REPORT_NAME).write_text(page, encoding="utf-8")


_WORDS = {
    Verdict.HELPS: "The adapter helps",
    Verdict.NO_DIFFERENCE: "No difference could be shown",
    Verdict.HARMS: "The adapter harms",
}


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
        files("peft_core.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8"),
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


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = partial(sanitize, limit=None, keep="\n\t")
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
        name,
        note,
        say(figure.base),
        say(figure.adapter),
        say(figure.change, sign=True),
        interval,
        strip,
        better,
    )


# FOLDED FROM peft_core.evaluation.report: The report that lies beside a manifest: the evaluation, how the run went,
# what it was made of.


def write_report(directory: Path, manifest: Manifest, events: Iterable[Event]) -> Path | None:
    """Write it from the events of a job, which have the curve and the quoted texts; None where nothing was evaluated."""
    known = list(events)
    evaluations = [event.evaluation for event in known if isinstance(event, Evaluated)]
    evaluation: Evaluation | None = evaluations[-1] if evaluations else manifest.evaluation
    if evaluation is None:
        return None
    page = render(
        title=f"{manifest.project_id} on {manifest.base.name}",
        subtitle=f"Adapter {manifest.adapter_id}, trained {manifest.created_at}",
        evaluation=evaluation,
        curve=curve_of(known),
        facts=facts_of(manifest),
    )
    path = directory / REPORT_NAME
    path.write_text(page, encoding="utf-8")
    return path


def facts_of(manifest: Manifest) -> dict[str, dict[str, str]]:
    """Tables of what an adapter was made from and how."""
    summary, run, config, metrics = manifest.data.summary, manifest.run, manifest.run.config, manifest.metrics
    left_out = ", ".join(f"{count} {reason}" for reason, count in summary.left_out.items())
    data = {
        "trained on": f"{summary.train_examples} examples, {summary.train_tokens} tokens",
        "held out": f"{summary.held_out_examples} examples, {summary.held_out_tokens} tokens",
        "files": f"{summary.files} ({', '.join(f'{count} {name}' for name, count in manifest.data.languages.items())})",
        "left out": left_out or "nothing",
        "secrets removed": str(summary.secrets_removed),
        "commit": manifest.data.repository_commit or "",
    }
    rates = "unknown" if config.learning_rate is None else "{:g} for A, {:g} for B".format(*config.rates)
    training = {
        "base": f"{manifest.base.name}, {manifest.base.shape.parameters / 1e6:.0f}M parameters",
        "LoRA": f"rank {config.rank}, alpha {config.lora_alpha:g}, on {', '.join(run.target_modules)}",
        "steps": f"{run.steps} of {config.batch_size} examples, at most {config.max_length} tokens each",
        "rate": f"{rates}; {config.lr_scheduler}, {config.warmup_ratio:.0%} warm-up; seed {config.seed}",
        "device": f"{run.device}, frozen weights in {run.weights_dtype}",
        "speed": f"{metrics.tokens_per_second:.0f} tokens/s" if metrics.tokens_per_second else "",
        "time": f"{metrics.wall_s:.0f} s in all" if metrics.wall_s else "",
        "peak memory": f"{metrics.peak_memory_bytes / 1e6:.0f} MB" if metrics.peak_memory_bytes else "",
        "adapter": f"{metrics.adapter_bytes / 1e6:.1f} MB" if metrics.adapter_bytes else "",
    }
    return {
        "Data": {name: value for name, value in data.items() if value},
        "Training": {name: value for name, value in training.items() if value},
    }
