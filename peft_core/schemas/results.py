"""What the verbs answer, each defined once: the tools' output schemas and the Python API's values.

Field names are relied on by others: add, do not rename.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field

from peft_core.errors import PeftMcpError
from peft_core.schemas.dataset import DatasetSummary
from peft_core.schemas.evaluation import Evaluation, Verdict
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.training import TrainingConfig


class Status(StrEnum):
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
    """What a running job is doing, in order."""

    STARTING = "starting"
    PREPARING_DATA = "preparing_data"
    LOADING_MODEL = "loading_model"
    EVALUATING_BASE = "evaluating_base"
    TRAINING = "training"
    EVALUATING_ADAPTER = "evaluating_adapter"
    SAVING = "saving"
    PUBLISHING = "publishing"


class ErrorInfo(FrozenModel):
    """A failure as data."""

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
    """What a run will take, before it runs."""

    train_tokens: int
    steps: int
    seconds: float | None
    memory_bytes: int
    basis: str  # where the figures come from, in words
    chosen: str = Field("", description="What was chosen where the request left it open, and why.")


class Metrics(FrozenModel):
    """What was measured. Losses in nats per target token, on the same held-out examples."""

    base_loss: float | None = None
    adapter_loss: float | None = None
    base_perplexity: float | None = None
    adapter_perplexity: float | None = None
    tokens: int | None = None  # trained on, epochs counted
    tokens_per_second: float | None = None  # in the training phase
    wall_s: float | None = None  # of the training process, start to end
    peak_memory_bytes: int | None = None
    device_memory_bytes: int | None = None  # of a GPU, which the estimate is of there; null on a CPU
    adapter_bytes: int | None = None


class TrainingStatus(FrozenModel):
    """The truth about one training job. Null where not known yet."""

    job_id: str | None
    project_id: str
    kind: Literal["training", "evaluation"] = "training"
    status: Status
    phase: Phase | None = None
    detail: str = Field("", description="More on the phase, in words.")
    progress_percent: float = 0.0
    step: int = 0
    total_steps: int | None = None
    loss: float | None = Field(None, description="Mean training loss of the latest step, nats per token.")
    held_out_loss: float | None = Field(
        None,
        description="Latest loss on held-out files: a fixed sample of them while it trains, all of them at the end.",
    )
    tokens_per_second: float | None = None
    eta_s: float | None = None
    peak_memory_bytes: int | None = Field(None, description="Of the training process so far.")
    queue_position: int | None = Field(None, description="1 = next. Null when not queued.")
    device: str | None = None
    base_model: str | None = None
    adapter_path: str | None = Field(
        None,
        description="The published or evaluated adapter. Set only when status is 'completed'.",
    )
    error: ErrorInfo | None = None
    metrics: Metrics | None = None
    evaluation: Evaluation | None = Field(None, description="Base against adapter on held-out files, with a verdict.")
    report_path: str | None = Field(None, description="A page to open in a browser: curves, intervals, examples.")
    dataset: DatasetSummary | None = None
    training_data: str | None = Field(None, description="What is trained on, in words.")
    estimate: Estimate | None = None
    log_path: str | None = None
    next: str = Field("", description="What to call now.")
    next_step: NextStep | None = None


class AdapterSummary(FrozenModel):
    """One published adapter."""

    adapter_id: str
    project_id: str
    current: bool = Field(description="The one that the project id stands for.")
    created_at: str
    base_model: str
    base_perplexity: float | None
    adapter_perplexity: float | None
    verdict: Verdict | None = Field(None, description="On held-out files. Null: trained before there were verdicts.")
    adapter_bytes: int
    adapter_path: str
    resident: bool = Field(False, description="In memory, so that load_adapter only switches to it.")
    active: bool = Field(False, description="The one that generate uses.")


class Reason(FrozenModel):
    """One finding of the check. `where` names the file, setting or tensor; `fix` says what to do about it."""

    code: str
    severity: Literal["error", "warning"]
    message: str
    found: str | None = None
    expected: str | None = None
    where: str | None = None
    fix: str | None = None


class BaseMatch(StrEnum):
    """How sure it is that an adapter belongs to a base, best first."""

    EXACT = "exact"  # the very weights it was trained on: by sha256, or by repository and commit
    SAMPLED = "sampled"  # samples of every tensor are equal
    SAME_FAMILY = "same_family"  # the same model in another number format: names, shapes and norm weights are equal
    SHAPE_ONLY = "shape_only"  # it fits, and nothing proves that it belongs
    INCOMPATIBLE = "incompatible"


class Compatibility(FrozenModel):
    """Whether an adapter can be used with a base, and every reason for and against."""

    verdict: BaseMatch
    compatible: bool = Field(description="load_adapter takes it as it is. A 'shape_only' adapter must be insisted on.")
    reasons: list[Reason]
    adapter_path: str
    base_model: str | None = Field(description="Null: no base was named, and the adapter's own was not found.")
    scanned: bool = Field(description="Whether the weights themselves were read, not only headers and configuration.")
    elapsed_ms: float
    next: str = Field("", description="What to call now.")
    next_step: NextStep | None = None


class LoadCheck(FrozenModel):
    """Proof that an adapter took hold, measured after loading."""

    unmatched_keys: int = Field(description="Tensors that found no place in the base, and places without a tensor.")
    max_logit_change: float = Field(description="Largest change of a logit against the base, on a fixed text.")


class ResidentAdapter(FrozenModel):
    adapter_path: str
    active: bool


class MemoryState(FrozenModel):
    """What the inference process holds in memory."""

    base_model: str | None = None
    base_path: str | None = None
    adapters: list[ResidentAdapter] = Field([], description="Least recently used first.")
    memory_bytes: int = Field(0, description="Of the inference process as the operating system sees it; 0: none runs.")


class LoadedAdapter(FrozenModel):
    status: Literal["loaded", "fallback"] = Field(
        description="'fallback': the adapter was NOT loaded (see reason); what was active still is, or else the base alone.",
    )
    adapter_path: str | None = Field(description="What is active now. Null: the base alone.")
    base_model: str
    verdict: BaseMatch | None = None
    reason: str | None = Field(None, description="Why it fell back.")
    reasons: list[Reason] = Field([])
    effect: LoadCheck | None = None
    how: Literal["cold", "warm", "switched"] | None = Field(
        None,
        description="cold: base and adapter were loaded; warm: the base was there; switched: both were.",
    )
    evicted: list[str] = Field([], description="Adapters that had to go: only so many stay.")
    resident: MemoryState
    elapsed_s: float
    memory_bytes: int = Field(description="Of the inference process, now.")
    next: str = Field("", description="What to call now.")
    next_step: NextStep | None = None


class UnloadedAdapter(FrozenModel):
    status: Literal["unloaded", "nothing_loaded"]
    adapter_path: str | None = Field(description="What was taken off. Null: the base alone.")
    base_unloaded: bool = Field(description="The base went too, since no adapter was left.")
    resident: MemoryState
    memory_before_bytes: int
    memory_after_bytes: int
    elapsed_s: float
    next: str = ""
    next_step: NextStep | None = None


def nothing_was_loaded(memory_bytes: int) -> UnloadedAdapter:
    step = NextStep(tool="load_adapter", missing=("adapter_path",), reason="Nothing was loaded.")
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
    current: str | None = Field(description="The adapter that the project id stands for now. Null: none is left.")
    next: str = ""
    next_step: NextStep | None = None


class AdapterList(FrozenModel):
    adapters: list[AdapterSummary]
    loaded: MemoryState = Field(MemoryState(), description="What this server's inference process holds in memory.")
    next: str
    next_step: NextStep | None = None


# FOLDED FROM peft_core.schemas.results: What inspecting training data answers. Apart from what makes it, which is
# slow to import.


class DataSample(FrozenModel):
    """One example, as it would be trained on, but for the marks around gaps and turns: those will be the base's own."""

    path: str
    start_line: int = Field(description="1-based; 0 where it is not known.")
    end_line: int
    kind: str
    language: str
    tokens: int
    given: str = Field(description="Context that carries no loss: the path, the heads around the code, a prompt.")
    learned: str


class TrainingDataReport(FrozenModel):
    """What a training would be given and would do. Tokens are estimated; a training counts them with the base's tokenizer."""

    training_data: str
    base_model: str
    device: str
    train_examples: int
    held_out_examples: int
    train_tokens: int
    held_out_tokens: int
    files: int = Field(description="That examples come from, held-out ones included.")
    unread_files: int = Field(
        0,
        description="Not looked at, because there are enough others; the figures are without them.",
    )
    languages: dict[str, int] = Field(description="Files by language.")
    left_out: dict[str, int] = Field(description="Files and pieces of files by reason.")
    secrets_removed: int
    held_out_files: list[str] = Field(description="Kept out of training, to measure base and adapter on.")
    largest_files: dict[str, int] = Field(description="Tokens to train on, of the files that have the most.")
    samples: list[DataSample]
    config: TrainingConfig = Field(description="With what was left open filled in.")
    estimate: Estimate
    next: str = ""
    next_step: NextStep | None = None
