"""The report that lies beside a manifest: the evaluation, how the run went, what it was made of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from peft_core.adapters.manifest import REPORT_NAME, Manifest
from peft_core.events import Evaluated, Event
from peft_core.proof.curve import curve_of
from peft_core.proof.report import render
from peft_core.results import Evaluation


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
