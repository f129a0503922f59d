"""Jobs as they are planned, stored, and handed to the worker process that runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from peft_core.schemas.base_model import Base
from peft_core.schemas.cluster import ClusterPlan
from peft_core.schemas.dataset import CatchUpSpec, DatasetPurpose, DatasetSpec, DataSource, SourceKind, SourceSummary
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import Estimate
from peft_core.schemas.training import ContinuedAdapter, EvaluatedAdapter, SweepRun, TrainingConfig


class ComputePlan(FrozenModel):
    """How a run computes. The planner chooses the fastest plan that fits the memory limit."""

    weights: Literal["float32", "bfloat16", "file"] = "float32"
    """Where a CPU holds the frozen weights: in memory as float32 or bf16, or in their memory-mapped file, from which each
    matrix is dequantised when it is needed. The latter gives the same results as float32 with less memory, but is slower.
    Other devices choose their own format."""

    recompute_layers: bool = False
    """Gradient checkpointing: activations are discarded and recomputed in the backward pass. Saves memory; a third slower."""


class JobRequest(FrozenModel):
    """A resolved request: enough to run the job without looking anything else up."""

    source: Path
    source_kind: SourceKind
    source_name: str = ""  # of several sources, see `DataSource`
    more_sources: tuple[DataSource, ...] = ()
    config: TrainingConfig
    base: Base
    found: SourceSummary
    device: str  # expected; the training process decides
    estimate: Estimate
    execution: ComputePlan = ComputePlan()
    evaluated: EvaluatedAdapter | None = None  # set if the job evaluates adapters instead of training one
    continued: ContinuedAdapter | None = None  # set if a training does not start from scratch
    catch_up: CatchUpSpec | None = None  # set with `continued`
    sweep: SweepRun | None = None  # set if it is one of several trainings of which the best is kept
    cluster: ClusterPlan | None = None  # set if the job runs on a cluster

    @property
    def purpose(self) -> DatasetPurpose:
        return DatasetPurpose.TRAINING if self.evaluated is None else DatasetPurpose.EVALUATION

    @property
    def noun(self) -> str:
        """What messages call the job."""
        if self.evaluated is None:
            return "training"
        return "evaluation" if self.evaluated.compared_with is None else "comparison"

    @property
    def dataset(self) -> DatasetSpec:
        """How the source becomes the job's dataset."""
        config = self.config
        common = DatasetSpec(
            source=self.source,
            source_kind=self.source_kind,
            source_name=self.source_name,
            more_sources=self.more_sources,
            include=tuple(config.include),
            exclude=tuple(config.exclude),
            max_length=config.max_length,
            held_out_fraction=1.0,
            seed=config.seed,
            skip_unusable_records=config.skip_unusable_records,
            purpose=self.purpose,
        )
        if self.evaluated is not None:
            return common
        return common.model_copy(
            update={
                "held_out_fraction": config.held_out_fraction,
                "held_out_by": config.held_out_by,
                "mixture": config.mixture,
                # What has changed may be anywhere, so a run that catches up reads all files.
                "enough_examples": None
                if config.max_steps is None or self.catch_up is not None
                else config.max_steps * config.batch_size,
                "catch_up": self.catch_up,
            }
        )


class TrainingTask(FrozenModel):
    """What a worker process reads from task.json: a job's request and the paths that it works in."""

    job_id: str
    project_id: str
    request: JobRequest
    job_dir: Path  # see `paths.JobPaths`
    base_models_dir: Path  # cache of converted base models
    earlier_examples: tuple[Path, ...] = ()  # training examples of the adapters that it continues
    data_dir: Path | None = None  # of the settings when the job starts; None for a task written by hand
    allowed_roots: tuple[Path, ...] | None = None  # of the settings when the job starts; None: no restriction

    @property
    def kind(self) -> Literal["train", "evaluate"]:
        return "train" if self.request.evaluated is None else "evaluate"
