"""Results, each defined once: the output schemas of the tools and the return values of the Python API.

Clients rely on the field names: add fields, but do not rename them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from peft_core.errors import PeftMcpError
from peft_core.schemas.dataset import DatasetSummary, SkippedRecords, StudyUse
from peft_core.schemas.evaluation import AdapterComparison, Evaluation, Keep, Verdict
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.generation import Engine
from peft_core.schemas.staleness import Staleness
from peft_core.schemas.training import TrainingConfig


class Status(StrEnum):
    """The state of a job."""

    NOT_STARTED = "not_started"
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    INTERRUPTED = "interrupted"

    @property
    def is_final(self) -> bool:
        return self not in (Status.NOT_STARTED, Status.QUEUED, Status.IN_PROGRESS)


class Phase(StrEnum):
    """The phases of a running job, in order."""

    STARTING = "starting"
    PREPARING_DATA = "preparing_data"
    LOADING_MODEL = "loading_model"
    EVALUATING_BASE = "evaluating_base"
    TRAINING = "training"
    EVALUATING_ADAPTER = "evaluating_adapter"
    SAVING = "saving"
    PUBLISHING = "publishing"


class ErrorInfo(FrozenModel):
    """An error as data."""

    code: str
    message: str
    suggestions: tuple[str, ...] = ()

    @classmethod
    def from_error(cls, error: PeftMcpError) -> ErrorInfo:
        return cls(code=error.code, message=error.message, suggestions=error.suggestions)


class NextStep(FrozenModel):
    """A suggested call. `tool` names an MCP tool and the method of `PEFTManager` that it calls."""

    tool: str
    arguments: dict[str, Any] = Field({})
    missing: tuple[str, ...] = Field((), description="Required arguments to fill in.")
    reason: str = ""

    @property
    def sentence(self) -> str:
        """The reason, then the call: "The adapter helps. Call load_adapter(adapter_path='web')."."""
        known = [f"{name}={value!r}" for name, value in self.arguments.items()]
        arguments = ", ".join([*known, *(f"{name}=..." for name in self.missing)])
        return f"{self.reason} Call {self.tool}{f'({arguments})' if arguments else ''}.".lstrip()


class Estimate(FrozenModel):
    """Estimated size, duration and memory of a job."""

    train_tokens: int
    steps: int
    seconds: float | None
    memory_bytes: int
    basis: str  # where the estimate comes from, in words
    chosen: str = Field("", description="Settings that were chosen automatically, and why.")
    cluster: str = Field("", description="Where on the cluster it trains, and what is sent there.")
    sent_bytes: int = 0  # to the cluster, about


class Metrics(FrozenModel):
    """Measurements of a finished training. Losses are in nats per target token, on the same held-out examples."""

    base_loss: float | None = None
    adapter_loss: float | None = None
    base_perplexity: float | None = None
    adapter_perplexity: float | None = None
    tokens: int | None = None  # trained on, counting every epoch
    tokens_per_second: float | None = None  # in the training phase
    wall_s: float | None = None  # lifetime of the training process
    peak_memory_bytes: int | None = None
    device_memory_bytes: int | None = None  # peak on an accelerator, which the estimate refers to; None on a CPU
    adapter_bytes: int | None = None


class SweepRunStatus(FrozenModel):
    """One training of a sweep."""

    job_id: str
    value: float  # of the setting
    status: Status
    held_out_loss: float | None = None  # at its end
    verdict: Verdict | None = None
    published: bool = False  # it was the best of those that had ended


class SweepStatus(FrozenModel):
    """Trainings that differ in one setting; the adapter of the best becomes current, unless it harms."""

    setting: str
    best_job_id: str | None  # of those that have been completed
    is_complete: bool
    runs: list[SweepRunStatus]


class TrainingStatus(FrozenModel):
    """The state of a job. Fields are null until they are known."""

    job_id: str | None
    project_id: str
    kind: Literal["training", "evaluation"] = "training"
    evaluated_on: str = Field("", description="The data of an evaluation.")
    compared_adapters: list[str] = Field(
        [], description="Directories of the two adapters that are compared: A, then B."
    )
    status: Status
    cancel_requested: bool | None = Field(None, description="True: the job is stopping.")
    phase: Phase | None = None
    detail: str = Field("", description="Details of the phase.")
    progress_percent: float = 0.0
    step: int = 0
    total_steps: int | None = None
    loss: float | None = Field(None, description="Mean training loss of the latest step, in nats per token.")
    held_out_loss: float | None = Field(
        None,
        description="Latest held-out loss: of a fixed sample during training, of all held-out examples at the end.",
    )
    tokens_per_second: float | None = None
    eta_s: float | None = Field(None, description="Seconds until the end of the job, with its evaluation.")
    peak_memory_bytes: int | None = Field(None, description="Peak memory of the training process so far.")
    queue_position: int | None = Field(None, description="1 is next; null if not queued.")
    waits_for: str = Field("", description="Why a training that started by itself waits in the queue.")
    only_while_free: bool | None = Field(None, description="True: it runs only while the machine is free.")
    started_because: str = Field("", description="Why the training was started, if not by train_adapter.")
    device: str | None = None
    cluster: str | None = Field(None, description="Address of the Ray cluster that it trains on; null: this machine.")
    node: str = Field("", description="Node of the cluster that trains.")
    base_model: str | None = None
    better_base: str = Field("", description="A base model on this machine that suits code better than the default.")
    adapter_path: str | None = Field(
        None,
        description="The published or evaluated adapter, of two compared ones that to keep; set only if status is 'completed'.",
    )
    sweep: SweepStatus | None = Field(None, description="All runs of the sweep that this job is part of.")
    error: ErrorInfo | None = None
    metrics: Metrics | None = None
    evaluation: Evaluation | None = Field(
        None, description="Base model and adapter compared on held-out files, with a verdict."
    )
    comparison: AdapterComparison | None = Field(None, description="Two adapters compared, and which one to keep.")
    report_path: str | None = Field(
        None, description="HTML report with loss curves, confidence intervals and examples."
    )
    dataset: DatasetSummary | None = None
    training_data: str | None = Field(None, description="Summary of the data.")
    left_out_by_extension: dict[str, dict[str, int]] = Field(
        {}, description="Files not read: reason, extension, count."
    )
    estimate: Estimate | None = None
    log_path: str | None = None
    created_at: str | None = Field(None, description="When the job was queued, ISO 8601.")
    updated_at: str | None = None
    next: str = Field("", description="Suggested next call, in words.")
    next_step: NextStep | None = None


class AdapterSummary(FrozenModel):
    """One published adapter."""

    adapter_id: str
    project_id: str
    current: bool = Field(description="Whether it is the project's current adapter, which the project id refers to.")
    created_at: str
    base_model: str
    base_id: str = Field("", exclude=True)  # names are for people: two base models may have the same
    base_perplexity: float | None
    adapter_perplexity: float | None
    verdict: Verdict | None = Field(None, description="Effect on held-out files.")
    loses: bool = Field(False, description="Predicts old held-out code worse than the adapter that it continues from.")
    adapter_bytes: int
    adapter_path: str
    resident: bool = Field(False, description="Whether it is in memory, so that load_adapter only switches to it.")
    active: bool = Field(False, description="Whether generate uses it.")
    staleness: Staleness | None = Field(None, description="Of current adapters: how far the code has moved on since.")


class JobSummary(FrozenModel):
    """One training or evaluation. Times are seconds since the epoch."""

    job_id: str
    project_id: str
    kind: Literal["training", "evaluation"]
    status: Status
    verdict: Verdict | None = None
    keep: Keep | None = Field(None, description="Of a comparison of two adapters.")
    base_model: str
    created_at: float
    updated_at: float


class Reason(FrozenModel):
    """One finding of the check. `where` names the file, setting or tensor; `fix` is the remedy."""

    code: str
    severity: Literal["error", "warning"]
    message: str
    found: str | None = None
    expected: str | None = None
    where: str | None = None
    fix: str | None = None


class BaseMatch(StrEnum):
    """How certain it is that an adapter belongs to a base model, from best to worst."""

    EXACT = "exact"  # identical weights, by SHA-256 or by repository and commit
    SAMPLED = "sampled"  # sampled bytes of every tensor are equal
    SAME_FAMILY = "same_family"  # the same model in another number format: equal names, shapes and norm weights
    SHAPE_ONLY = "shape_only"  # the shapes match, but there is no evidence that it is the same model
    INCOMPATIBLE = "incompatible"


class Compatibility(FrozenModel):
    """Whether an adapter can be used with a base model, with every finding."""

    verdict: BaseMatch
    compatible: bool = Field(
        description="Whether load_adapter accepts it without overrides. For 'shape_only', pass accept_unproven_base=true."
    )
    reasons: list[Reason]
    adapter_path: str
    base_model: str | None = Field(
        description="Absent (null) if none was requested and the adapter's own was not found."
    )
    scanned: bool = Field(description="Whether all weights were read, not only headers and configuration.")
    elapsed_ms: float
    next: str = Field("", description="Suggested next call, in words.")
    next_step: NextStep | None = None


class LoadCheck(FrozenModel):
    """Evidence that an adapter has an effect, measured after loading."""

    unmatched_keys: int = Field(
        description="Tensors that match no module of the base model, plus modules without a tensor."
    )
    max_logit_change: float = Field(
        description="Largest difference from the base model on a fixed text: of a logit, with llama.cpp of a log-probability."
    )


class ResidentAdapter(FrozenModel):
    adapter_path: str
    active: bool


class MemoryState(FrozenModel):
    """The contents of the inference process's memory."""

    base_model: str | None = None
    base_path: str | None = None
    engine: Engine | None = None
    adapters: list[ResidentAdapter] = Field([], description="Least recently used first.")
    memory_bytes: int = Field(0, description="Resident memory of the inference process; 0 if it is not running.")


