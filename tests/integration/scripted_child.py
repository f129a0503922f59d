"""A training child that follows a script, for tests of what the runner makes of its ways to end.

It speaks the real wire (the file of a TrainingTask in, events out) in a real process; only the training is left out.
What it does is chosen by the project id of its task.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from peft_core.schemas.events import (
    EVENT,
    AdapterWritten,
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
from tests.factories import make_evaluation


def say(event: Event) -> None:
    sys.stdout.write(EVENT.dump_json(event).decode() + "\n")
    sys.stdout.flush()


def step_completed(step: int) -> StepCompleted:
    return StepCompleted(
        step=step,
        loss=2.0,
        learning_rate=1e-3,
        tokens=step,
        tokens_per_second=1.0,
        eta_s=1.0,
        memory_bytes=1,
    )


def train(steps: int, *, after: int = 0) -> None:
    say(PhaseStarted(phase=Phase.TRAINING))
    say(RunPlanned(device="cpu", total_steps=1000, start_step=after))
    for step in range(after + 1, after + steps + 1):
        say(step_completed(step))


def main() -> None:  # noqa: PLR0912 -- one end a case
    task = TrainingTask.model_validate_json(Path(sys.argv[1]).read_text())
    match task.project_id:
        case "fails":
            say(JobFailed(error=ErrorInfo(code="no_luck", message="No luck today.", suggestions=("Try tomorrow",))))
            sys.exit(1)
        case "crashes":
            print("something odd on stderr", file=sys.stderr)
            os.kill(os.getpid(), signal.SIGSEGV)
        case "killed":
            train(3)
            os.kill(os.getpid(), signal.SIGKILL)
        case "goes on":  # from step 4, of which the last two were told to a runner that was dead
            for step in (1, 2, 3, 4):
                say(step_completed(step))
            train(2, after=4)
            sys.exit(143)
        case "silent":
            train(2)  # ends well, but without an adapter
        case "asked to stop":  # by somebody else than the runner: a shutdown, a user's kill
            train(2)
            sys.exit(143)
        case "babbles":
            sys.stdout.write("not json\n{}\n" + "x" * 5000 + "\n")
            say(JobFailed(error=ErrorInfo(code="after_babble", message="Understood all the same.")))
            sys.exit(1)
        case "never ends a line":
            train(1)
            sys.stdout.write("x" * (2 << 20))
            sys.stdout.flush()
            wait_for_the_parent_to_die()
        case "lies":
            say(AdapterWritten(metrics=Metrics()))  # there is no adapter
        case "evaluates":
            say(Evaluated(evaluation=make_evaluation()))
        case "hangs":
            train(1)
            wait_for_the_parent_to_die()
        case "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            train(1)
            wait_for_the_parent_to_die()


def wait_for_the_parent_to_die() -> None:
    parent = int(os.environ[PARENT_VARIABLE])
    while os.getppid() == parent:
        time.sleep(0.02)


if __name__ == "__main__":
    main()
