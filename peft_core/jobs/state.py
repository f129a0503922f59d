"""The state machine of a job: `apply(job, event)` returns the next state. Pure: no clock, no disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft_core.schemas.dataset import DatasetSummary
from peft_core.schemas.evaluation import AdapterComparison, Evaluation
from peft_core.schemas.events import (
    AdaptersCompared,
    CheckpointSaved,
    DatasetPrepared,
    DeviceChecked,
    Evaluated,
    Event,
    HeldOutMeasured,
    JobAskedFor,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobInterrupted,
    JobPostponed,
    JobResumed,
    JobStarted,
    MemorySaved,
    PhaseStarted,
    RateLowered,
    RunPlanned,
    StepCompleted,
    StoppedEarly,
)
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import ErrorInfo, Metrics, Phase, Status
from peft_core.schemas.task import JobRequest


class Job(FrozenModel):
    """State of one training or evaluation. Times are seconds since the epoch."""

    job_id: str
    project_id: str
    request: JobRequest
    created_at: float
    updated_at: float
    status: Status = Status.QUEUED
    phase: Phase | None = None
    detail: str = ""
    phase_done: float = 0.0  # share of the phase
    note: str = ""  # shown after the job has ended, too
    device: str | None = None
    node: str = ""  # of a cluster, that trains
    step: int = 0
    total_steps: int | None = None
    loss: float | None = None
    held_out_loss: float | None = None
    tokens_per_second: float | None = None
    ends_at: float | None = None  # expected end of the whole job; None: unknown, or not running
    peak_memory_bytes: int | None = None
    checkpoint_step: int | None = None
    dataset: DatasetSummary | None = None
    metrics: Metrics | None = None
    evaluation: Evaluation | None = None  # without the generated texts, which are in the event
    comparison: AdapterComparison | None = None  # of two adapters, without texts as well
    adapter_path: str | None = None
    error: ErrorInfo | None = None
    started_because: str = ""  # why a refresh queued it; shown to people
    only_while_free: bool = False  # it started by itself: it runs only while the machine is free
    waits_for: str = ""  # why it does not run, although nothing is ahead of it

    @property
    def is_training(self) -> bool:
        return self.request.evaluated is None

    @property
    def on_cluster(self) -> bool:
        return self.request.cluster is not None


def in_turn(queued: Iterable[Job]) -> list[Job]:
    """Return queued jobs, which are in the order of the queue, as they are to run: those that a user asked for go first."""
    return sorted(queued, key=lambda job: job.only_while_free)


class IllegalTransition(Exception):
    """An event cannot follow the job's state."""

    def __init__(self, job: Job, event: Event) -> None:
        super().__init__(
            f"{event.kind} cannot happen to a job that is {job.status} (phase {job.phase}, step {job.step})"
        )


PHASES = list(Phase)
RESUMABLE = (Status.INTERRUPTED, Status.FAILED, Status.CANCELLED)


def apply(job: Job, event: Event, at: float) -> Job:
    """Return the job after `event`, which happened at the time `at`.

    Raises:
        IllegalTransition: the event cannot follow the job's state.
    """
    change = _change(job, event)
    if change is None:
        raise IllegalTransition(job, event)
    return job.model_copy(update={**change, **_expected_end(job, event, change, at), "updated_at": at})


def _expected_end(job: Job, event: Event, change: Mapping[str, object], at: float) -> dict[str, object]:
    """Return the change to when the job is expected to end: by the estimate, then by the measured speed of its steps."""
    status = change.get("status", job.status)
    if status is not Status.IN_PROGRESS:
        return {"ends_at": None}
    match event:
        case JobStarted():
            seconds = job.request.estimate.seconds
            return {"ends_at": None if seconds is None else at + seconds}
        case StepCompleted(eta_s=seconds):
            return {"ends_at": at + seconds}
    return {}


def _change(job: Job, event: Event) -> dict[str, object] | None:  # noqa: PLR0911 -- one case per event
    match job.status, event:
        case Status.QUEUED, JobStarted():
            return {"status": Status.IN_PROGRESS, "phase": Phase.STARTING, "detail": "", "waits_for": ""}
        case ((Status.QUEUED | Status.IN_PROGRESS), JobCancelled(note=note)):
            notes = {"note": _add_note(job.note, note)} if note else {}
            return {"status": Status.CANCELLED, "waits_for": "", **notes}
        case ((Status.QUEUED | Status.IN_PROGRESS), JobFailed(error=error)):
            return {"status": Status.FAILED, "error": error, "waits_for": ""}
        case Status.QUEUED, JobPostponed(reason=reason) if job.only_while_free:
            return {"waits_for": reason}
        case Status.IN_PROGRESS, JobPostponed(reason=reason):
            waits_for = reason if job.only_while_free else ""  # a user asked for it while it was being paused
            step = job.checkpoint_step or 0
            return {"status": Status.QUEUED, "phase": None, "detail": "", "step": step, "waits_for": waits_for}
        case ((Status.QUEUED | Status.IN_PROGRESS), JobAskedFor()) if job.only_while_free:
            return {"only_while_free": False, "waits_for": ""}
        case status, JobResumed() if status in RESUMABLE:
            step = job.checkpoint_step or 0
            return {"status": Status.QUEUED, "phase": None, "detail": "", "error": None, "step": step}
        case Status.IN_PROGRESS, _:
            return _progress(job, event)
        case _:
            return None