class LoadedAdapter(FrozenModel):
    status: Literal["loaded", "fallback"] = Field(
        description="'fallback': the adapter was NOT loaded (see reason); the previous adapter or the base model stays active."
    )
    adapter_path: str | None = Field(description="The active adapter; null for the base model alone.")
    base_model: str
    verdict: BaseMatch | None = None
    reason: str | None = Field(None, description="Why the adapter was not loaded.")
    reasons: list[Reason] = Field([])
    effect: LoadCheck | None = None
    engine: Engine | None = None
    engine_reason: str = Field("", description="Why this engine was chosen.")
    how: Literal["cold", "warm", "switched"] | None = Field(
        None,
        description="cold: base model and adapter were loaded; warm: only the adapter; switched: both were in memory.",
    )
    evicted: list[str] = Field([], description="Adapters that were unloaded to stay within max_resident_adapters.")
    resident: MemoryState
    elapsed_s: float
    memory_bytes: int = Field(description="Resident memory of the inference process.")
    staleness: Staleness | None = Field(None, description="How far the code has moved on since the training.")
    next: str = Field("", description="Suggested next call, in words.")
    next_step: NextStep | None = None


class UnloadedAdapter(FrozenModel):
    status: Literal["unloaded", "nothing_loaded"]
    adapter_path: str | None = Field(description="The unloaded adapter; null for the base model alone.")
    base_unloaded: bool = Field(description="Whether the base model was unloaded too, because no adapter is left.")
    resident: MemoryState
    memory_before_bytes: int
    memory_after_bytes: int
    elapsed_s: float
    next: str = ""
    next_step: NextStep | None = None


