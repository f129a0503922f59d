"""Wait for the end of a job. Ctrl-C ends the waiting, not the job."""

from __future__ import annotations

import shlex
import signal
from dataclasses import dataclass

import anyio
from anyio.abc import TaskStatus

from peft_core.manager import PEFTManager
from peft_core.schemas.results import NextStep, Status, TrainingStatus
from server.cli import exit_codes
from server.cli.terminal import Terminal, with_commands
from server.status_text import summarise


@dataclass(frozen=True)
class Followed:
    """The last known state of a job, and whether Ctrl-C ended the waiting."""

    status: TrainingStatus
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        if self.interrupted and not self.status.status.is_final:
            return exit_codes.LEFT_RUNNING
        return exit_codes.DONE if self.status.status is Status.COMPLETED else exit_codes.NO_RESULT


async def follow(manager: PEFTManager, job: TrainingStatus, terminal: Terminal) -> Followed:
    """Show the progress of a job until it ends or Ctrl-C is pressed.

    Raises:
        PeftMcpError: its state cannot be read; the job is not affected.
    """
    latest, interrupted = job, False

    async def end_at_ctrl_c(*, task_status: TaskStatus[None]) -> None:
        nonlocal interrupted
        with anyio.open_signal_receiver(signal.SIGINT) as signals:
            task_status.started()
            async for _ in signals:
                interrupted = True
                group.cancel_scope.cancel()

    try:
        with terminal.progress() as show:
            async with anyio.create_task_group() as group:
                await group.start(end_at_ctrl_c)
                async for latest in manager.watch_training(job.project_id, job.job_id):
                    show(latest)
                group.cancel_scope.cancel()
    except ExceptionGroup as error:  # the task group wraps even a single error
        raise error.exceptions[0] from error
    return Followed(latest, interrupted)


async def follow_all(manager: PEFTManager, job: TrainingStatus, terminal: Terminal) -> Followed:
    """Do as `follow`; of a sweep, follow each run until all have ended, and return the best one.

    Raises:
        PeftMcpError: as for `follow`.
    """
    followed = await follow(manager, job, terminal)
    while followed.status.sweep is not None and not followed.interrupted:
        shown = await manager.get_training_status(job.project_id)
        if shown.sweep is None or job.job_id not in {run.job_id for run in shown.sweep.runs}:
            break  # of a newer training
        if shown.sweep.is_complete:
            return Followed(shown)
        followed = await follow(manager, shown, terminal)
    return followed


def report(status: TrainingStatus, terminal: Terminal, *, is_new: bool = False) -> None:
    """Print the state of a job, and what to do next."""
    terminal.result(status, summarise(status, is_new=is_new))
    if text := advice(status):
        terminal.note(text)


def advice(status: TrainingStatus) -> str:
    """Return what to do next, as commands."""
    if status.job_id is not None and not status.status.is_final:
        if status.cancel_requested:
            return f"It is stopping. Look again: peft-mcp status {_job(status)}"
        return (
            f"The {status.kind} runs in the background. Follow it: peft-mcp status {_job(status)} --wait\n"
            f"Stop it: peft-mcp cancel {_job(status)}"
        )
    if status.next_step is None:
        return ""
    step = status.next_step
    command = _command(step, status)
    reason = with_commands(step.reason.replace("get_adapter_info", "the report"))
    return "\n".join(filter(None, [reason, command]))


def _command(step: NextStep, status: TrainingStatus) -> str:
    given = [step.arguments[name] for name in ("adapter_path", "adapter_a", "adapter_b") if name in step.arguments]
    adapters = " ".join(map(shlex.quote, given))
    commands = {
        "train_adapter": f"Train: peft-mcp train PATH --project {status.project_id}",
        "evaluate_adapter": f"Evaluate: peft-mcp evaluate {adapters} PATH",
        "compare_adapters": f"Compare: peft-mcp compare {adapters} PATH",
        "refresh_project": f"Run it now: peft-mcp refresh {status.project_id}",
        "resume_training": f"Resume: peft-mcp resume {_job(status)}",
        "load_adapter": "`peft-mcp serve` answers editors with each project's current adapter; "
        "an assistant calls load_adapter.",
    }
    return commands.get(step.tool, "")


def _job(status: TrainingStatus) -> str:
    """Return the arguments that name a job: a project alone means its latest training."""
    return f"{status.project_id} --job {status.job_id}"
