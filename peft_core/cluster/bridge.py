"""The bridge: run a training on a Ray cluster as if its worker were here.

    python -m peft_core.cluster.bridge TASK_FILE [--patience SECONDS]

The task is a TrainingTask whose `request.cluster` is set. The bridge prepares the dataset in JOB/dataset on this machine,
sends it with the task to the cluster, and writes the events of the run there to standard output as JSON lines, as
`peft_core.worker` does. At the end it writes the adapter to JOB/adapter, checks its bytes, and emits `AdapterWritten`. It needs
no torch and little memory, and several bridges may run at a time.

The run on the cluster does not depend on the bridge. A bridge that is killed leaves it alone, and the next bridge of the same
job attaches to it: it emits all events of the run from the first, and fetches the adapter. JOB/cluster.json remembers the run's
name on the cluster. JOB/checkpoint is kept up to date while the bridge is connected, so that a resumed job continues from it
even if the cluster is gone. The run itself keeps the time limit, `config.max_minutes`.

| exit code | the last event | meaning |
|---|---|---|
| 0 | `AdapterWritten` | JOB/adapter is complete; nothing of the job is left on the cluster |
| 1 | `JobFailed` | the run failed, or could not be started; nothing of the job is left on the cluster |
| 75 | `JobInterrupted` | the cluster is gone or silent, or the time is over; a new bridge resumes the job |
| 129 | any | detached: the run continues on the cluster, and a new bridge attaches to it |
| 143 | any | stopped: the run has ended with a checkpoint, which is in JOB/checkpoint |

| signal | effect |
|---|---|
| SIGTERM, SIGINT | stop the run on the cluster, fetch its checkpoint, exit with 143 |
| SIGHUP | detach: exit immediately with 129 |
| the parent dies, or nothing reads the events | as SIGHUP |

So a cancellation is SIGTERM; a runner that ends itself sends SIGHUP. A stop takes a micro-batch, a
checkpoint and its transfer; a bridge that is killed meanwhile has requested the stop nevertheless. Ray reads the token from
the environment (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH), never from arguments.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import structlog
from pydantic import ValidationError

from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.schemas.events import JobFailed, JobInterrupted
from peft_core.schemas.task import TrainingTask
from peft_core.system import logs
from peft_core.system.cancellation import (
    CANCELLED_EXIT_CODE,
    DETACHED_EXIT_CODE,
    INTERRUPTED_EXIT_CODE,
    Cancelled,
    Interrupted,
    StopFlag,
)
from peft_core.system.child_process import (
    json_line_writer,
    make_files_private,
    parent_pid,
    redirect_stdout,
    watch_parent,
)
from peft_core.system.failures import TaskKind, error_info
from peft_core.system.packages import require_ray

TASK = TaskKind(
    name="connection to the cluster",
    crash_code="cluster_bridge_crashed",
    log="the job's log",
    memory_advice=("Close other programs.",),
)
PATIENCE_S = 900.0  # how long a cluster may be unreachable before a run on it counts as interrupted


def main() -> int:
    """Run the task that the command line names, and return the exit code."""
    make_files_private()
    stop = StopFlag()
    emit = json_line_writer(redirect_stdout(), on_closed=detach)
    listen(stop)
    if (parent := parent_pid()) is not None:
        watch_parent(parent, on_death=detach)
    log = structlog.get_logger(__name__)
    try:
        logs.configure(Settings().log_level)
        task_file, patience_s = _parse(sys.argv[1:])
        task = _read_task(task_file)
        structlog.contextvars.bind_contextvars(job_id=task.job_id)
        require_ray()
        from peft_core.cluster.attachment import run  # noqa: PLC0415 -- imports Ray

        return run(task, emit, stop, patience_s=patience_s)
    except Cancelled:
        log.info("stopped")
        return CANCELLED_EXIT_CODE
    except Interrupted as interruption:
        log.warning("interrupted", reason=str(interruption))
        emit(JobInterrupted(reason=str(interruption)))
        return INTERRUPTED_EXIT_CODE
    except Exception as error:  # the edge of the process: the runner reads the error as an event
        log.exception("failed")
        emit(JobFailed(error=error_info(error, TASK)))
        return 1


def listen(stop: StopFlag) -> None:
    """Take the signals. Ray replaces the handlers when it connects, so this is called again afterwards."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.request())
    signal.signal(signal.SIGHUP, lambda _number, _frame: detach())


def detach() -> None:
    """End this process immediately. Every file that it writes is renamed when it is complete, so nothing is left half done."""
    os._exit(DETACHED_EXIT_CODE)


def _parse(arguments: list[str]) -> tuple[Path, float]:
    parser = argparse.ArgumentParser(prog="python -m peft_core.cluster.bridge")
    parser.add_argument("task_file", type=Path, help="a TrainingTask as JSON")
    parser.add_argument(
        "--patience", type=float, default=PATIENCE_S, help="seconds for which the cluster may be unreachable"
    )
    parsed = parser.parse_args(arguments)
    return parsed.task_file, parsed.patience


def _read_task(file: Path) -> TrainingTask:
    try:
        task = TrainingTask.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise InvalidArgument(str(file), "its content", f"must be a TrainingTask as JSON ({error})") from error
    if task.request.cluster is None or task.kind != "train":
        raise InvalidArgument(str(file), "request.cluster", "must be set, for a training")
    return task


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # Ray's threads would delay the end of a process whose cluster is gone
