"""A job as its users see it: the status, one sentence on what to do next, one line on how it goes."""

from __future__ import annotations

from pathlib import Path

from peft_core.adapters.manifest import REPORT_NAME
from peft_core.jobs.state import Job, progress_percent
from peft_core.schemas.evaluation import Verdict
from peft_core.schemas.results import Phase, Status, TrainingStatus

# An unchanged run may go well the next time.
RETRYABLE = ("killed", "died_silently", "runner_failed", "disk_full", "data_directory_unwritable", "adapters_busy")
MAX_HEADLINE = 200  # clients show no more of a progress message

PHASE_WORDS = {
    Phase.STARTING: "starting",
    Phase.PREPARING_DATA: "reading the code",
    Phase.LOADING_MODEL: "loading the base model",
    Phase.EVALUATING_BASE: "measuring the base on held-out files",
    Phase.TRAINING: "training",
    Phase.EVALUATING_ADAPTER: "measuring the adapter on the same held-out files",
    Phase.SAVING: "writing the adapter",
    Phase.PUBLISHING: "checking and publishing the adapter",
}


def not_started(project_id: str) -> TrainingStatus:
    return TrainingStatus(
        job_id=None,
        project_id=project_id,
        status=Status.NOT_STARTED,
        next=f"Nothing was trained for {project_id!r} yet: call train_adapter(project_id={project_id!r}, training_data=...).",
    )


def status_of(job: Job, queue_position: int | None, log_path: Path) -> TrainingStatus:
    adapter = job.adapter_path if job.adapter_path and Path(job.adapter_path).is_dir() else None  # it may be deleted
    request = job.request
    return TrainingStatus(
        job_id=job.job_id,
        project_id=job.project_id,
        kind="training" if request.evaluated is None else "evaluation",
        status=job.status,
        phase=job.phase if job.status is Status.IN_PROGRESS else None,
        progress_percent=progress_percent(job),
        detail=job.detail if job.status is Status.IN_PROGRESS and job.detail else job.note,
        step=job.step,
        total_steps=job.total_steps or request.estimate.steps,
        loss=job.loss,
        held_out_loss=job.held_out_loss,
        tokens_per_second=job.tokens_per_second,
        peak_memory_bytes=job.peak_memory_bytes,
        eta_s=_eta(job),
        queue_position=queue_position,
        device=job.device or request.device,
        base_model=request.base.name,
        adapter_path=adapter,
        error=job.error,
        metrics=job.metrics,
        evaluation=job.evaluation,
        report_path=_report_path(log_path.parent if request.evaluated else adapter),
        dataset=job.dataset,
        training_data=_training_data(job),
        estimate=request.estimate,
        log_path=str(log_path) if log_path.exists() else None,
        next=_next(job, adapter),
    )


def _eta(job: Job) -> float | None:
    """Seconds until the end of the steps, as the child reckons; before it trains, the estimate."""
    if job.status is Status.IN_PROGRESS and job.eta_s is not None:
        return job.eta_s
    return None if job.status.is_final else job.request.estimate.seconds


def _training_data(job: Job) -> str:
    found = job.request.found
    place = f" in {found.path}" if found.path else ""
    if found.examples is not None:
        return f"{found.examples} records{place}, about {found.estimated_tokens} tokens"
    languages = ", ".join(f"{count} {name}" for name, count in sorted(found.languages.items(), key=lambda kv: -kv[1]))
    return f"{found.files} files{place} ({languages}), about {found.estimated_tokens} tokens"


def _next(job: Job, adapter: str | None) -> str:
    if job.request.evaluated is not None:
        return _next_of_evaluation(job)
    status = f"get_training_status(project_id={job.project_id!r}, job_id={job.job_id!r}"
    match job.status:
        case Status.QUEUED:
            return f"Training goes on without you. Call {status}, wait_s=20) to wait for news."
        case Status.IN_PROGRESS:
            return f"Training goes on without you. Call {status}, wait_s=20) to watch; cancel_training to stop it."
        case Status.COMPLETED:
            return _next_of_completed(job, adapter)
        case Status.CANCELLED | Status.INTERRUPTED:
            return f"Call resume_training(job_id={job.job_id!r}) to go on from its checkpoint, or train_adapter to start anew."
        case _:
            advice = " ".join(f"{s.rstrip('.')}." for s in (job.error.suggestions if job.error else ()))
            again = f"call train_adapter(project_id={job.project_id!r}, ...) again"
            if job.error and job.error.code in RETRYABLE:
                again = f"call resume_training(job_id={job.job_id!r}) to go on from the last checkpoint, or {again}"
            return f"{advice} Then {again}.".strip()


