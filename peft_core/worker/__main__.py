"""The worker: train or evaluate as a task says, and write events to standard output as JSON lines.

    python -m peft_core.worker [TASK_FILE]

The task is a TrainingTask in JSON, from a file or from standard input. The process that reads the events is the runner; by hand
it is you. Exit codes: 0 after `AdapterWritten` or `Evaluated`, 1 after `JobFailed`, 143 when it was asked to stop (with a
checkpoint, if training had begun).

Under a launcher (torchrun, `accelerate launch`) several processes share one run. Each of them reads the task, so it must be a
file, and only the process of rank 0 writes events.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import structlog
from pydantic import BaseModel, ValidationError

from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.modeling.environment import importing_torch
from peft_core.schemas.events import JobFailed
from peft_core.schemas.task import TrainingTask
from peft_core.system import logs
from peft_core.system.cancellation import CANCELLED_EXIT_CODE, Cancelled, StopFlag, stop_on_signals, stop_without_parent
from peft_core.system.child_process import (
    JsonLineWriter,
    json_line_writer,
    make_files_private,
    parent_pid,
    redirect_stdout,
)
from peft_core.system.failures import TaskKind, error_info

TRAINING = TaskKind(
    name="training",
    crash_code="training_crashed",
    log="the job's log",
    memory_advice=(
        "Lower rank, or max_length if it is above 512 (no more tokens than that are processed at a time).",
        "Use a smaller base model, or close other programs.",
    ),
)
EVALUATION = TaskKind(
    name="evaluation",
    crash_code="evaluation_crashed",
    log="the job's log",
    memory_advice=("Use a smaller base model, or close other programs.",),
)


def main() -> int:
    """Run the task that the command line names, and return the exit code."""
    # 1. The protocol and the ways to stop, before anything slow.
    make_files_private()
    stop = StopFlag()
    emit = json_line_writer(redirect_stdout(), on_closed=stop.request)
    if os.environ.get("RANK", "0") != "0":  # a launcher numbers its processes
        emit = _discard
    stop_on_signals(stop)
    if (parent := parent_pid()) is not None:
        stop_without_parent(stop, parent)
    log = structlog.get_logger(__name__)

    kind = TRAINING
    try:
        # 2. The task. An invalid setting in the environment must become an event as well.
        logs.configure(Settings().log_level)
        task = _read_task(sys.argv[1:])
        kind = TRAINING if task.kind == "train" else EVALUATION
        structlog.contextvars.bind_contextvars(job_id=task.job_id)

        # 3. The run.
        _run(task, emit, stop)
    except Cancelled:
        log.info("stopped")
        return CANCELLED_EXIT_CODE
    except Exception as error:  # the edge of the process: the runner reads the error as an event
        log.exception("failed")
        emit(JobFailed(error=error_info(error, kind)))
        return 1
    # kill-point: worker: the last event is emitted, the process still lives
    return 0


def _run(task: TrainingTask, emit: JsonLineWriter, stop: StopFlag) -> None:
    """Import what the task needs, and run it. torch takes seconds to import, reads the environment, and may fail to load."""
    # kill-point: worker: the process is starting
    if task.kind == "train":
        with importing_torch():
            from peft_core.training.run import run as train  # noqa: PLC0415 -- torch

        train(task, emit, stop)
    else:
        with importing_torch():
            from peft_core.evaluation.worker.run import run as evaluate  # noqa: PLC0415 -- torch

        evaluate(task, emit, stop)


def _read_task(arguments: list[str]) -> TrainingTask:
    parser = argparse.ArgumentParser(prog="python -m peft_core.worker")
    parser.add_argument(
        "task_file", nargs="?", type=Path, help="a TrainingTask as JSON; omit it to read standard input"
    )
    file: Path | None = parser.parse_args(arguments).task_file
    text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    try:
        return TrainingTask.model_validate_json(text)
    except ValidationError as error:
        raise InvalidArgument(
            str(file or "standard input"), text, f"must be a TrainingTask as JSON ({error})"
        ) from error


def _discard(_event: BaseModel) -> None:
    """Replace the writer in all processes of a launcher but the first."""


if __name__ == "__main__":
    sys.exit(main())
