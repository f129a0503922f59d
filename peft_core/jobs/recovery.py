"""Tell the truth about jobs whose processes are gone."""

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


def recover(store: Store, registry: Registry) -> None:
    """Give every job that says "in progress" the end that it had. Only for a holder of the work lock: it works alone.

    Raises:
        StorageError: the data directory cannot be written; it is tried again the next time.
    """
    for job in store.in_state(Status.IN_PROGRESS):
        event: Event
        if completed := completed_by(job, registry):
            event = completed
        elif store.cancel_requested(job.job_id):
            event = JobCancelled()
        else:
            event = JobInterrupted(reason="The process that ran this job is gone (killed, or the machine went down).")
        store.append(job.job_id, event)


def completed_by(job: Job, registry: Registry) -> JobCompleted | None:
    """What makes a job completed is its published adapter, or its evaluation, whatever happened to the process behind it.

    Raises:
        StorageError: it cannot be made the current one.
    """
    published = registry.published(job.project_id, job.job_id)
    if published is None:
        return completed_evaluation(job)
    try:
        registry.publish(published, job.project_id, job.job_id)
    except OSError as error:
        raise unwritable(published.parent, error) from error
    manifest = read_manifest(published)  # that it cannot be read does not undo what was done
    metrics = manifest.metrics if manifest is not None else job.metrics or Metrics()
    return JobCompleted(adapter_path=str(published), metrics=metrics)


def completed_evaluation(job: Job) -> JobCompleted | None:
    """The end of a job that evaluates, once it has; None for any other."""
    evaluated, found = job.request.evaluated, job.evaluation
    if evaluated is None or found is None:
        return None
    metrics = Metrics(
        base_loss=found.loss.base,
        adapter_loss=found.loss.adapter,
        base_perplexity=found.base_perplexity,
        adapter_perplexity=found.adapter_perplexity,
    )
    return JobCompleted(adapter_path=str(evaluated.adapter_path), metrics=metrics)


def problem_of_exit(code: int, log_path: Path, *, what: str = "training process") -> ErrorInfo:
    """Why a process ended without a word, as far as its exit code and its log tell."""
    tail = _tail(log_path)
    said = f" Its last words: {tail}" if tail else ""
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:  # real-time signals have no name
            name = "a signal"
        message = f"The {what} was killed by {name} (signal {-code}).{said}"
        if -code == signal.SIGKILL:
            return ErrorInfo(
                code="killed",
                message=message,
                suggestions=(
                    "Most often this is the operating system, out of memory: close other programs, or use a smaller base_model",
                ),
            )
        return ErrorInfo(code="killed", message=message, suggestions=(f"See the log: {log_path}",))
    return ErrorInfo(
        code="died_silently",
        message=f"The {what} ended with exit code {code} and without a result.{said}",
        suggestions=(f"See the log: {log_path}",),
    )


def _tail(path: Path, lines: int = 3) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return " | ".join(line.strip()[:200] for line in text.strip().splitlines()[-lines:])
