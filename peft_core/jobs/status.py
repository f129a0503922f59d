"""`TrainingStatus`, built from a stored job: its state as users see it, and the call to make next."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from peft_core.adapters.manifest import REPORT_NAME
from peft_core.jobs.state import RESUMABLE, Job, progress_percent
from peft_core.schemas.counts import counted
from peft_core.schemas.dataset import SourceSummary, describe_by_extension
from peft_core.schemas.evaluation import AdapterComparison, ComparedAdapter, Keep, Verdict
from peft_core.schemas.results import JobSummary, NextStep, Status, SweepStatus, TrainingStatus
from peft_core.schemas.task import JobRequest
from peft_core.system.durations import rough_duration
from peft_core.system.packages import install_extra

_TIME_FROM_FIRST_STEP = 0.8  # of the estimated time: what remains at least before the first step
IN_BACKGROUND = "runs in the background, without this connection too"
# Codes of failures that may not happen again in an unchanged run.
RETRYABLE = (
    "killed", "died_silently", "runner_failed", "disk_full", "data_directory_unwritable", "adapters_busy",
    "launcher_not_started",
)  # fmt: skip


def not_started(project_id: str) -> TrainingStatus:
    step = NextStep(
        tool="train_adapter",
        arguments={"project_id": project_id},
        missing=("training_data",),
        reason=f"No training was started for project {project_id!r} yet.",
    )
    return TrainingStatus(
        job_id=None, project_id=project_id, status=Status.NOT_STARTED, next=step.sentence, next_step=step
    )


def status_of(
    job: Job,
    queue_position: int | None,
    log_path: Path,
    *,
    now: float,
    cancel_requested: bool = False,
    sweep: SweepStatus | None = None,
) -> TrainingStatus:
    """Return the state of a job as users see it at the time `now`, in seconds since the epoch."""
    published = job.adapter_path is not None and Path(job.adapter_path).is_dir()  # it may have been deleted since
    adapter = job.adapter_path if published else None
    request = job.request
    running = job.status is Status.IN_PROGRESS
    stopping = cancel_requested and running
    job, eta_s = _without_freed_checkpoint(job, log_path.parent), _eta_s(job, now)
    step = _stopping(job) if stopping else _next_step_in_sweep(job, sweep) or _next_step(job, adapter, eta_s)
    return TrainingStatus(
        job_id=job.job_id,
        project_id=job.project_id,
        kind="training" if request.evaluated is None else "evaluation",
        evaluated_on=_source_name(request) if request.evaluated else "",
        compared_adapters=_compared(request),
        status=job.status,
        cancel_requested=stopping or None,
        phase=job.phase if running else None,
        progress_percent=progress_percent(job),
        detail=job.detail if running and job.detail else job.note,
        step=job.step,
        total_steps=job.total_steps or request.estimate.steps,
        loss=job.loss,
        held_out_loss=job.held_out_loss,
        tokens_per_second=job.tokens_per_second,
        peak_memory_bytes=job.peak_memory_bytes,
        eta_s=None if stopping else eta_s,
        queue_position=queue_position,
        waits_for=job.waits_for,
        only_while_free=job.only_while_free or None,
        started_because=job.started_because,
        device=job.device or request.device,
        cluster=request.cluster.address if request.cluster else None,
        node=job.node,
        base_model=request.base.name,
        adapter_path=adapter,
        sweep=sweep,
        error=job.error,
        metrics=job.metrics,
        evaluation=job.evaluation,
        comparison=job.comparison,
        report_path=_report_path(log_path.parent if request.evaluated else adapter),
        dataset=job.dataset,
        training_data=_describe_training_data(job),
        left_out_by_extension=(job.dataset or request.found).left_out_by_extension,
        estimate=request.estimate,
        log_path=str(log_path) if log_path.exists() else None,
        created_at=_timestamp(job.created_at),
        updated_at=_timestamp(job.updated_at),
        next=step.sentence,
        next_step=step,
    )


def summary_of(job: Job) -> JobSummary:
    return JobSummary(
        job_id=job.job_id,
        project_id=job.project_id,
        kind="training" if job.request.evaluated is None else "evaluation",
        status=job.status,
        verdict=job.evaluation.verdict if job.evaluation else None,
        keep=job.comparison.keep if job.comparison else None,
        base_model=job.request.base.name,
        created_at=job.created_at,
        updated_at=job.updated_at,
    )


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _eta_s(job: Job, now: float) -> float | None:
    """Return the whole seconds until the end of the job with its evaluation; None if it is unknown or has taken longer."""
    estimated = job.request.estimate.seconds
    if job.status is Status.QUEUED:
        return estimated
    if job.status is not Status.IN_PROGRESS or job.ends_at is None:
        return None
    remaining = job.ends_at - now
    if job.request.evaluated is None and job.step == 0 and estimated is not None:
        remaining = max(remaining, _TIME_FROM_FIRST_STEP * estimated)
    return float(round(remaining)) if remaining >= 1 else None


def _source_name(request: JobRequest) -> str:
    """Return what an evaluation read: a path, or the number of records that were given in the call."""
    return str(request.found.path) if request.found.path else counted(request.found.examples or 0, "record")


def _compared(request: JobRequest) -> list[str]:
    if request.evaluated is None or request.evaluated.compared_with is None:
        return []
    return [str(path) for path in request.evaluated.paths.values()]


def _describe_training_data(job: Job) -> str:
    source = job.request.found
    paths = [source.path, *(other.path for other in source.more_sources)]
    place = f" in {', '.join(map(str, paths))}" if source.path else ""
    by_count = sorted(source.languages.items(), key=lambda language: -language[1])
    languages = ", ".join(f"{count} {name}" for name, count in by_count)
    code = (
        f"{counted(source.files, 'file')} ({languages})" if source.examples is None or source.units is not None else ""
    )
    records = counted(source.examples, "record") if source.examples is not None else ""
    what = " and ".join(filter(None, [code, records])) + place
    not_read = describe_by_extension(source.left_out_by_extension)
    sentences = [
        f"{what}, about {source.estimated_tokens} tokens",
        f"Not read: {not_read}" if not_read else "",
        _advice_on_grammars(source),
        *source.advice,
        source.unused_in_words.rstrip("."),
    ]
    return ". ".join(filter(None, sentences))


def _advice_on_grammars(source: SourceSummary) -> str:
    if not source.without_grammar:
        return ""
    files = ", ".join(counted(count, f"{name} file") for name, count in source.without_grammar.items())
    return f"Cut at blank lines: {files}; `{install_extra('languages')}` cuts them at their syntax"


def _report_path(directory: str | Path | None) -> str | None:
    path = Path(directory) / REPORT_NAME if directory else None
    return str(path) if path is not None and path.is_file() else None


# -- the next step ---------------------------------------------------------------------------------------------------


def _stopping(job: Job) -> NextStep:
    kept = "its last checkpoint is kept" if job.checkpoint_step else "it has no checkpoint yet"
    return NextStep(
        tool="get_training_status",
        arguments={"project_id": job.project_id, "job_id": job.job_id},
        reason=f"The {job.request.noun} is stopping, which takes seconds; {kept}.",
    )


def _waiting(job: Job) -> NextStep:
    return NextStep(
        tool="refresh_project",
        arguments={"project_id": job.project_id},
        reason="The training runs by itself once the machine is free; refresh_project runs it now.",
    )


def _running(job: Job, eta_s: float | None) -> NextStep:
    when = f"Ask again in about {rough_duration(eta_s)}" if eta_s is not None and eta_s > 90 else "Ask again soon"
    where = "runs on the cluster, while this machine is off, too" if job.on_cluster else IN_BACKGROUND
    return NextStep(
        tool="get_training_status",
        arguments={"project_id": job.project_id, "job_id": job.job_id},
        reason=f"The {job.request.noun} {where}. {when}; cancel_training stops it.",
    )


def _next_step_in_sweep(job: Job, sweep: SweepStatus | None) -> NextStep | None:
    """Return the next step after a completed run of a sweep: wait for the others, or look at the best."""
    if sweep is None or job.status is not Status.COMPLETED or (sweep.is_complete and sweep.best_job_id == job.job_id):
        return None
    arguments = {"project_id": job.project_id}
    if not sweep.is_complete:
        reason = "Other runs of the sweep have not ended."
        return NextStep(tool="get_training_status", arguments=arguments, reason=reason)
    best = {"job_id": sweep.best_job_id} if sweep.best_job_id else {}
    reason = "Another run of the sweep has the lowest held-out loss."
    return NextStep(tool="get_training_status", arguments=arguments | best, reason=reason)


def _without_freed_checkpoint(job: Job, directory: Path) -> Job:
    """Return a job that ended early as one without a checkpoint, if its files were freed."""
    is_gone = job.status in RESUMABLE and not job.on_cluster and not (directory / "checkpoint").is_dir()
    return job.model_copy(update={"checkpoint_step": None}) if is_gone else job


def _next_step(job: Job, adapter: str | None, eta_s: float | None) -> NextStep:
    is_evaluation = job.request.evaluated is not None
    match job.status:
        case Status.QUEUED | Status.IN_PROGRESS:
            return _waiting(job) if job.waits_for else _running(job, eta_s)
        case Status.COMPLETED if is_evaluation:
            return _after_evaluation(job) if job.comparison is None else _after_comparison(job.comparison)
        case Status.COMPLETED:
            return _after_training(job, adapter)
        case Status.FAILED:
            advice = " ".join(
                f"{suggestion.rstrip('.')}." for suggestion in (job.error.suggestions if job.error else ())
            )
            if job.error and job.error.code in RETRYABLE:
                return _resume(job, advice)
            return _start_over(job, advice)
        case _:
            return _resume(job)


def _resume(job: Job, advice: str = "") -> NextStep:
    if job.request.evaluated is not None or not job.checkpoint_step:
        how = f"The {job.request.noun} can be run again from the start."
    else:
        how = "It can continue from its last checkpoint, or start over with train_adapter."
    return NextStep(tool="resume_training", arguments={"job_id": job.job_id}, reason=f"{advice} {how}".lstrip())


def _start_over(job: Job, reason: str) -> NextStep:
    if job.request.evaluated is not None:
        paths = {field: str(path) for field, path in job.request.evaluated.paths.items()}
        tool = "evaluate_adapter" if len(paths) == 1 else "compare_adapters"
        return NextStep(tool=tool, arguments=paths, missing=("evaluation_data",), reason=reason)
    return NextStep(
        tool="train_adapter", arguments={"project_id": job.project_id}, missing=("training_data",), reason=reason
    )


def _after_training(job: Job, adapter: str | None) -> NextStep:
    if adapter is None:
        return _start_over(job, "The adapter of this run was deleted.")
    make_current = job.request.config.make_current
    name = job.project_id if _is_current(Path(adapter)) else adapter
    evaluation = job.evaluation
    if evaluation is None:
        return _load(name, "The adapter was not evaluated.")
    if evaluation.verdict is Verdict.HARMS or (evaluation.catch_up is not None and evaluation.catch_up.loses):
        return _do_not_use(job, adapter, harms=evaluation.verdict is Verdict.HARMS)
    if evaluation.verdict is Verdict.NO_DIFFERENCE:
        reason = "No difference could be shown on held-out files: more data or more epochs may help."
        return _load(adapter, f"{reason} The adapter can be loaded all the same.")
    if make_current == "never":
        return _load(adapter, "The adapter helps. It was not made current, as requested.")
    return _load(name, "The adapter helps; get_adapter_info shows all measurements.")


def _do_not_use(job: Job, adapter: str, *, harms: bool) -> NextStep:
    if job.request.config.make_current == "always":
        pointer = "It was made current, as requested."
    else:
        pointer = f"It was not made current: {job.project_id!r} refers to the same adapter as before."
    if harms:
        finding = "The adapter HARMS predictions: do not use it."
        advice = "Try a lower learning_rate, fewer epochs or more data."
    else:
        finding = "The update predicts old held-out code worse than the adapter that it continues from."
        advice = "Train from scratch, with config.continue_from = 'none'."
    return NextStep(
        tool="get_adapter_info", arguments={"adapter_path": adapter}, reason=f"{finding} {pointer} {advice}"
    )


def _after_evaluation(job: Job) -> NextStep:
    path = str(job.request.evaluated.adapter_path) if job.request.evaluated else ""
    evaluation = job.evaluation
    overlap_unknown = evaluation is None or evaluation.seen_in_training is None
    caveat = (
        " Its training data is not recorded: if it was trained on this data, the results are too optimistic."
        if overlap_unknown
        else ""
    )
    match evaluation.verdict if evaluation else None:
        case Verdict.HELPS:
            return _load(path, f"The adapter helps on this data.{caveat}")
        case Verdict.NO_DIFFERENCE:
            return _load(
                path, f"No difference could be shown on this data. The adapter can be loaded all the same.{caveat}"
            )
        case Verdict.HARMS:
            return NextStep(
                tool="list_adapters",
                reason=f"The adapter HARMS predictions on this data: do not use it for such code.{caveat}",
            )
        case None:
            return _load(path, f"The adapter was not evaluated.{caveat}")


def _after_comparison(comparison: AdapterComparison) -> NextStep:
    match comparison.keep, comparison.kept:
        case _, ComparedAdapter(name=name, adapter_path=path):
            return _load(path, f"{name} is the one to keep.")
        case Keep.EITHER, _:
            reason = "Either can be kept."
            return NextStep(tool="load_adapter", missing=("adapter_path",), reason=reason)
        case _:
            return NextStep(
                tool="list_adapters",
                reason="Neither adapter helps on this data: use the base model for it. More data or more epochs may help.",
            )


def _load(adapter_path: str, reason: str) -> NextStep:
    return NextStep(tool="load_adapter", arguments={"adapter_path": adapter_path}, reason=reason)


def _is_current(adapter: Path) -> bool:
    """Return whether the project id refers to this adapter, and not to another one that was published since."""
    try:
        return adapter.with_name("current").readlink().name == adapter.name
    except OSError:
        return False