def _progress(job: Job, event: Event) -> dict[str, object] | None:  # noqa: PLR0911, PLR0912, C901 -- one case per event
    match event:
        case PhaseStarted(phase=phase, detail=detail, done=done) if not _precedes(phase, job.phase):
            done = max(done, job.phase_done) if phase is job.phase else done
            return {"phase": phase, "detail": detail, "phase_done": done}
        case DatasetPrepared(dataset=dataset):
            return {"dataset": dataset}
        case RunPlanned(device=device, total_steps=total, start_step=start, node=node):
            return {"device": device, "total_steps": total, "step": start, "node": node}
        case StepCompleted(step=step) if job.step < step <= (job.total_steps or 0):
            return {
                "step": step,
                "loss": event.loss,
                "tokens_per_second": event.tokens_per_second,
                "peak_memory_bytes": event.memory_bytes,
            }
        case HeldOutMeasured(step=0, loss=loss, whole_set=True):
            return {"metrics": Metrics(base_loss=loss)}
        case HeldOutMeasured(loss=loss):
            return {"held_out_loss": loss}
        case Evaluated(evaluation=evaluation):
            return {"evaluation": evaluation.without_texts}
        case AdaptersCompared(comparison=comparison):
            return {"comparison": comparison.without_texts}
        case CheckpointSaved(step=step) if step <= job.step:
            return {"checkpoint_step": step}
        case StoppedEarly():
            text = f"stopped early at step {event.step}: the adapter is that of step {event.best_step}"
            text += ", averaged with the one that it continues" if job.request.continued is not None else ""
            return {"note": _add_note(job.note, text)}
        case RateLowered(step=step, back_to_step=back) if back <= job.step:
            rate = f"1/{1 / event.factor:g} of the learning rate"
            text = f"at step {step} {event.reason}: rolled back to step {back}, continued with {rate}"
            return {"step": back, "note": _add_note(job.note, text)}
        case MemorySaved(step=step):
            return {"note": _add_note(job.note, f"memory ran out at step {step}: {event.measure} from there on")}
        case DeviceChecked():
            return {"note": _add_note(job.note, event.note)} if event.note else {}
        case JobCompleted(adapter_path=path, metrics=metrics):
            held_out = metrics.adapter_loss if metrics.adapter_loss is not None else job.held_out_loss
            return {
                "status": Status.COMPLETED,
                "adapter_path": path,
                "metrics": metrics,
                "held_out_loss": held_out,
                "peak_memory_bytes": metrics.peak_memory_bytes or job.peak_memory_bytes,
            }
        case JobInterrupted(reason=reason):
            error = ErrorInfo(
                code="interrupted",
                message=reason,
                suggestions=("Resume it: training continues from the last checkpoint.",),
            )
            return {"status": Status.INTERRUPTED, "error": error}
        case _:
            return None


def _add_note(note: str, text: str) -> str:
    """Append `text`, but only once: a resumed run may repeat the steps in which it happened."""
    if text in note:
        return note
    return f"{note}; {text}" if note else text


def _precedes(phase: Phase, current: Phase | None) -> bool:
    return current is not None and PHASES.index(phase) < PHASES.index(current)


# Percentage at which each phase begins, for a run that spends most of its time training.
_PHASE_BEGINS = {
    Phase.STARTING: 0.0,
    Phase.PREPARING_DATA: 1.0,
    Phase.LOADING_MODEL: 4.0,
    Phase.EVALUATING_BASE: 6.0,
    Phase.TRAINING: 10.0,
    Phase.EVALUATING_ADAPTER: 94.0,
    Phase.SAVING: 98.0,
    Phase.PUBLISHING: 99.0,
}

# For an evaluation, which completes prompts with all models in its last phase.
_EVALUATION_BEGINS = {**_PHASE_BEGINS, Phase.EVALUATING_BASE: 10.0, Phase.EVALUATING_ADAPTER: 30.0}


def progress_percent(job: Job) -> float:
    """Return the progress of the whole job, 0 to 100. It decreases only when a diverged run is rolled back."""
    if job.status is Status.COMPLETED:
        return 100.0
    if job.phase is None:
        return 0.0
    begins = _PHASE_BEGINS if job.request.evaluated is None else _EVALUATION_BEGINS
    begin = begins[job.phase]
    end = min((other for other in begins.values() if other > begin), default=100.0)
    done = job.step / job.total_steps if job.phase is Phase.TRAINING and job.total_steps else job.phase_done
    return round(begin + (end - begin) * done, 2)
