"""The state of a job in words for MCP clients: one line on its progress, and the next call with the tool's own arguments."""

from __future__ import annotations

from pathlib import Path

from peft_core.paths import adapter_names
from peft_core.schemas.counts import counted
from peft_core.schemas.evaluation import (
    AdapterComparison,
    Comparison,
    Difference,
    Evaluation,
    InFileMetric,
    Keep,
    Share,
)
from peft_core.schemas.project import Refreshed, RetrainThreshold
from peft_core.schemas.results import Estimate, Phase, Status, SweepStatus, TrainingStatus
from peft_core.system.durations import format_duration, rough_duration

MAX_HEADLINE = 200  # clients truncate longer progress messages
WAIT_S = 20  # the default of get_training_status

PHASE_WORDS = {
    Phase.STARTING: "starting",
    Phase.PREPARING_DATA: "reading the code",
    Phase.LOADING_MODEL: "loading the base model",
    Phase.EVALUATING_BASE: "evaluating the base model on held-out files",
    Phase.TRAINING: "training",
    Phase.EVALUATING_ADAPTER: "evaluating the adapter on the same held-out files",
    Phase.SAVING: "writing the adapter",
    Phase.PUBLISHING: "verifying and publishing the adapter",
}


def for_client(status: TrainingStatus) -> TrainingStatus:
    """Return the status with `wait_s` in its next step: an argument of the tool that the Python API does not have."""
    step = status.next_step
    if step is None or step.tool != "get_training_status":
        return status
    step = step.model_copy(update={"arguments": {**step.arguments, "wait_s": WAIT_S}})
    return status.model_copy(update={"next": step.sentence, "next_step": step})


def subject(status: TrainingStatus) -> str:
    """Return what the status is about: a project, or an evaluation of its adapter or a comparison of two on other data."""
    if status.compared_adapters:
        a, b = adapter_names([Path(adapter) for adapter in status.compared_adapters])
        return f"{status.project_id} (comparison of {a} and {b} on {status.evaluated_on})"
    return f"{status.project_id} (evaluation on {status.evaluated_on})" if status.evaluated_on else status.project_id


def summarise(status: TrainingStatus, *, is_new: bool = False) -> str:
    """Return the state of a job in sentences.

    `is_new`: whether this answers the request of the job, so that the data are described however far it has come.
    """
    parts = [f"{subject(status)}: {headline(status)}."]
    if status.sweep:
        parts.append(sweep_text(status.sweep))
    if status.started_because and (is_new or not status.status.is_final):
        parts.append(f"It was {status.started_because.rstrip('.')}.")
    if status.training_data and is_new:
        purpose = "Training data" if status.kind == "training" else "Evaluation data"
        parts.append(f"{purpose}: {status.training_data}. Base model: {status.base_model} on {status.device}.")
        if status.estimate:
            parts.append(estimate_text(status.estimate, "Estimate of each run" if status.sweep else "Estimate"))
    if status.better_base:
        parts.append(status.better_base)
    if status.status is Status.COMPLETED:
        if status.evaluation:
            parts.append(evaluation_text(status.evaluation))
        if status.comparison:
            parts.append(comparison_text(status.comparison))
        if status.dataset is not None and status.dataset.study is not None:
            parts.append(status.dataset.study.in_words)
        if status.report_path:
            parts.append(f"Report: {status.report_path}.")
    return " ".join(parts)


def sweep_text(sweep: SweepStatus) -> str:
    """Return how the runs of a sweep stand, in one sentence."""
    runs = []
    for run in sweep.runs:
        loss = "" if run.held_out_loss is None else f", held-out loss {run.held_out_loss:.3f}"
        verdict = f", {run.verdict.replace('_', ' ')}" if run.verdict else ""
        mark = ", best so far" if run.job_id == sweep.best_job_id else ""
        mark = mark.replace(" so far", "") if sweep.is_complete else mark
        runs.append(f"{run.value:g} {run.status.replace('_', ' ')}{loss}{verdict}{mark}")
    return f"Sweep of {sweep.setting}: {'; '.join(runs)}. Only an adapter that was the best when its run ended is published."


