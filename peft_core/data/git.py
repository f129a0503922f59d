"""What git knows about a directory, asked without letting the repository run anything.

A repository's own configuration can name programs (fsmonitor, hooks, content filters, transports). It may come from
anywhere, so each of those is switched off before git looks at a file.
"""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from peft_core.errors import DataError

TIMEOUT_S = 20.0
MAX_OUTPUT_BYTES = 128 << 20  # half a million names, each twice as long as names are
_SAFE = (
    "-c", "core.fsmonitor=false",
    "-c", "core.hooksPath=/dev/null",
    "-c", "protocol.allow=never",
)  # fmt: skip


def listed_files(root: Path) -> list[str] | None:
    """Tracked and new files below root, ignored ones left out; None where git has nothing to say about root."""
    output = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if not output:  # no work tree, not to be trusted, too slow, or a directory that is itself ignored
        return None
    return sorted({os.fsdecode(name) for name in output.split(b"\0") if name})


def head_state(root: Path) -> tuple[str | None, bool | None]:
    """Commit of HEAD, and whether anything below root differs from it; None where it cannot be told."""
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")
    if not commit:
        return None, None
    without_filters = _no_filters(root)
    if without_filters is None:
        return commit.decode().strip(), None
    status = _git(root, *without_filters, "status", "--porcelain", "-z", "--ignore-submodules=all", "--", ".")
    return commit.decode().strip(), None if status is None else bool(status)


def is_shallow(root: Path) -> bool:
    return _git(root, "rev-parse", "--is-shallow-repository") == b"true\n"


def commit_times(root: Path) -> dict[str, int] | None:
    """Of files below root, when the latest commit that changed them was made; None where git does not tell."""
    wanted = ("--no-show-signature", "--no-renames", "--name-only", "-z", "--relative", "--format=%x01%ct")
    output = _git(root, "log", *wanted, "HEAD", "--", ".")
    if output is None:
        return None
    changes: dict[str, int] = {}
    at = 0
    for part in output.split(b"\0"):  # "\x01TIME", then the files of a commit, the first behind a line end
        if part.startswith(b"\x01") and part[1:].isdigit():
            at = int(part[1:])
        elif name := os.fsdecode(part.removeprefix(b"\n")):
            changes.setdefault(name, at)
    return changes


def _no_filters(root: Path) -> list[str] | None:
    """Options that empty every content filter which `status` would otherwise run on changed files."""
    names = _git(root, "config", "--name-only", "-z", "--get-regexp", r"^filter\.", accept=(0, 1))
    if names is None:
        return None
    options: list[str] = []
    for name in {os.fsdecode(name) for name in names.split(b"\0") if name}:
        if "=" in name:  # `-c` could not express it
            return None
        value = "false" if name.endswith(".required") else ""
        options += ["-c", f"{name}={value}"]
    return options


def _git(root: Path, *arguments: str, accept: Sequence[int] = (0,)) -> bytes | None:
    program = shutil.which("git")
    if program is None:
        return None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}
    # Overrides what the repository allows protocol by protocol; an older git would fetch missing objects, too.
    environment["GIT_ALLOW_PROTOCOL"] = "none"
    try:
        process = subprocess.Popen(  # noqa: S603 - a fixed program and our own arguments
            [program, *_SAFE, "-C", os.fspath(root), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    with process:
        output = _bounded_output(process, time.monotonic() + TIMEOUT_S)
        if output is None:
            process.kill()
    return output if process.returncode in accept else None


def _bounded_output(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """What it writes until it ends; None where that takes too long, or is too much."""
    assert process.stdout is not None  # noqa: S101 - asked for as a pipe
    output = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0 and len(output) <= MAX_OUTPUT_BYTES:
            if not selector.select(left):
                return None
            piece = os.read(process.stdout.fileno(), 1 << 20)
            if not piece:
                return bytes(output)
            output += piece
    return None


# FOLDED FROM peft_core.data.git: When files were last changed, as git's history tells: what a split by time is made of.

_BY_FILE = "Or set config.held_out_by = 'file', which needs no history"


def require_history(root: Path) -> None:
    """Refuse early what `last_changes` would refuse.

    Raises:
        DataError: 'no_history', 'shallow_history'.
    """
    if head_state(root)[0] is None:
        raise DataError(
            f"config.held_out_by = 'time' needs a git history, and {root} has none.",
            code="no_history",
            suggestions=("Give the directory of a git repository with commits", _BY_FILE),
        )
    if is_shallow(root):
        raise DataError(
            f"The git history of {root} is shallow: it was cut off when it was cloned, and most files seem to be changed last "
            "where it begins.",
            code="shallow_history",
            suggestions=(f"Run `git -C {root} fetch --unshallow`", _BY_FILE),
        )


def last_change_times(root: Path) -> dict[str, int]:
    """Seconds since the epoch of the latest commit that touched a file; files without any were never committed.

    Raises:
        DataError: 'no_history', 'shallow_history'; or all files are of one time.
    """
    require_history(root)
    changes = commit_times(root)
    # History tells of files that are gone as well, and their times tell nobody apart.
    there = {name: at for name, at in (changes or {}).items() if os.path.lexists(root / name)}
    if len(set(there.values())) < 2:
        raise DataError(
            f"config.held_out_by = 'time' cannot tell files of {root} apart: "
            + ("git did not answer in time." if changes is None else "one commit was the last to change all of them."),
            code="no_history",
            suggestions=(_BY_FILE,),
        )
    return there