def nothing_was_loaded(memory_bytes: int) -> UnloadedAdapter:
    step = NextStep(tool="load_adapter", missing=("adapter_path",), reason="There is nothing to unload.")
    return UnloadedAdapter(
        status="nothing_loaded",
        adapter_path=None,
        base_unloaded=False,
        resident=MemoryState(memory_bytes=memory_bytes),
        memory_before_bytes=memory_bytes,
        memory_after_bytes=memory_bytes,
        elapsed_s=0.0,
        next=step.sentence,
        next_step=step,
    )


class DeletedAdapter(FrozenModel):
    adapter_id: str
    project_id: str
    freed_bytes: int
    current: str | None = Field(description="The project's current adapter; null if none is left.")
    next: str = ""
    next_step: NextStep | None = None


class AdapterList(FrozenModel):
    adapters: list[AdapterSummary]
    loaded: MemoryState = Field(MemoryState(), description="What the inference process of this server holds in memory.")
    not_compared: int = Field(0, description="Current adapters whose code was not compared in time.")
    next: str
    next_step: NextStep | None = None


class DataSample(FrozenModel):
    """One training example. FIM markers are placeholders; training uses the base model's own."""

    path: str
    start_line: int = Field(description="1-based; 0 if unknown.")
    end_line: int
    kind: str
    language: str
    tokens: int
    given: str = Field(description="Context without loss: the path, surrounding headers, a prompt.")
    learned: str
    text: str = Field("", description="The whole text; what is learned is between \u27e6 and \u27e7.")


class TrainingDataReport(FrozenModel):
    """The dataset and settings that a training would use. Tokens are estimated; a training counts them with the tokenizer."""

    training_data: str
    base_model: str
    device: str
    train_examples: int
    held_out_examples: int
    train_tokens: int
    held_out_tokens: int
    files: int = Field(description="Files with examples, including held-out ones.")
    counted: str = Field("", description="What the counts are of, if an adapter is continued.")
    records: int | None = Field(None, description="Records that can be used; null for code.")
    code_files: int | None = Field(None, description="Of `files`, those of repositories beside the records.")
    unread_files: int = Field(
        0, description="Files not read, because the others suffice; not counted in the other fields."
    )
    languages: dict[str, int] = Field(description="Files per language.")
    left_out: dict[str, int] = Field(description="Excluded files and parts of files, per reason.")
    left_out_by_extension: dict[str, dict[str, int]] = Field(
        {}, description="Files not read: reason, extension, count."
    )
    advice: list[str] = Field([], description="What to do about files that are left out.")
    unused_keys: dict[str, int] = Field({}, description="Records per key that is not used, such as id.")
    skipped: list[SkippedRecords] = Field([], description="Records that cannot be used, per reason.")
    study: StudyUse | None = Field(None, description="What becomes of the study items.")
    secrets_removed: int
    held_out_files: list[str] = Field(description="Files held out of training to evaluate on.")
    largest_files: dict[str, int] = Field(description="Training tokens of the largest files.")
    samples: list[DataSample]
    config: TrainingConfig = Field(description="Complete settings, including those chosen automatically.")
    estimate: Estimate
    next: str = ""
    next_step: NextStep | None = None