def summarise_refresh(refreshed: Refreshed) -> str:
    """Return what came of bringing a project up to date, and when it is retrained by itself, in sentences."""
    parts = [f"{refreshed.project_id}: {refreshed.reason.rstrip('.')}."]
    if refreshed.job is not None:
        parts.append(f"Job {refreshed.job.job_id}: {headline(refreshed.job)}.")
        if refreshed.job.only_while_free:
            parts.append("It runs only while the machine is free.")
    if isinstance(refreshed.retrain_when, RetrainThreshold):
        parts.append(f"It is retrained by itself when {refreshed.retrain_when.in_words}.")
    return " ".join(parts)


def headline(status: TrainingStatus) -> str:
    """Return one line of at most 200 characters: 'training: step 120/250, loss 1.830, 145 tokens/s, 2 min 10 s left'."""
    line = status.status.replace("_", " ")
    match status.status:
        case Status.QUEUED if status.waits_for:
            so_far = f"paused at step {status.step}/{status.total_steps}" if status.step else "not begun"
            line = f"{so_far}, waiting until the machine is free: {status.waits_for}"
        case Status.QUEUED if status.queue_position:
            line = f"queued at position {status.queue_position}"
        case Status.IN_PROGRESS if status.cancel_requested:
            line = "stopping"
        case Status.IN_PROGRESS if status.phase is Phase.TRAINING:
            line = _training_line(status)
        case Status.IN_PROGRESS if status.phase:
            left = f"about {rough_duration(status.eta_s)} left" if status.eta_s else ""
            line = ", ".join(filter(None, [PHASE_WORDS[status.phase], status.detail, left]))
        case Status.COMPLETED if status.comparison is not None:
            line = f"completed, {recommendation(status.comparison)}"
        case Status.COMPLETED if (metrics := status.metrics) and metrics.base_perplexity and metrics.adapter_perplexity:
            verdict = status.evaluation.verdict.replace("_", " ") if status.evaluation else ""
            change = f"{metrics.base_perplexity:.2f} (base) -> {metrics.adapter_perplexity:.2f} (adapter)"
            line = ", ".join(filter(None, ["completed", verdict, f"held-out perplexity {change}", status.detail]))
        case Status.FAILED | Status.INTERRUPTED if status.error:
            line = f"{status.status}: {status.error.message.rstrip('.')}"
    return line if len(line) <= MAX_HEADLINE else line[: MAX_HEADLINE - 1] + "…"


def short_headline(status: TrainingStatus) -> str:
    """Return the headline of a picture: 'helps, held-out perplexity 12.45 -> 8.04', or that of a job without such a result."""
    metrics, evaluation = status.metrics, status.evaluation
    if status.status is Status.COMPLETED and metrics and metrics.base_perplexity and metrics.adapter_perplexity:
        verdict = evaluation.verdict.replace("_", " ") if evaluation else "not evaluated"
        return f"{verdict}, held-out perplexity {metrics.base_perplexity:.2f} -> {metrics.adapter_perplexity:.2f}"
    return headline(status)


def _training_line(status: TrainingStatus) -> str:
    parts = [f"training: step {status.step}/{status.total_steps}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    if status.held_out_loss is not None:
        parts.append(f"held-out {status.held_out_loss:.3f}")
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:.0f} tokens/s")
    if status.eta_s:
        parts.append(f"{format_duration(status.eta_s)} left")
    if status.detail:
        parts.append(status.detail)
    if status.node:
        parts.append(f"on {status.node}")
    return ", ".join(parts)


def estimate_text(estimate: Estimate, title: str = "Estimate") -> str:
    time = f"about {rough_duration(estimate.seconds)}" if estimate.seconds else "unknown time"
    steps = f"{counted(estimate.steps, 'step')}, " if estimate.steps else ""
    chosen = f" {estimate.chosen}" if estimate.chosen else ""
    cluster = f" {estimate.cluster}" if estimate.cluster else ""
    return (
        f"{title}: {steps}{time}, {estimate.memory_bytes / 1e9:.1f} GB of memory ({estimate.basis}).{chosen}{cluster}"
    )


_SHOWN_IN_FILE = (InFileMetric.LINES, InFileMetric.PROJECT_LINES, InFileMetric.PROJECT_NAMES)


