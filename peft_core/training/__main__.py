"""The training child: one TrainingTask (JSON) on standard input, events (JSON lines) on standard output.

Exit codes: 0 after `AdapterWritten`, 1 after `JobFailed`, 143 when asked to stop (a checkpoint was written if training
had begun). By hand: `python -m peft_core.training < task.json`.
"""

from __future__ import annotations

import os
import sys

import structlog
from pydantic import ValidationError

from peft_core import logs
from peft_core.compute.environment import prepare_environment
from peft_core.compute.failures import Work, problem_of
from peft_core.compute.stop import EXIT_CODE, Stop, Stopped, stop_on_signals, stop_without_parent
from peft_core.compute.wire import claim_stdout, line_writer
from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.events import JobFailed
from peft_core.spec import TrainingTask

_PARENT_VARIABLE = "PEFT_MCP_PARENT"
WORK = Work(
    name="training",
    log="the job's log",
    against_memory=(
        "Lower rank, or max_length where it is above 512 (at most so many tokens are processed at once).",
        "Use a smaller base model, or close other programs.",
    ),
)


def main() -> int:
    # 1. The wire and the ways to stop, before anything slow.
    stop = Stop()
    emit = line_writer(claim_stdout(), closed=stop.request)
    stop_on_signals(stop)
    if parent := os.environ.get(_PARENT_VARIABLE):
        stop_without_parent(stop, int(parent))
    logs.configure(Settings().log_level)
    log = structlog.get_logger(__name__)

    try:
        # 2. The task.
        task = _read_task(sys.stdin.read())
        structlog.contextvars.bind_contextvars(job_id=task.job_id)

        # 3. Torch and its company take seconds, read the environment as they load, and may fail to: hence here.
        prepare_environment()
        from peft_core.training.engine import run  # noqa: PLC0415 -- see above

        # 4. The run.
        run(task, emit, stop)
    except Stopped:
        log.info("stopped")
        return EXIT_CODE
    except Exception as error:  # the process's edge: whatever it is, it becomes an event
        log.exception("failed")
        emit(JobFailed(error=problem_of(error, WORK)))
        return 1
    return 0


def _read_task(text: str) -> TrainingTask:
    try:
        return TrainingTask.model_validate_json(text)
    except ValidationError as error:
        raise InvalidArgument("standard input", text, f"one TrainingTask as JSON ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
