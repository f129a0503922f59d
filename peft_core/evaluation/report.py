"""`report.html`: one page that shows whether an adapter helps, how it was trained, and what it wrote.

The page is self-contained: it opens offline, loads nothing and has no scripts. Text from code, file names and manifests is
escaped, and its control characters are replaced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from pathlib import Path

import jinja2

from peft_core.adapters.manifest import REPORT_NAME, Manifest, read_manifest
from peft_core.errors import sanitize
from peft_core.evaluation.findings import findings_of
from peft_core.evaluation.loss_curve import HEIGHT, WIDTH, LossCurve, layout_chart, loss_curve
from peft_core.paths import adapter_names
from peft_core.schemas.counts import counted
from peft_core.schemas.evaluation import (
    AdapterComparison,
    CatchUp,
    Column,
    ColumnChange,
    Evaluation,
    LossChange,
    Memorisation,
)
from peft_core.schemas.events import AdaptersCompared, Evaluated, Event
from peft_core.schemas.task import JobRequest
from peft_core.system.durations import format_duration


def write_training_report(directory: Path, manifest: Manifest, events: Iterable[Event]) -> Path | None:
    """Write the report of a training next to the adapter's manifest.

    The loss curve and the quoted completions come from the events of the job. Returns None if nothing was evaluated.
    """
    events = list(events)
    evaluations = [event.evaluation for event in events if isinstance(event, Evaluated)]
    evaluation = evaluations[-1] if evaluations else manifest.evaluation
    if evaluation is None:
        return None
    page = render_report(
        title=f"{manifest.project_id} on {manifest.base.name}",
        subtitle=f"Adapter {manifest.adapter_id}, trained {_date(manifest.created_at)}",
        result=evaluation,
        curve=loss_curve(events),
        tables={
            **column_tables(evaluation),
            **_catch_up_tables(evaluation.catch_up),
            "What it repeats of its training text": _memorisation_table(evaluation.memorisation),
            **_study_table(evaluation.study),
            "Data": _data_table(manifest),
            "Training": _training_table(manifest),
        },
    )
    path = directory / REPORT_NAME
    path.write_text(page, encoding="utf-8")
    return path


def write_evaluation_report(directory: Path, request: JobRequest, events: Iterable[Event]) -> None:
    """Write the report of an evaluation to the job's directory, because a published adapter never changes."""
    results = [
        event.evaluation if isinstance(event, Evaluated) else event.comparison
        for event in events
        if isinstance(event, Evaluated | AdaptersCompared)
    ]
    if request.evaluated is None or not results:
        return
    paths = list(request.evaluated.paths.values())
    data = str(request.found.path or "records")
    table = {
        **{
            name: value
            for label, path in zip(_labels(paths), paths, strict=True)
            for name, value in _facts(label, path)
        },
        "evaluated with base model": request.base.name,
        "data": data,
        "examples seen in training": _seen_in_training(results[-1]),
    }
    page = render_report(
        title=f"{' and '.join(adapter_names(paths))} on {request.base.name}",
        subtitle=f"Evaluated on {data}",
        result=results[-1],
        curve=None,
        tables={**column_tables(results[-1]), "What was evaluated": table},
    )
    (directory / REPORT_NAME).write_text(page, encoding="utf-8")


def _labels(adapters: Sequence[Path]) -> list[str]:
    return ["adapter"] if len(adapters) == 1 else ["adapter A", "adapter B"]


def _facts(label: str, adapter: Path) -> Iterator[tuple[str, str]]:
    manifest = read_manifest(adapter)
    yield label, str(adapter)
    trained_on = f"{manifest.base.name}, project {manifest.project_id}" if manifest else "not recorded"
    yield f"{label} was trained on", trained_on


def _seen_in_training(result: Evaluation | AdapterComparison) -> str:
    if isinstance(result, Evaluation):
        return "excluded" if result.seen_in_training is not None else "unknown"
    left_out = result.left_out.in_words("A", "B")
    return f"excluded: {left_out}" if left_out else "none are known"


def render_report(
    *,
    title: str,
    subtitle: str,
    result: Evaluation | AdapterComparison,
    curve: LossCurve | None,
    tables: Mapping[str, Mapping[str, str]],
) -> str:
    """Render the page. `tables` holds further (name, value) tables by their heading."""
    template = _environment().from_string(
        files("peft_core.evaluation").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )
    return template.render(
        title=title,
        subtitle=subtitle,
        findings=findings_of(result),
        chart=None if curve is None or curve.is_empty else layout_chart(curve),
        width=WIDTH,
        height=HEIGHT,
        tables=tables,
    )


