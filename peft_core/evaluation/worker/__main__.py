"""The evaluation child: a TrainingTask with an adapter, events on standard output; as the training child in all else."""

from __future__ import annotations

import sys

from peft_core.system.failures import TaskKind
from peft_core.training.__main__ import main

WORK = TaskKind(
    name="evaluation",
    log="the job's log",
    against_memory=("Use a smaller base model, or close other programs.",),
)

if __name__ == "__main__":
    sys.exit(main(WORK, "peft_core.evaluation.worker.run"))
