"""Events of a job, named in the past tense. A worker emits them, the store saves them, and `jobs.state.apply` reduces them.

This union is closed: the `kind` of each event is stored and must not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from peft_core.schemas.dataset import DatasetSummary
from peft_core.schemas.device_check import DeviceCheck, Outcome
from peft_core.schemas.evaluation import AdapterComparison, Evaluation
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import ErrorInfo, Metrics, Phase


class JobStarted(FrozenModel):
    kind: Literal["job_started"] = "job_started"


class PhaseStarted(FrozenModel):
    kind: Literal["phase_started"] = "phase_started"
    phase: Phase
    detail: str = ""  # "1200 of 4000 files"; shown to people unchanged
    done: Annotated[float, Field(ge=0, le=1)] = 0.0  # share of the phase, where it is known


class DatasetPrepared(FrozenModel):
    kind: Literal["dataset_prepared"] = "dataset_prepared"
    dataset: DatasetSummary


class RunPlanned(FrozenModel):
    """The number of steps, which is known once the data is prepared and the model is loaded."""

    kind: Literal["run_planned"] = "run_planned"
    device: str
    total_steps: int
    start_step: int = 0  # of the checkpoint that the run resumes from
    node: str = ""  # of a cluster, that trains


class StepCompleted(FrozenModel):
    kind: Literal["step_completed"] = "step_completed"
    step: int  # 1-based
    loss: float  # nats per target token, mean over the step
    learning_rate: float  # of LoRA A
    tokens: int  # trained on since the run began
    tokens_per_second: float  # since training began, excluding evaluations
    eta_s: float  # until the end of the job, with the evaluation after the last step
    memory_bytes: int  # peak of the process so far


class HeldOutMeasured(FrozenModel):
    """The held-out loss: of a fixed sample during training, and of the complete set before and after it.

    Losses of the sample are comparable with each other, and so are losses of the complete set.
    """

    kind: Literal["held_out_measured"] = "held_out_measured"
    step: int  # 0: the base model
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
    """The run diverged, and continues from its last good state with lower learning rates."""

    kind: Literal["rate_lowered"] = "rate_lowered"
    step: int  # at which it diverged
    back_to_step: int
    factor: Annotated[float, Field(gt=0)]  # of the configured learning rate: 0.25, then 0.0625
    reason: str  # "the loss is nan"


class MemorySaved(FrozenModel):
    """Memory ran out in a step. It is repeated, and the run continued, with a setting that needs less memory."""

    kind: Literal["memory_saved"] = "memory_saved"
    step: int
    tokens_at_once: int  # most tokens per micro-batch from now on; 0: one document
    layers_computed_twice: bool  # gradient checkpointing is on from now on
    reason: str  # the allocator's message

    @property
    def measure(self) -> str:
        """What was changed, in words."""
        return (
            "gradient checkpointing is on"
            if self.layers_computed_twice
            else f"at most {self.tokens_at_once} tokens per micro-batch"
        )


class DeviceChecked(FrozenModel):
    """The accelerator was compared with the CPU. If it may not train, the run continues on the CPU."""

    kind: Literal["device_checked"] = "device_checked"
    check: DeviceCheck

    @property
    def note(self) -> str:
        """What people are to know; "" if all is as expected."""
        if self.check.outcome is Outcome.AGREES and not self.check.memory_note:
            return ""
        return self.check.in_words if self.check.may_train else f"{self.check.in_words}; continued on the CPU"


class Evaluated(FrozenModel):
    """Base model and adapter were compared on held-out text."""

    kind: Literal["evaluated"] = "evaluated"
    evaluation: Evaluation


class AdaptersCompared(FrozenModel):
    """Two adapters and their base model were compared on held-out text."""

    kind: Literal["adapters_compared"] = "adapters_compared"
    comparison: AdapterComparison


class AdapterWritten(FrozenModel):
    """The worker's last event: the adapter is complete in the job's directory, but not published yet."""

    kind: Literal["adapter_written"] = "adapter_written"
    metrics: Metrics


class JobCompleted(FrozenModel):
    kind: Literal["job_completed"] = "job_completed"
    adapter_path: str | None  # published or evaluated; of two compared ones that to keep, if it is one
    metrics: Metrics


class JobFailed(FrozenModel):
    kind: Literal["job_failed"] = "job_failed"
    error: ErrorInfo


class JobCancelled(FrozenModel):
    kind: Literal["job_cancelled"] = "job_cancelled"
    note: str = ""  # what has not ended with the job


class JobInterrupted(FrozenModel):
    kind: Literal["job_interrupted"] = "job_interrupted"
    reason: str


class JobResumed(FrozenModel):
    """The job was queued again; training continues from the last checkpoint."""

    kind: Literal["job_resumed"] = "job_resumed"


class JobPostponed(FrozenModel):
    """A job that started by itself waits in the queue, or was paused and waits there again, until the machine is free."""

    kind: Literal["job_postponed"] = "job_postponed"
    reason: str  # what it waits for: "other programs use 80 % of the processors"


class JobAskedFor(FrozenModel):
    """A user asked for a job that had started by itself: from now on it does not wait for a free machine."""

    kind: Literal["job_asked_for"] = "job_asked_for"


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
    | DeviceChecked
    | Evaluated
    | AdaptersCompared
    | AdapterWritten
    | JobCompleted
    | JobFailed
    | JobCancelled
    | JobInterrupted
    | JobResumed
    | JobPostponed
    | JobAskedFor,
    Field(discriminator="kind"),
]
EVENT: TypeAdapter[Event] = TypeAdapter(Event, config=ConfigDict(defer_build=True))

Emit = Callable[[Event], None]  # passes an event to the runner