def _date(timestamp: str) -> str:
    """Return an ISO 8601 timestamp as '27 November 2026, 17:13 UTC'."""
    moment = datetime.fromisoformat(timestamp).astimezone(UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["printable"] = partial(sanitize, limit=None, keep="\n\t")
    environment.filters["points"] = lambda positions: " ".join(f"{x:g},{y:g}" for x, y in positions)
    return environment


def column_tables(result: Evaluation | AdapterComparison) -> dict[str, dict[str, str]]:
    """Return the table of base model and adapter with and without retrieved code, if it was measured."""
    if not isinstance(result, Evaluation) or result.columns is None:
        return {}
    table = {column.name.in_words.removeprefix("the "): _column_in_words(column) for column in result.columns.columns}
    return {"With similar code of the training before the prompt": {**table, "in words": result.columns.text}}


def _column_in_words(column: Column) -> str:
    loss, lines = f"loss {column.loss:.3f}", f"exact lines {100 * column.exact_lines:.1f} %"
    if column.loss_change is not None:
        loss += f" ({_change(column.loss_change, 1, 3)})"
    if column.lines_change is not None:
        lines += f" ({_change(column.lines_change, 100, 1)})"
    return f"{loss}; {lines}"


def _change(change: ColumnChange, factor: int, digits: int) -> str:
    interval = (
        "too little data for an interval"
        if change.low is None or change.high is None
        else f"95 % interval {factor * change.low:+.{digits}f} to {factor * change.high:+.{digits}f}"
    )
    return f"{factor * change.change:+.{digits}f}; {interval}"


def _catch_up_tables(catch_up: CatchUp | None) -> dict[str, dict[str, str]]:
    """Return the table that compares the adapter with the one that it continues from."""
    if catch_up is None:
        return {}
    not_measured = "not measured: there is none"
    table = {
        "continues from": catch_up.parent,
        "changed held-out code": catch_up.changed.in_words if catch_up.changed else not_measured,
        "old held-out code": catch_up.old.in_words if catch_up.old else not_measured,
    }
    if catch_up.loses:
        table["not made current"] = "it predicts the old held-out code worse than the adapter that it continues from"
    return {"Loss before and after the update, nats per token": table}


def _memorisation_table(memorisation: Memorisation | None) -> dict[str, str]:
    if memorisation is None:
        return {"not measured": "the training was too short for it, or has no unit that is long enough"}
    table = {"measured": memorisation.in_words}
    if memorisation.adapter.text:
        table["the adapter's longest run"] = memorisation.adapter.text
    return table


def _study_table(study: LossChange | None) -> dict[str, dict[str, str]]:
    if study is None:
        return {}
    return {"Held-out study items, about APIs that no trained item is about": {"loss": study.in_words}}


def _data_table(manifest: Manifest) -> dict[str, str]:
    data, summary = manifest.data, manifest.data.summary
    table = {
        "trained on": manifest.trained_on,
        "held out": f"{counted(summary.held_out_examples, 'example')}, {summary.held_out_tokens} tokens",
        "files": f"{summary.files} ({', '.join(f'{count} {name}' for name, count in data.languages.items())})",
        "repeated": f"{summary.replayed_examples} of the prepared examples, which were known"
        if summary.replayed_examples
        else "",
        "excluded": ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in summary.left_out.items())
        or "nothing",
        "secrets removed": str(summary.secrets_removed),
        "commit": data.repository_commit or "",
        "commits": ", ".join(f"{each.name} {each.commit or 'unknown'}" for each in data.repositories),
    }
    return {name: value for name, value in table.items() if value}


def _training_table(manifest: Manifest) -> dict[str, str]:
    run, config, metrics = manifest.run, manifest.run.config, manifest.metrics
    rates = "unknown" if config.learning_rate is None else "{:g} for A, {:g} for B".format(*config.rates)
    table = {
        "base model": f"{manifest.base.name}, {manifest.base.shape.parameters / 1e6:.0f}M parameters",
        "LoRA": f"rank {config.rank}, alpha {config.lora_alpha:g}, on {', '.join(run.target_modules)}",
        "steps": f"{run.steps} of {counted(config.batch_size, 'example')}, at most {config.max_length} tokens each",
        "continues": run.continued_from or "",
        "weights": run.weights_in_words,
        "learning rate": f"{rates}; {config.lr_scheduler} schedule, {config.warmup_ratio:.0%} warm-up",
        "seed": str(config.seed),
        "device": f"{run.device}, frozen weights in {run.weights_dtype}",
        "check of the device": run.device_check,
        "speed": f"{metrics.tokens_per_second:.0f} tokens/s" if metrics.tokens_per_second else "",
        "total time": format_duration(metrics.wall_s) if metrics.wall_s else "",
        "peak memory": f"{metrics.peak_memory_bytes / 1e6:.0f} MB" if metrics.peak_memory_bytes else "",
        "adapter size": f"{metrics.adapter_bytes / 1e6:.1f} MB" if metrics.adapter_bytes else "",
    }
    return {name: value for name, value in table.items() if value}
