"""The command refresh: bring projects up to date, say when to do so by itself, and the git hook."""

from __future__ import annotations

import os
from argparse import Namespace

from anyio.to_thread import run_sync
from pydantic import ValidationError

from peft_core.errors import InvalidArgument, PeftMcpError, StorageError
from peft_core.manager import PEFTManager
from peft_core.projects.hook import HookChange, plan_hook, plan_removal, schedule_lines
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.project import Refreshed, Registration, RetrainThreshold, RetrainWhen
from server.cli import exit_codes
from server.cli.jobs import wait_unless
from server.cli.terminal import Terminal, with_commands
from server.status_text import summarise_refresh


class RefreshedProjects(FrozenModel):
    """What `refresh` prints of several projects."""

    projects: list[Refreshed]


class HookResult(FrozenModel):
    """What became of the hook of one project."""

    project_id: str
    hook: str
    changed: bool


class Hooks(FrozenModel):
    """What `--install-hook` and `--remove-hook` print."""

    hooks: list[HookResult]


async def refresh(manager: PEFTManager, options: Namespace, terminal: Terminal) -> int:
    named: list[str] | None = options.projects or None
    if options.install_hook or options.remove_hook:
        return await _change_hooks(manager, named, options, terminal)
    if options.if_due and options.retrain_when is None:
        return _show(await manager.refresh_due(named), terminal)
    rule = None if options.retrain_when is None else rule_of(options.retrain_when)
    projects = [entry.project_id for entry in await manager.registered_projects(named)]
    if len(projects) != 1:
        return _show([await _refresh_one_of_many(manager, project, rule) for project in projects], terminal)
    refreshed = await manager.refresh_project(projects[0], rule)
    if rule is not None or refreshed.job is None:
        return _show([refreshed], terminal)
    return await wait_unless(options, manager, refreshed.job, terminal)


async def _refresh_one_of_many(manager: PEFTManager, project: str, rule: RetrainWhen | None) -> Refreshed:
    """Refresh a project; one that cannot be refreshed must not keep the others from it."""
    try:
        return await manager.refresh_project(project, rule)
    except PeftMcpError as error:
        (entry,) = await manager.registered_projects([project])
        return Refreshed(
            project_id=project,
            outcome="not_possible",
            reason=str(error),
            retrain_when=entry.retrain_when,
            source=entry.source,
        )


def rule_of(text: str) -> RetrainWhen:
    """Return the rule that the option names: never, units=10 or commits=20.

    Raises:
        InvalidArgument: it is none.
    """
    if text.strip() == "never":
        return "never"
    name, _, number = text.strip().partition("=")
    try:
        return RetrainThreshold.model_validate({name: number.removesuffix("%")})
    except ValidationError as error:
        allowed = "must be never, units=N (percent of the code units that have changed, from 1 to 100) or commits=N"
        raise InvalidArgument("--retrain-when", text, allowed) from error


def _show(results: list[Refreshed], terminal: Terminal) -> int:
    text = "\n".join(with_commands(summarise_refresh(refreshed)) for refreshed in results)
    terminal.result(RefreshedProjects(projects=results), text or "No project is registered for this.")
    failed = any(refreshed.outcome == "not_possible" for refreshed in results)
    return exit_codes.REFUSED if failed else exit_codes.DONE


async def _change_hooks(manager: PEFTManager, named: list[str] | None, options: Namespace, terminal: Terminal) -> int:
    results, refused = [], False
    for registration in await manager.registered_projects(named):
        plan = _plan_hook if options.install_hook else _plan_removal
        try:
            change = await run_sync(plan, registration)
            agreed = change.is_nothing or options.yes or terminal.confirm(_question(registration, change))
            if agreed and not change.is_nothing:
                change.apply()
        except (InvalidArgument, StorageError) as error:
            if named is not None:
                raise
            terminal.note(f"{registration.project_id}: {error.message}")
            refused = refused or isinstance(error, StorageError)
            continue
        refused = refused or not agreed
        terminal.note(_hook_note(registration, change, agreed=agreed))
        results.append(
            HookResult(
                project_id=registration.project_id,
                hook=str(change.path),
                changed=agreed and not change.is_nothing,
            )
        )
    if options.install_hook:
        terminal.note(schedule_lines(os.environ))
    changed = [result.hook for result in results if result.changed]
    terminal.result(Hooks(hooks=results), "\n".join(f"Changed: {path}" for path in changed) or "No hook was changed.")
    return exit_codes.REFUSED if refused else exit_codes.DONE


def _plan_hook(registration: Registration) -> HookChange:
    return plan_hook(_source(registration), registration.project_id, os.environ)


def _plan_removal(registration: Registration) -> HookChange:
    return plan_removal(_source(registration), registration.project_id)


def _source(registration: Registration) -> str:
    if registration.source is None:
        raise InvalidArgument("project", registration.project_id, "it was trained on records, not on a repository")
    return registration.source


def _question(registration: Registration, change: HookChange) -> str:
    shared = (
        " That file is outside of the repository, so other repositories may use it as well." if change.is_shared else ""
    )
    if change.before is None or (change.after or b"").count(b"\n") > change.before.count(b"\n"):
        what = f"check project {registration.project_id} after each commit, by a line in {change.path}"
    else:
        what = f"change the lines of project {registration.project_id} in {change.path}"
    return f"Shall peft-mcp {what}?{shared}"


def _hook_note(registration: Registration, change: HookChange, *, agreed: bool) -> str:
    project = registration.project_id
    if not agreed:
        return f"{project}: {change.path} was not changed. Without a terminal, give --yes."
    if change.is_nothing:
        return f"{project}: {change.path} has nothing to change."
    rule = "" if registration.retrain_when != "never" or not _installs(change) else _set_a_rule(project)
    return f"{project}: {change.path} was changed.{rule}"


def _installs(change: HookChange) -> bool:
    return change.after is not None and b"--if-due" in change.after


def _set_a_rule(project: str) -> str:
    return f" It has an effect once the project has a rule: peft-mcp refresh {project} --retrain-when units=10"
