"""What a computing child reads: the one line between the runner and what trains or evaluates."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from peft_core.paths import DataPaths
from peft_core.places import require_allowed, require_data_place
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
