"""The commands about trainings and evaluations: train, status, evaluate, compare, cancel, resume."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft_core.errors import InvalidArgument
from peft_core.manager import PEFTManager
from peft_core.schemas.evaluation import Verdict
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import JobSummary, TrainingStatus
from peft_core.schemas.training import project_id_from
from peft_core.system.durations import rough_age
from peft_core.system.user_paths import user_path
from server.cli import exit_codes
from server.cli.follow import Followed, follow, follow_all, report
from server.cli.terminal import Terminal, table
from server.status_text import headline, summarise

MAX_JOBS = 20  # that `status` lists
_FROM_BEST = (Verdict.HELPS, Verdict.NO_DIFFERENCE, Verdict.HARMS)


class NewestJobs(FrozenModel):
    """What `status` without a project prints."""

    jobs: list[JobSummary]


async def train(manager: PEFTManager, options: Namespace, terminal: Terminal) -> int:
    config = training_config(options)
    project = options.project or project_of(options.path)
    status = await manager.train_adapter(project, options.path, config)
    return await wait_unless(options, manager, status, terminal)


async def evaluate(manager: PEFTManager, options: Namespace, terminal: Terminal) -> int:
    demanded = options.fail_unless
    if demanded and options.no_wait:
        raise InvalidArgument("--fail-unless", demanded, "the verdict is known at the end only; omit --no-wait")
    status = await manager.evaluate_adapter(
        _adapter(options.adapter),
        options.path,
        options.base_model,
        config=_given(include=options.include, exclude=options.exclude),
        accept_unproven_base=options.accept_unproven_base,
    )
    return await wait_unless(options, manager, status, terminal, None if demanded is None else Verdict(demanded))


async def compare(manager: PEFTManager, options: Namespace, terminal: Terminal) -> int:
    status = await manager.compare_adapters(
        _adapter(options.adapter_a),
        _adapter(options.adapter_b),
        options.path,
        options.base_model,
        config=_given(include=options.include, exclude=options.exclude),
        accept_unproven_base=options.accept_unproven_base,
    )
    return await wait_unless(options, manager, status, terminal)


async def show_status(manager: PEFTManager, options: Namespace, terminal: Terminal) -> int:
    if options.project is None:
        return await _list_jobs(manager, options, terminal)
    status = await manager.get_training_status(options.project, options.job)
    if options.wait and status.job_id is not None and not status.status.is_final:
        followed = await (follow if options.job else follow_all)(manager, status, terminal)
        report(followed.status, terminal)
        return followed.exit_code
    report(status, terminal)
    return Followed(status).exit_code if options.wait else exit_codes.DONE


async def cancel(manager: PEFTManager, options: Namespace, terminal: Terminal) -> int:
    report(await manager.cancel_training(options.project, options.job), terminal)
    return exit_codes.DONE


async def resume(manager: PEFTManager, options: Namespace, terminal: Terminal) -> int:
    job_id = (await manager.get_training_status(options.project, options.job)).job_id
    if job_id is None:
        raise InvalidArgument("project", options.project, "it has no training to resume")
    status = await manager.resume_training(job_id)
    return await wait_unless(options, manager, status, terminal)


def project_of(path: str) -> str:
    """Return a project id for training data: the name of the directory or file, with '-' for what an id may not contain.

    Raises:
        InvalidArgument: nothing of the name can be used.
    """
    try:
        data = user_path(path).absolute()
    except RuntimeError as error:
        raise InvalidArgument("path", path, "the home directory that it names is unknown") from error
    name = Path(os.path.normpath(data)).name  # the name of "." is that of the working directory
    name = name if os.path.isdir(data) else name.partition(".")[0]  # noqa: PTH112 -- Path.is_dir raises for a name that is too long
    project = project_id_from(name)
    if not project:
        raise InvalidArgument("path", path, "its name has no letter or digit for a project id; give --project ID")
    return project


async def wait_unless(
    options: Namespace,
    manager: PEFTManager,
    queued: TrainingStatus,
    terminal: Terminal,
    demanded: Verdict | None = None,
) -> int:
    """Follow a job that was just queued, print how it ended, and return the exit code; with --no-wait, print that it is queued.

    `demanded`: the worst verdict with which the command succeeds.
    """
    if options.no_wait:
        report(queued, terminal, is_new=True)
        return exit_codes.DONE
    terminal.note(summarise(queued, is_new=True))
    followed = await follow_all(manager, queued, terminal)
    report(followed.status, terminal)
    if demanded is not None and followed.exit_code == exit_codes.DONE:
        return judge(followed.status, demanded, terminal)
    return followed.exit_code


def judge(status: TrainingStatus, demanded: Verdict, terminal: Terminal) -> int:
    """Return the exit code for the verdict of a completed evaluation, and say why if it is not 0."""
    verdict = status.evaluation.verdict if status.evaluation else None
    if verdict is not None and _FROM_BEST.index(verdict) <= _FROM_BEST.index(demanded):
        return exit_codes.DONE
    terminal.note(f"peft-mcp: the verdict is {verdict or 'missing'}, but --fail-unless demands {demanded}.")
    return exit_codes.NO


async def _list_jobs(manager: PEFTManager, options: Namespace, terminal: Terminal) -> int:
    if options.job or options.wait:
        raise InvalidArgument("project", None, "it is required with --job and --wait")
    await manager.ensure_runner()  # it records dead jobs
    jobs = await manager.newest_jobs(MAX_JOBS)
    now = datetime.now(UTC).timestamp()
    rows = [
        (
            job.project_id,
            job.job_id,
            job.kind,
            headline(await manager.get_job(job.job_id)),
            f"{rough_age(now - job.created_at)} ago",
        )
        for job in jobs
    ]
    text = table(("PROJECT", "JOB", "KIND", "STATE", "QUEUED"), rows) if rows else "Nothing was trained here yet."
    terminal.result(NewestJobs(jobs=jobs), text)
    return exit_codes.DONE


def training_config(options: Namespace) -> dict[str, Any]:
    """Return the training's settings: those of --config, and the options, which win."""
    try:
        config = json.loads(options.config or "{}")
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("--config", options.config, f"must be a JSON object: {error}") from error
    if not isinstance(config, dict):
        raise InvalidArgument("--config", options.config, "must be a JSON object, such as '{\"rank\": 8}'")
    return config | _given(
        base_model=options.base_model,
        max_steps=options.max_steps,
        num_epochs=options.epochs,
        include=options.include,
        exclude=options.exclude,
    )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _adapter(text: str) -> str:
    """Return a relative path of an adapter's directory as an absolute one; names stay as they are."""
    is_path = os.sep in text or text.startswith(".")
    return str(Path(text).absolute()) if is_path and os.path.isdir(text) else text  # noqa: PTH112 -- as above
