"""`adapter_manifest.json`: how an adapter was trained, and its measured effect. It is written last and never changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from peft_core.base_models.hub_cache import blob_of
from peft_core.errors import HeaderError
from peft_core.paths import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from peft_core.schemas.base_model import Fingerprint, ModelShape
from peft_core.schemas.counts import counted
from peft_core.schemas.dataset import DatasetSummary, RepositoryState, SourceKind
from peft_core.schemas.evaluation import Evaluation, Verdict
from peft_core.schemas.events import MemorySaved, RateLowered
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import Metrics
from peft_core.schemas.task import ComputePlan
from peft_core.schemas.training import TrainingConfig
from peft_core.system.files import atomic_write, read_small

MANIFEST_NAME = "adapter_manifest.json"
CARD_NAME = "README.md"
REPORT_NAME = "report.html"
MAX_MANIFEST_BYTES = 1 << 20
WEIGHTS, CONFIG = ADAPTER_WEIGHTS, ADAPTER_CONFIG


class BaseRecord(FrozenModel):
    """The base model of an adapter, without local paths. The fingerprint identifies it; the name is for people."""

    name: str
    format: Literal["huggingface", "gguf"]
    revision: str | None
    model_type: str
    shape: ModelShape
    fingerprint: Fingerprint


class DataRecord(FrozenModel):
    source_kind: SourceKind
    summary: DatasetSummary
    languages: dict[str, int]  # number of files by language
    repository_commit: str | None = None
    repository_dirty: bool | None = None
    repositories: tuple[RepositoryState, ...] = ()  # if there are several sources


class Computation(FrozenModel):
    """How the run was computed. Compare the estimated memory with `metrics.peak_memory_bytes`."""

    execution: ComputePlan
    documents_packed: bool  # whether one forward pass processed several documents
    head_in_chunks: bool  # whether logits were computed in chunks of positions
    fused_blocks: int
    fused_linears: int  # not counting those in fused blocks
    estimated_memory_bytes: int | None


class RunRecord(FrozenModel):
    config: TrainingConfig  # base_model, more_sources and continue_from are blank: they are local paths
    target_modules: tuple[str, ...]  # sorted; 'all-linear' is resolved to module names
    device: str
    weights_dtype: str  # of the frozen base: "float32", "bfloat16"
    steps: int
    examples_seen: int | None = None  # different ones that the weights were trained on; None: by an older version
    tokens_seen: int | None = None  # of those examples, each once
    stopped_early_at: int | None = None
    continued_from: str | None = None  # id of the adapter whose weights the run started from
    best_step: int | None = None  # the step whose weights were saved, if early stopping chose one
    scaled_by: float | None = None  # what the adapter adds was multiplied by this after the last step
    share_of_parent: float | None = None  # with which the weights of `continued_from` count in the mean that was saved
    computation: Computation | None = None
    device_check: str = ""  # what people are to know of the comparison with the CPU; "" if there is nothing
    memory_saved: tuple[MemorySaved, ...] = ()  # one entry for each time that memory ran out
    rate_lowered: tuple[RateLowered, ...] = ()  # one entry for each rollback after a divergence

    @property
    def weights_in_words(self) -> str:
        """Which weights were saved, for people; "" if they are those that the last step left."""
        step = f"step {self.steps if self.best_step is None else self.best_step}"
        own = step if self.best_step is None else f"{step}, the best on a held-out sample"
        if self.share_of_parent is not None:
            share = 100 * self.share_of_parent
            return f"{share:.0f} % those of the adapter that it continues, and {100 - share:.0f} % those of {own}"
        if self.scaled_by is not None:
            return (
                f"those of {own}; what they add to the base model was multiplied by {self.scaled_by:g}, because the run went "
                "over the data more than once"
            )
        return "" if self.best_step is None else f"those of {own}"


class Manifest(FrozenModel):
    schema_version: Literal[1] = 1
    adapter_id: str
    project_id: str
    created_at: str  # ISO 8601, UTC
    base: BaseRecord
    data: DataRecord
    run: RunRecord
    metrics: Metrics
    evaluation: Evaluation | None = None  # without texts; None: not measured
    environment: dict[str, str]  # versions of python, torch, transformers, peft, accelerate, peft-mcp; platform
    files: dict[str, str]  # SHA-256 by file name, of every file except this manifest and the report

    @property
    def trained_on(self) -> str:
        """How many examples the weights have seen. A short run, or one that stopped early, has not seen all."""
        run, summary = self.run, self.data.summary
        if run.examples_seen in (None, summary.train_examples):
            return f"{counted(summary.train_examples, 'example')}, {summary.train_tokens} tokens"
        return (
            f"{run.examples_seen} of the {summary.train_examples} examples that were prepared, {run.tokens_seen} tokens"
        )

    @property
    def harms(self) -> bool:
        return self.evaluation is not None and self.evaluation.verdict is Verdict.HARMS

    @property
    def loses(self) -> bool:
        """Whether it predicts what its parent had held out worse than the parent did."""
        return self.evaluation is not None and self.evaluation.catch_up is not None and self.evaluation.catch_up.loses

    @property
    def becomes_current(self) -> bool:
        """Whether the project's `current` link should point to it once it is published."""
        policy = self.run.config.make_current
        return policy == "always" or (policy == "unless_it_harms" and not self.harms and not self.loses)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write the manifest atomically: readers see no manifest or the complete one."""
    atomic_write(directory / MANIFEST_NAME, manifest.model_dump_json(indent=2) + "\n")


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest in a directory; None if it is missing, unreadable or has another schema version.

    The file may be forged, so links are not followed and at most 1 MB is read. Unknown fields are ignored, so that an older
    version of peft-mcp can read the manifests of a newer one.
    """
    try:
        return Manifest.model_validate_json(
            read_small(blob_of(directory / MANIFEST_NAME), MAX_MANIFEST_BYTES), extra="ignore"
        )
    except (HeaderError, ValueError):
        return None
