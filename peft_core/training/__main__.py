"""The training child: one TrainingTask (JSON) from a file or standard input, events (JSON lines) on standard output.

Exit codes: 0 after `AdapterWritten`, 1 after `JobFailed`, 143 when asked to stop (a checkpoint was written if training
had begun). By hand: `python -m peft_core.training [TASK_FILE]`. Under a launcher (torchrun, `accelerate launch`) several
processes make one run: each needs the task, so it must be a file, and only the first of them has a say.
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from pathlib import Path

import structlog
from pydantic import BaseModel, ValidationError

from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.modeling.environment import prepare_environment
from peft_core.schemas.events import JobFailed
from peft_core.schemas.task import TrainingTask
from peft_core.system import logs
from peft_core.system.cancellation import EXIT_CODE, Cancelled, StopFlag, stop_on_signals, stop_without_parent
from peft_core.system.child_process import line_writer, redirect_stdout
from peft_core.system.failures import TaskKind, problem_of

# The runner's pid; or "launcher", when one stands between: the runner's death is then heard of by the closed pipe.
_PARENT_VARIABLE = "PEFT_MCP_PARENT"
WORK = TaskKind(
    name="training",
    log="the job's log",
    against_memory=(
        "Lower rank, or max_length where it is above 512 (at most so many tokens are processed at once).",
        "Use a smaller base model, or close other programs.",
    ),
)


def main(work: TaskKind = WORK, engine: str = "peft_core.training.run") -> int:
    """`engine`: the module whose `run` does the work."""
    # 1. The wire and the ways to stop, before anything slow.
    stop = StopFlag()
    emit = line_writer(redirect_stdout(), closed=stop.request)
    if os.environ.get("RANK", "0") != "0":  # which of a launcher's processes this is
        emit = _say_nothing
    stop_on_signals(stop)
    if parent := os.environ.get(_PARENT_VARIABLE):
        stop_without_parent(stop, os.getppid() if parent == "launcher" else int(parent))
    logs.configure(Settings().log_level)
    log = structlog.get_logger(__name__)

    try:
        # 2. The task.
        task = _read_task(sys.argv[1:])
        structlog.contextvars.bind_contextvars(job_id=task.job_id)

        # 3. Torch and its company take seconds, read the environment as they load, and may fail to: hence here.
        prepare_environment()
        run = import_module(engine).run

        # 4. The run.
        run(task, emit, stop)
    except Cancelled:
        log.info("stopped")
        return EXIT_CODE
    except Exception as error:  # the process's edge: whatever it is, it becomes an event
        log.exception("failed")
        emit(JobFailed(error=problem_of(error, work)))
        return 1
    return 0


def _read_task(arguments: list[str]) -> TrainingTask:
    parser = argparse.ArgumentParser(prog="python -m peft_core.training")
    parser.add_argument("task_file", nargs="?", type=Path, help="a TrainingTask as JSON; without it, standard input")
    file: Path | None = parser.parse_args(arguments).task_file
    text = sys.stdin.read() if file is None else file.read_text(encoding="utf-8")
    try:
        return TrainingTask.model_validate_json(text)
    except ValidationError as error:
        raise InvalidArgument(str(file or "standard input"), text, f"one TrainingTask as JSON ({error})") from error


def _say_nothing(_said: BaseModel) -> None:
    """What processes other than the first do with events."""


if __name__ == "__main__":
    sys.exit(main())
