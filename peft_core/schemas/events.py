"""Facts about a training job, past tense. The closed union is what the child writes, the store keeps and `apply` reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from peft_core.schemas.dataset import DatasetSummary
from peft_core.schemas.evaluation import Evaluation
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import ErrorInfo, Metrics, Phase


class JobStarted(FrozenModel):
    kind: Literal["job_started"] = "job_started"


class PhaseStarted(FrozenModel):
    kind: Literal["phase_started"] = "phase_started"
    phase: Phase
    detail: str = ""  # "1200 of 4000 files"; shown to people as it is


class DatasetPrepared(FrozenModel):
    kind: Literal["dataset_prepared"] = "dataset_prepared"
    dataset: DatasetSummary


class RunPlanned(FrozenModel):
    """Known once the data is prepared and the model is loaded."""

    kind: Literal["run_planned"] = "run_planned"
    device: str
    total_steps: int
    start_step: int = 0  # where a checkpoint lets it begin


class StepCompleted(FrozenModel):
    kind: Literal["step_completed"] = "step_completed"
    step: int  # 1-based
    loss: float  # nats per target token, mean over the step
    learning_rate: float  # of LoRA A
    tokens: int  # processed since the run began
    tokens_per_second: float  # since training began, evaluations not counted
    eta_s: float  # until the last step
    memory_bytes: int  # peak of the process so far


class HeldOutMeasured(FrozenModel):
    """During training a fixed sample of a large held-out set is measured; before and after it, the whole set as well.

    Figures of the sample compare with each other, and figures of the whole set with each other.
    """

    kind: Literal["held_out_measured"] = "held_out_measured"
    step: int  # 0: the base itself
    loss: float
    whole_set: bool = False


class CheckpointSaved(FrozenModel):
    kind: Literal["checkpoint_saved"] = "checkpoint_saved"
    step: int


class StoppedEarly(FrozenModel):
    kind: Literal["stopped_early"] = "stopped_early"
    step: int
    best_step: int


class RateLowered(FrozenModel):
    """The run diverged, and trains again from its last good state."""

    kind: Literal["rate_lowered"] = "rate_lowered"
    step: int  # where it diverged
    back_to_step: int
    factor: Annotated[float, Field(gt=0)]  # share of the configured rate from here on: 0.25, then 0.0625
    reason: str  # "the loss is nan"


class MemorySaved(FrozenModel):
    """Memory ran out in a step, which is done again in a leaner way; the following ones, too."""

    kind: Literal["memory_saved"] = "memory_saved"
    step: int
    tokens_at_once: int  # from here on, at most; 0: one document
    layers_computed_twice: bool  # instead of keeping what they compute
    reason: str  # what the allocator said

    @property
    def way(self) -> str:
        """In words."""
        return (
            "layers are computed twice"
            if self.layers_computed_twice
            else f"at most {self.tokens_at_once} tokens at once"
        )


class Evaluated(FrozenModel):
    """Base and adapter were compared on text that was not trained on."""

    kind: Literal["evaluated"] = "evaluated"
    evaluation: Evaluation


class AdapterWritten(FrozenModel):
    """The child's last word: the adapter lies complete in the job's directory, not yet published."""

    kind: Literal["adapter_written"] = "adapter_written"
    metrics: Metrics


class JobCompleted(FrozenModel):
    kind: Literal["job_completed"] = "job_completed"
    adapter_path: str
    metrics: Metrics


class JobFailed(FrozenModel):
    kind: Literal["job_failed"] = "job_failed"
    error: ErrorInfo


class JobCancelled(FrozenModel):
    kind: Literal["job_cancelled"] = "job_cancelled"


class JobInterrupted(FrozenModel):
    kind: Literal["job_interrupted"] = "job_interrupted"
    reason: str


class JobResumed(FrozenModel):
    """Queued again; training goes on from the last checkpoint."""

    kind: Literal["job_resumed"] = "job_resumed"


Event = Annotated[
    JobStarted
    | PhaseStarted
    | DatasetPrepared
    | RunPlanned
    | StepCompleted
    | HeldOutMeasured
    | CheckpointSaved
    | StoppedEarly
    | RateLowered
    | MemorySaved
    | Evaluated
    | AdapterWritten
    | JobCompleted
    | JobFailed
    | JobCancelled
    | JobInterrupted
    | JobResumed,
    Field(discriminator="kind"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event, config=ConfigDict(defer_build=True))

Emit = Callable[[Event], None]  # how a training tells of them