def evaluation_text(evaluation: Evaluation) -> str:
    """Return the measurements in one sentence. The verdict's reason already has the loss."""
    percentages = (
        *((metric.in_words, share) for metric, share in evaluation.in_file.items() if metric in _SHOWN_IN_FILE),
        ("next lines exact", evaluation.next_line if InFileMetric.LINES not in evaluation.in_file else None),
        ("edit similarity", evaluation.edit_similarity),
    )
    parts = [
        f"{name} {100 * comparison.base:.1f} -> {100 * comparison.adapter:.1f} %{_positions(comparison)}"
        f"{_interval(comparison, percent=True)}"
        for name, comparison in percentages
        if comparison is not None
    ]
    if evaluation.general_loss is not None:
        general = evaluation.general_loss
        parts.append(f"loss on general code {general.base:.3f} -> {general.adapter:.3f}{_interval(general)}")
    reason = evaluation.reason[:1].upper() + evaluation.reason[1:]
    caveats = "".join(f" {caveat}" for caveat in evaluation.caveats)
    if evaluation.catch_up is not None:
        caveats += f" {evaluation.catch_up.in_words}"
    if evaluation.memorisation is not None:
        caveats += f" {evaluation.memorisation.in_words}"
    if evaluation.study is not None:
        caveats += f" Loss on held-out study items, about other APIs: {evaluation.study.in_words}."
    if evaluation.columns is not None:
        caveats += f" {evaluation.columns.text}"
    size = f"{counted(evaluation.files, 'file')}, {counted(evaluation.examples, 'example')}"
    return f"{reason}; {', '.join(parts)}; {size}.{caveats}"


def recommendation(comparison: AdapterComparison) -> str:
    """Return what to keep, in a few words: 'keep web/20260101-000000-abcdef'."""
    if comparison.kept is not None:
        return f"keep {comparison.kept.name}"
    return "keep either adapter" if comparison.keep is Keep.EITHER else "keep the base model"


def comparison_text(comparison: AdapterComparison) -> str:
    """Return what to keep and why, the measurements of base model, A and B, what was left out, and the cautions."""
    of_a, of_b = comparison.adapter_a.evaluation, comparison.adapter_b.evaluation
    metrics = (
        ("held-out loss", of_a.loss, comparison.loss, False),
        *(
            (metric.in_words, of_a.in_file[metric], difference, True)
            for metric, difference in comparison.in_file.items()
            if metric in _SHOWN_IN_FILE
        ),
        ("next lines exact", of_a.next_line, None if comparison.in_file else comparison.next_line, True),
        ("edit similarity", of_a.edit_similarity, comparison.edit_similarity, True),
        ("loss on general code", of_a.general_loss, comparison.general_loss, False),
    )
    measured = [
        _three_values(name, of_base.base, difference, percent=percent)
        for name, of_base, difference, percent in metrics
        if of_base is not None and difference is not None
    ]
    names = f"Base, A ({comparison.adapter_a.name}) and B ({comparison.adapter_b.name})"
    size = f"{counted(of_b.files, 'file')}, {counted(of_b.examples, 'example')}"
    left_out = comparison.left_out.in_words("A", "B")
    sentences = [
        f"{comparison.reason}.",
        f"{names}: {', '.join(measured)}; {size}.",
        f"Examples left out: {left_out}." if left_out else "",
        *comparison.cautions,
    ]
    return " ".join(filter(None, sentences))


def _three_values(name: str, base: float, difference: Difference, *, percent: bool) -> str:
    values = (base, difference.adapter_a, difference.adapter_b)
    interval = _interval(difference, percent=percent).strip(" ()")
    figures = " / ".join(f"{100 * value:.1f}" if percent else f"{value:.3f}" for value in values)
    return f"{name} {figures}{' %' if percent else ''}{f' (B - A {interval})' if interval else ''}"


def _positions(comparison: Comparison) -> str:
    return f" of {comparison.positions}" if isinstance(comparison, Share) else ""


def _interval(comparison: Comparison | Difference, *, percent: bool = False) -> str:
    if comparison.low is None or comparison.high is None:
        return ""
    if percent:
        return f" ({100 * comparison.low:+.1f} to {100 * comparison.high:+.1f})"
    return f" ({comparison.low:+.3f} to {comparison.high:+.3f})"
