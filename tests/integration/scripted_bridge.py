"""A bridge that follows a script, for tests of how the runner follows jobs on a cluster.

It is a real process that uses the real protocol. The remote run is the file `remote.jsonl` in the job's directory: the events
that a cluster has emitted so far, which the tests extend while no bridge is alive, too. The project id of the task selects the
script.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from peft_core.schemas.events import EVENT, Event, JobInterrupted, PhaseStarted
from peft_core.schemas.results import Phase
from peft_core.schemas.task import TrainingTask
from peft_core.system.cancellation import CANCELLED_EXIT_CODE, DETACHED_EXIT_CODE, INTERRUPTED_EXIT_CODE
from peft_core.system.child_process import PARENT_VARIABLE
from tests.integration.scripted_worker import emit

REMOTE, STARTS, CANCELLED = "remote.jsonl", "starts", "cancelled"
OUT_OF_REACH = "The cluster does not answer. The training may continue there."


def extend_remote_run(job_dir: Path, *events: Event) -> None:
    """Let the remote run of a job emit these events."""
    job_dir.mkdir(parents=True, exist_ok=True)
    with (job_dir / REMOTE).open("a") as remote:
        remote.writelines(EVENT.dump_json(event).decode() + "\n" for event in events)


def main() -> None:
    task = TrainingTask.model_validate_json(Path(sys.argv[1]).read_text())
    received: list[int] = []
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: received.append(number))
    with (task.job_dir / STARTS).open("a") as starts:
        starts.write("x")
    if task.project_id == "dies at its start":
        os.kill(os.getpid(), signal.SIGKILL)
    emit(PhaseStarted(phase=Phase.STARTING, detail="connecting"))
    follow(task, received)
    if signal.SIGTERM in received and task.project_id == "out of reach":
        emit(JobInterrupted(reason=OUT_OF_REACH))
        sys.exit(INTERRUPTED_EXIT_CODE)
    if signal.SIGTERM in received:
        (task.job_dir / CANCELLED).touch()
        sys.exit(CANCELLED_EXIT_CODE)
    sys.exit(DETACHED_EXIT_CODE)


def follow(task: TrainingTask, received: list[int]) -> None:
    """Emit what the remote run emits until a signal arrives, the parent dies, or the remote run has ended."""
    parent, sent = int(os.environ[PARENT_VARIABLE]), 0
    while not received and os.getppid() == parent:
        text = (task.job_dir / REMOTE).read_text() if (task.job_dir / REMOTE).exists() else ""
        complete = text[: text.rfind("\n") + 1].splitlines()
        for line in complete[sent:]:
            emit(event := EVENT.validate_json(line))
            if event.kind in ("job_failed", "job_interrupted"):
                sys.exit(1)
        sent = len(complete)
        time.sleep(0.02)


if __name__ == "__main__":
    main()
