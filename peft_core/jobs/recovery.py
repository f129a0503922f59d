"""Find out how jobs ended whose processes are gone, and explain exit codes."""

from __future__ import annotations

import signal
from pathlib import Path

from peft_core.adapters.manifest import read_manifest
from peft_core.adapters.registry import Registry
from peft_core.errors import unwritable
from peft_core.jobs.state import Job
from peft_core.jobs.store import Store
from peft_core.schemas.events import Event, JobCancelled, JobCompleted, JobInterrupted
from peft_core.schemas.results import ErrorInfo, Metrics, Status
from peft_core.system.child_process import describe_exit, log_tail


def without_process(store: Store) -> list[Job]:
    """Return the jobs that a runner must start a process for, while none is alive.

    These are the queued ones, and those in progress on a cluster, which do not end with a runner.
    """
    return [
        job
        for job in store.in_state(Status.QUEUED, Status.IN_PROGRESS)
        if job.on_cluster or job.status is Status.QUEUED
    ]


def recover(store: Store, registry: Registry) -> None:
    """Record the end of the jobs that are marked as in progress although nothing works on them.

    The caller must hold the queue's lock. A job on a cluster continues, also to be cancelled: the next runner follows it.

    Raises:
        StorageError: The data directory cannot be written. The next call tries again.
    """
    for job in store.in_state(Status.IN_PROGRESS):
        event: Event
        if completed := completed_by(job, registry):
            event = completed
        elif job.on_cluster:
            continue
        elif store.cancel_requested(job.job_id):
            event = JobCancelled()
        else:
            event = JobInterrupted(reason="The process that ran this job is gone (killed, or the machine went down).")
        store.append(job.job_id, event)


def completed_by(job: Job, registry: Registry) -> JobCompleted | None:
    """Return the event that completes a job whose adapter is published or whose evaluation is recorded; else None.

    Such a job is completed even if its processes died afterwards.

    Raises:
        StorageError: The adapter cannot be made the current one.
    """
    published = registry.published(job.project_id, job.job_id)
    if published is None:
        return completed_evaluation(job)
    try:
        registry.publish(published, job.project_id, job.job_id)
    except OSError as error:
        raise unwritable(published.parent, error) from error
    manifest = read_manifest(published)  # an unreadable manifest does not undo the publication
    metrics = manifest.metrics if manifest is not None else job.metrics or Metrics()
    return JobCompleted(adapter_path=str(published), metrics=metrics)


def completed_evaluation(job: Job) -> JobCompleted | None:
    """Return the event that completes an evaluation job with a recorded result; None for any other job."""
    evaluated, evaluation, comparison = job.request.evaluated, job.evaluation, job.comparison
    if comparison is not None:
        of_base = comparison.adapter_a.evaluation
        metrics = Metrics(base_loss=of_base.loss.base, base_perplexity=of_base.base_perplexity)
        return JobCompleted(adapter_path=comparison.kept and comparison.kept.adapter_path, metrics=metrics)
    if evaluated is None or evaluation is None:
        return None
    metrics = Metrics(
        base_loss=evaluation.loss.base,
        adapter_loss=evaluation.loss.adapter,
        base_perplexity=evaluation.base_perplexity,
        adapter_perplexity=evaluation.adapter_perplexity,
    )
    return JobCompleted(adapter_path=str(evaluated.adapter_path), metrics=metrics)


def exit_error(code: int, log_path: Path, *, process: str) -> ErrorInfo:
    """Explain why a process ended without a result, as far as its exit code and its log show."""
    tail = log_tail(log_path)
    message = f"The {process} {describe_exit(code)}{'' if code < 0 else ', without a result'}."
    if tail:
        message += f" Its log ends with: {tail}"
    advice = f"See the log: {log_path}"
    if code == -signal.SIGKILL:
        advice = (
            "Most often the operating system kills a process when the system is out of memory: close other programs, or use a "
            "smaller base_model"
        )
    return ErrorInfo(code="killed" if code < 0 else "died_silently", message=message, suggestions=(advice,))
