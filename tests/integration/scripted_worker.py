"""A worker that follows a script, for tests of how the runner handles the ways in which a worker can end.

It is a real process that uses the real protocol (a file with a TrainingTask in, events out), but trains nothing. The project id
of its task selects the script.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from peft_core.schemas.events import (
    EVENT,
    AdaptersCompared,
    AdapterWritten,
    CheckpointSaved,
    Evaluated,
    Event,
    JobFailed,
    PhaseStarted,
    RunPlanned,
    StepCompleted,
)
from peft_core.schemas.results import ErrorInfo, Metrics, Phase
from peft_core.schemas.task import TrainingTask
from peft_core.system.child_process import PARENT_VARIABLE
from tests.factories import make_comparison, make_evaluation


def emit(event: Event) -> None:
    sys.stdout.write(EVENT.dump_json(event).decode() + "\n")
    sys.stdout.flush()


def step_completed(step: int) -> StepCompleted:
    return StepCompleted(
        step=step, loss=2.0, learning_rate=1e-3, tokens=step, tokens_per_second=1.0, eta_s=1.0, memory_bytes=1
    )


def train(steps: int, *, after: int = 0) -> None:
    emit(PhaseStarted(phase=Phase.TRAINING))
    emit(RunPlanned(device="cpu", total_steps=1000, start_step=after))
    for step in range(after + 1, after + steps + 1):
        emit(step_completed(step))


def main() -> None:  # noqa: PLR0912 -- one case per script
    task = TrainingTask.model_validate_json(Path(sys.argv[1]).read_text())
    match task.project_id:
        case "fails":
            emit(JobFailed(error=ErrorInfo(code="no_luck", message="No luck today.", suggestions=("Try tomorrow",))))
            sys.exit(1)
        case "crashes":
            print("something odd on stderr", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGSEGV)
        case "killed":
            train(3)
            os.kill(os.getpid(), signal.SIGKILL)
        case "resumes":  # from step 4; steps 3 and 4 were emitted when no runner was alive
            for step in (1, 2, 3, 4):
                emit(step_completed(step))
            train(2, after=4)
            sys.exit(143)
        case "silent":
            train(2)  # and exits with 0, but without an adapter
        case "asked to stop":  # not by the runner: at shutdown, or by the user
            train(2)
            sys.exit(143)
        case "prints noise":
            sys.stdout.write("not json\n{}\n" + "x" * 5000 + "\n")
            emit(JobFailed(error=ErrorInfo(code="after_babble", message="It was read after the noise.")))
            sys.exit(1)
        case "never ends a line":
            train(1)
            sys.stdout.write("x" * (2 << 20))
            sys.stdout.flush()
            wait_for_the_parent_to_die()
        case "reports a missing adapter":
            emit(AdapterWritten(metrics=Metrics()))
        case "evaluates":
            emit(Evaluated(evaluation=make_evaluation()))
        case "compares":
            emit(AdaptersCompared(comparison=make_comparison()))
        case "saves a checkpoint when stopped":
            checkpoint = Path(task.job_dir) / "steps"
            begun = int(checkpoint.read_text()) if checkpoint.exists() else 0
            stopped: list[int] = []
            signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
            train(3, after=begun)
            wait_for_the_parent_to_die(or_for=stopped)
            checkpoint.write_text(str(begun + 3))
            emit(CheckpointSaved(step=begun + 3))
            sys.exit(143)
        case "hangs":
            train(1)
            wait_for_the_parent_to_die()
        case "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            train(1)
            wait_for_the_parent_to_die()


def wait_for_the_parent_to_die(*, or_for: Sequence[int] = ()) -> None:
    parent = int(os.environ[PARENT_VARIABLE])
    while os.getppid() == parent and not or_for:
        time.sleep(0.02)


if __name__ == "__main__":
    main()
