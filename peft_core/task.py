"""What a computing child reads: the one line between the runner and what trains or evaluates."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from peft_core.spec import Base, EvaluatedAdapter, Execution, Frozen, TrainingConfig


class TrainingTask(Frozen):
    """What the training child reads: everything it needs, nothing it must look up."""

    job_id: str
    project_id: str
    source: Path  # repository directory or .jsonl file
    source_kind: Literal["repository", "jsonl", "records"]
    config: TrainingConfig
    base: Base
    job_dir: Path  # JobPaths(job_dir) tells the rest
    base_models_dir: Path  # cache of converted bases
    execution: Execution = Execution()
    estimated_memory_bytes: int | None = None  # that the way to compute was chosen by
    evaluated: EvaluatedAdapter | None = None  # for the evaluation child, which trains nothing
