"""The git hook that has a project checked after each commit, and the lines for cron and launchd that do so at intervals.

A hook that exists keeps its lines: ours are a block between two marks, directly below the first line, because an `exit` or
`exec` further down would skip them. They start a process in the background and change nothing for the lines that follow.
"""

from __future__ import annotations

import os
import plistlib
import re
import shlex
import stat
import sys
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from peft_core.data.git import hooks_directory
from peft_core.errors import HeaderError, InvalidArgument, StorageError, unwritable
from peft_core.system.child_process import python_module
from peft_core.system.files import atomic_write, read_small

HOOK = "post-commit"
MAX_BYTES = 1 << 20
_SHELLS = re.compile(rb"#! ?(/usr)?(/local)?/bin/(env )?(ba|da|k|z|a)?sh\b")
_DATA_DIR = "CODEBASE_GARDENER_DATA_DIR"
_KEPT_SETTINGS = (_DATA_DIR, "CODEBASE_GARDENER_ALLOWED_ROOTS")
_NEW = b"#!/bin/sh\n"


@dataclass(frozen=True)
class HookChange:
    """A change to a hook's file that has not been made yet."""

    path: Path
    before: bytes | None  # None: there is no such file
    after: bytes | None  # None: the file is deleted
    is_shared: bool  # the file lies outside of the repository, so that git may run it for others, too

    @property
    def is_nothing(self) -> bool:
        return self.before == self.after

    def apply(self) -> None:
        """Write the file.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            if self.after is None:
                self.path.unlink(missing_ok=True)
                return
            self.path.parent.mkdir(parents=True, exist_ok=True)
            mode = 0o755 if self.before is None else stat.S_IMODE(self.path.stat().st_mode)
            atomic_write(self.path, self.after, mode=mode)
        except OSError as error:
            raise StorageError(
                f"The hook {self.path} cannot be written: {error.strerror or error}.", code="hook_unwritable"
            ) from unwritable(self.path.parent, error)


def plan_hook(source: str, project_id: str, environment: Mapping[str, str]) -> HookChange:
    """Return the change that adds a project's lines to the hook of the repository at `source`, or brings them up to date.

    Raises:
        InvalidArgument: `source` is in no git repository, or its hook cannot be extended; the error has the line to add.
    """
    path, is_shared = _find(source)
    block = _block(project_id, environment)
    before = _read(path, block)
    if before is None:
        return HookChange(path, None, _NEW + block, is_shared)
    if not os.access(path, os.X_OK):
        raise _by_hand(path, "it is not executable, so git does not run it", block)
    if before.startswith(b"#!") and not _SHELLS.match(before):
        raise _by_hand(path, "it is not a shell script", block)
    marks = _marks(project_id)
    if _pattern(project_id).search(before):
        return HookChange(path, before, _pattern(project_id).sub(lambda _: block, before, count=1), is_shared)
    if any(mark in before for mark in marks):
        raise _by_hand(path, "the lines of this project were changed by hand; delete them first", block)
    first, rest = before.split(b"\n", 1) if before.startswith(b"#!") and b"\n" in before else (b"", before)
    head = first + b"\n" if first else b""
    return HookChange(path, before, head + block + rest, is_shared)


def plan_removal(source: str, project_id: str) -> HookChange:
    """Return the change that removes a project's lines from the hook. A file with nothing else is deleted.

    Raises:
        InvalidArgument: `source` is in no git repository, or its hook cannot be read.
    """
    path, is_shared = _find(source)
    before = _read(path, b"")
    after = None if before is None else _pattern(project_id).sub(b"", before)
    return HookChange(path, before, None if after is not None and after.strip() == _NEW.strip() else after, is_shared)


def schedule_lines(environment: Mapping[str, str]) -> str:
    """Return how cron and launchd check all projects every hour."""
    settings = "".join(f"{name}={shlex.quote(value)} " for name, value in _kept(environment).items())
    command = [*_program(), "refresh", "--if-due"]
    line = f"{settings}{shlex.join(command)}".replace("%", r"\%")  # cron would take it for a line break
    agent = {
        "Label": "peft-mcp.refresh",
        "ProgramArguments": command,
        "EnvironmentVariables": _kept(environment),
        "StartInterval": 3600,
    }
    return (
        "To check all projects every hour instead:\n"
        f"  cron (crontab -e): 17 * * * * {line}\n"
        "  launchd (~/Library/LaunchAgents/peft-mcp.refresh.plist, then launchctl load it):\n"
        + textwrap.indent(plistlib.dumps(agent, sort_keys=False).decode(), "    ").rstrip()
    )


def _find(source: str) -> tuple[Path, bool]:
    """Return the path of the hook for a project's source, and whether it lies outside of that repository."""
    root = Path(source)
    root = root if root.is_dir() else root.parent
    directory = hooks_directory(root) if root.is_dir() else None
    if directory is None:
        raise InvalidArgument(
            "source",
            source,
            "a hook needs a git repository with a work tree, and this is in none",
            suggestions=["Use cron or launchd: `peft-mcp refresh --if-due` checks all projects"],
        )
    resolved = Path(os.path.realpath(directory))
    is_inside = resolved.name == "hooks" and (resolved.parent / "HEAD").is_file()  # of a .git directory
    is_shared = not is_inside and not resolved.is_relative_to(os.path.realpath(root))
    return directory / HOOK, is_shared


def _read(path: Path, block: bytes) -> bytes | None:
    """Return a hook's content; None if there is no such file."""
    if not os.path.lexists(path):
        return None
    try:
        return read_small(path, MAX_BYTES)
    except HeaderError as error:
        raise _by_hand(path, error.problem, block) from error


def _by_hand(path: Path, problem: str, block: bytes) -> InvalidArgument:
    line = block.decode(errors="replace").splitlines()[1:2]
    return InvalidArgument(
        "hook",
        str(path),
        f"it was not changed: {problem}",
        suggestions=[f"Add this line to it by hand: {line[0]}"] if line else [],
    )


def _block(project_id: str, environment: Mapping[str, str]) -> bytes:
    settings = "".join(f"{name}={shlex.quote(value)} " for name, value in _kept(environment).items())
    begin, end = _marks(project_id)
    command = f"{settings}{shlex.join([*_program(), 'refresh', project_id, '--if-due'])}"
    return b"\n".join([begin, f"( {command} </dev/null >/dev/null 2>&1 & )".encode(), end, b""])


def _marks(project_id: str) -> tuple[bytes, bytes]:
    return f"# >>> peft-mcp {project_id} >>>".encode(), f"# <<< peft-mcp {project_id} <<<".encode()


def _pattern(project_id: str) -> re.Pattern[bytes]:
    begin, end = map(re.escape, _marks(project_id))
    return re.compile(rb"^" + begin + rb"\n[^\n]*\n" + end + rb"(\n|\Z)", re.MULTILINE)


def _kept(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the settings that the hook's environment may lack; a relative data directory is that of this process."""
    kept = {name: environment[name] for name in _KEPT_SETTINGS if environment.get(name, "").strip()}
    if (data_dir := kept.get(_DATA_DIR)) is not None and not data_dir.startswith("~"):
        kept[_DATA_DIR] = str(Path(data_dir).absolute())
    return kept


def _program() -> list[str]:
    script = Path(sys.executable).with_name("peft-mcp")
    return [str(script)] if os.access(script, os.X_OK) else python_module("server")