def _next_of_completed(job: Job, adapter: str | None) -> str:
    if adapter is None:
        return f"Its adapter was deleted since. Call train_adapter(project_id={job.project_id!r}, ...) for a new one."
    name = job.project_id if _is_current(Path(adapter)) else adapter
    all_measured = f"get_adapter_info(adapter_path={name!r}) shows all that was measured."
    config = job.request.config
    match _verdict(job):
        case Verdict.HELPS if config.make_current == "never":
            return f"The adapter helps, and was not made current, as asked. load_adapter(adapter_path={adapter!r}) loads it."
        case Verdict.HELPS:
            return f"The adapter helps. Call load_adapter(adapter_path={name!r}) to use it; {all_measured}"
        case Verdict.NO_DIFFERENCE:
            return (
                "No difference could be shown on held-out files. Try more data or more epochs; "
                f"load_adapter(adapter_path={adapter!r}) uses it all the same."
            )
        case _:
            kept = (
                "It was made current all the same, as asked"
                if config.make_current == "always"
                else f"It is kept, and was not made current: {job.project_id!r} stands for what it stood for before"
            )
            return (
                f"The adapter HARMS: better not use it. {kept}. "
                f"Try a lower learning_rate, fewer epochs or more data; get_adapter_info(adapter_path={adapter!r}) "
                "shows all that was measured."
            )


def _is_current(adapter: Path) -> bool:
    """Whether the project id stands for it: another one may have come after it."""
    try:
        return adapter.with_name("current").readlink().name == adapter.name
    except OSError:
        return False


def _next_of_evaluation(job: Job) -> str:
    path = str(job.request.evaluated.adapter_path) if job.request.evaluated else ""
    match job.status:
        case Status.QUEUED | Status.IN_PROGRESS:
            status = f"get_training_status(project_id={job.project_id!r}, job_id={job.job_id!r}, wait_s=20)"
            return f"The evaluation goes on without you. Call {status} to wait for it; cancel_training to stop it."
        case Status.COMPLETED:
            overlap = job.evaluation.seen_in_training if job.evaluation else None
            flag = (
                " It is not recorded what this adapter was trained on: if it was this data, the figures flatter it."
                if overlap is None
                else ""
            )
            use = {
                Verdict.HELPS: f"The adapter helps. load_adapter(adapter_path={path!r}) uses it.",
                Verdict.NO_DIFFERENCE: "No difference could be shown on this data.",
                Verdict.HARMS: "The adapter HARMS on this data: better not use it for it.",
            }[_verdict(job)]
            return f"{use}{flag}"
        case Status.FAILED:
            advice = " ".join(f"{s.rstrip('.')}." for s in (job.error.suggestions if job.error else ()))
            return f"{advice} Then call evaluate_adapter(adapter_path={path!r}, ...) again.".strip()
        case _:
            return f"Call resume_training(job_id={job.job_id!r}), which begins it anew, or evaluate_adapter."


def _verdict(job: Job) -> Verdict:
    if job.evaluation is not None:
        return job.evaluation.verdict
    before, after = (job.metrics.base_loss, job.metrics.adapter_loss) if job.metrics else (None, None)
    return Verdict.HELPS if before is None or after is None or after < before else Verdict.HARMS


def _report_path(directory: str | Path | None) -> str | None:
    path = Path(directory) / REPORT_NAME if directory else None
    return str(path) if path is not None and path.is_file() else None


def headline(status: TrainingStatus) -> str:
    """One line for people, at most 200 characters: 'training: step 120/250, loss 1.83, 145 tokens/s, 2 min 10 s left'."""
    line = status.status.replace("_", " ")
    match status.status:
        case Status.QUEUED if status.queue_position:
            line = f"queued at position {status.queue_position}"
        case Status.IN_PROGRESS if status.phase:
            line = ", ".join([PHASE_WORDS[status.phase], *([status.detail] if status.detail else [])])
            if status.phase is Phase.TRAINING:
                line = _training_line(status)
        case Status.COMPLETED if (metrics := status.metrics) and metrics.base_perplexity and metrics.adapter_perplexity:
            change = f"{metrics.base_perplexity:.2f} (base) -> {metrics.adapter_perplexity:.2f} (adapter)"
            verdict = [status.evaluation.verdict.replace("_", " ")] if status.evaluation else []
            line = ", ".join(
                ["completed", *verdict, f"held-out perplexity {change}", *([status.detail] if status.detail else [])],
            )
        case Status.FAILED | Status.INTERRUPTED if status.error:
            line = f"{status.status}: {status.error.message.rstrip('.')}"
    return line if len(line) <= MAX_HEADLINE else line[: MAX_HEADLINE - 1] + "…"


def _training_line(status: TrainingStatus) -> str:
    parts = [f"training: step {status.step}/{status.total_steps}"]
    if status.loss is not None:
        parts.append(f"loss {status.loss:.3f}")
    if status.held_out_loss is not None:
        parts.append(f"held-out {status.held_out_loss:.3f}")
    if status.tokens_per_second is not None:
        parts.append(f"{status.tokens_per_second:.0f} tokens/s")
    if status.eta_s is not None:
        parts.append(f"{in_words(status.eta_s)} left")
    if status.detail:
        parts.append(status.detail)
    return ", ".join(parts)


def in_words(seconds: float) -> str:
    """'45 s', '2 min 10 s', '1 h 5 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
