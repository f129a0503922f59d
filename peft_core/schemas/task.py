"""What a computing child reads: the one line between the runner and what trains or evaluates."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from peft_core.paths import DataPaths
from peft_core.schemas.base_model import Base
from peft_core.schemas.dataset import SourceSummary
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import Estimate
from peft_core.schemas.training import EvaluatedAdapter, TrainingConfig
from peft_core.system.allowed_paths import require_allowed, require_data_place


class ComputePlan(FrozenModel):
    """How a run computes: the fastest way within the memory it may take, chosen before it starts."""

    weights: Literal["float32", "bfloat16", "file"] = "float32"
    """Frozen weights on a CPU. In memory, for products in float32 or in bfloat16; or in their file, from which each matrix
    is unpacked when it is computed with: the same numbers as float32, leaner and slower. Other devices have formats of their
    own."""

    repacked_bytes: int = 0
    """Of quantised weights that stay in their file, so many bytes at most are in memory all the same, in a form that is
    unpacked faster: what the limit leaves room for."""

    recompute_layers: bool = False
    """Whether what a layer computes is thrown away, and computed again for the gradients: leaner still, a third slower."""


class TrainingTask(FrozenModel):
    """What the training child reads: everything it needs, nothing it must look up."""

    job_id: str
    project_id: str
    source: Path  # repository directory or .jsonl file
    source_kind: Literal["repository", "jsonl", "records"]
    config: TrainingConfig
    base: Base
    job_dir: Path  # JobPaths(job_dir) tells the rest
    base_models_dir: Path  # cache of converted bases
    execution: ComputePlan = ComputePlan()
    estimated_memory_bytes: int | None = None  # that the way to compute was chosen by
    evaluated: EvaluatedAdapter | None = None  # for the evaluation child, which trains nothing
    data_dir: Path | None = None  # of the settings, as they are when the job begins; None: a task made by hand
    allowed_roots: tuple[Path, ...] | None = None  # likewise; None: everywhere

    def require_place(self, source: Path) -> None:
        """That data lies where it may be read. Checked once more: a link on the way may lead elsewhere by now.

        Raises:
            InvalidArgument: 'sensitive_place', 'outside_allowed_roots'.
        """
        field = "training_data" if self.evaluated is None else "evaluation_data"
        data_dir = self.data_dir or self.job_dir
        require_data_place(source, data_dir=data_dir, allowed_roots=self.allowed_roots, field=field)

    def require_adapter_place(self, adapter: Path) -> None:
        """Likewise of the adapter to evaluate; those that were published here are our own.

        Raises:
            InvalidArgument: 'outside_allowed_roots'.
        """
        also = () if self.data_dir is None else (DataPaths(self.data_dir).projects,)
        require_allowed("adapter_path", adapter, self.allowed_roots, also=also)


class JobRequest(FrozenModel):
    """What was asked for, resolved: enough to run the job with nothing else looked up."""

    source: Path
    source_kind: Literal["repository", "jsonl", "records"]
    config: TrainingConfig
    base: Base
    found: SourceSummary
    device: str  # expected; the training process decides
    estimate: Estimate
    execution: ComputePlan = ComputePlan()
    evaluated: EvaluatedAdapter | None = None  # an adapter to evaluate, instead of training one
