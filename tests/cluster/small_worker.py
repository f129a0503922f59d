"""A training worker for the nodes of a test cluster: everything but torch. It takes half a second, and `hold` applies to it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from sitecustomize import hold  # type: ignore[import-not-found]  # the one beside this file

from peft_core.schemas.events import Emit
from peft_core.schemas.task import TrainingTask
from peft_core.system.cancellation import CANCELLED_EXIT_CODE, Cancelled, StopFlag, stop_on_signals, stop_without_parent
from peft_core.system.child_process import PARENT_VARIABLE, json_line_writer, redirect_stdout
from tests.survival import small_job


def save_checkpoint(directory: Path, step: int) -> None:
    directory.mkdir(exist_ok=True)
    draft = directory / ".state.pt.tmp"
    draft.write_text(json.dumps({"step": step}))
    draft.replace(directory / "state.pt")


def read_checkpoint(directory: Path) -> int:
    state = directory / "state.pt"
    return int(json.loads(state.read_text())["step"]) if state.exists() else 0


def train_step(step: int, emit: Emit) -> None:
    hold(step - 1, STOP)
    TRAIN_STEP(step, emit)


STOP = StopFlag()
TRAIN_STEP = small_job.train_step
small_job.save_checkpoint, small_job.read_checkpoint, small_job.train_step = (
    save_checkpoint,
    read_checkpoint,
    train_step,
)


def main() -> int:
    emit = json_line_writer(redirect_stdout(), on_closed=STOP.request)
    stop_on_signals(STOP)
    stop_without_parent(STOP, int(os.environ[PARENT_VARIABLE]))
    task = TrainingTask.model_validate_json(Path(sys.argv[-1]).read_text())
    # More parameters learn more, so that the runs of a sweep differ.
    small_job.METRICS = small_job.METRICS.model_copy(update={"adapter_loss": 8 / task.request.config.lora_rank})
    try:
        small_job.run(task, emit, STOP)
    except Cancelled:
        return CANCELLED_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
