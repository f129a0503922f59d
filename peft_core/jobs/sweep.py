"""A sweep: trainings that differ in one setting, of which the one with the lowest held-out loss is published. Pure.

Each run is a job of its own and ends for itself. At its end its adapter is published if no run that has ended is better, so the
project's current adapter is that of the best run so far, whichever process dies when.
"""

from __future__ import annotations

from collections.abc import Sequence

from peft_core.jobs.state import Job
from peft_core.schemas.results import Estimate, Metrics, Status, SweepRunStatus, SweepStatus
from peft_core.schemas.task import JobRequest


def of_all_runs(requests: Sequence[JobRequest]) -> Estimate:
    """Return what all runs take: here one after the other, on a cluster at a time, if it has the resources."""
    estimates = [request.estimate for request in requests]
    seconds = [estimate.seconds for estimate in estimates if estimate.seconds is not None]
    total = sum(seconds) if requests[0].cluster is None else max(seconds, default=0.0)
    return estimates[0].model_copy(
        update={
            "seconds": total if len(seconds) == len(estimates) else None,
            "memory_bytes": max(estimate.memory_bytes for estimate in estimates),
        }
    )


def loss_of(metrics: Metrics | None) -> float:
    """Return the held-out loss at the end of a run; infinity if it was not measured, or is not a number."""
    loss = metrics.adapter_loss if metrics is not None else None
    return loss if loss is not None and loss == loss else float("inf")  # noqa: PLR0124 -- NaN


def best(runs: Sequence[Job]) -> Job | None:
    """Return the completed run with the lowest held-out loss; of equal ones the first."""
    completed = [run for run in runs if run.status is Status.COMPLETED]
    return min(completed, key=lambda run: loss_of(run.metrics), default=None)


def better_run(runs: Sequence[Job], metrics: Metrics) -> Job | None:
    """Return a run that is at least as good as one that has just ended with these metrics, or None.

    `runs`: those whose adapter is published.
    """
    candidate = best(runs)
    return candidate if candidate is not None and loss_of(candidate.metrics) <= loss_of(metrics) else None


def shown(runs: Sequence[Job], newest: Job) -> Job:
    """Return the run that stands for its sweep: the one in progress, the next one, and at last the best; else `newest`."""
    for status in (Status.IN_PROGRESS, Status.QUEUED):
        if (run := next((run for run in runs if run.status is status), None)) is not None:
            return run
    return best(runs) or newest


def status_of_sweep(runs: Sequence[Job]) -> SweepStatus | None:
    """Return how a sweep stands; None without one."""
    sweep = runs[0].request.sweep if runs else None
    if sweep is None:
        return None
    leading = best(runs)
    return SweepStatus(
        setting=sweep.setting,
        best_job_id=leading.job_id if leading is not None else None,
        is_complete=all(run.status.is_final for run in runs),
        runs=[
            SweepRunStatus(
                job_id=run.job_id,
                value=float(getattr(run.request.config, sweep.setting) or 0),
                status=run.status,
                held_out_loss=run.metrics.adapter_loss if run.metrics is not None else None,
                verdict=run.evaluation.verdict if run.evaluation is not None else None,
                published=run.adapter_path is not None,
            )
            for run in runs
        ],
    )
