"""Ask git about a directory without letting the repository run anything.

In: a directory. Out: file names, the commit, and commit times, or None if git has no answer.

The git program is called directly instead of through a library (GitPython calls it as well) because the repository is not
trusted: its configuration can name programs (fsmonitor, hooks, content filters, transports), and each of them is disabled
before git looks at a file. Run time and output are bounded.
"""

from __future__ import annotations

import os
import selectors
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from peft_core.data.exclusions import ExclusionReason
from peft_core.errors import DataError

TIMEOUT_S = 20.0
MOMENT_S = 2.0  # for what a request can do without
MAX_OUTPUT_BYTES = 128 << 20  # half a million names of twice the usual length
_SAFE_OPTIONS = (
    "-c", "core.fsmonitor=false",
    "-c", "core.hooksPath=/dev/null",
    "-c", "protocol.allow=never",
)  # fmt: skip

_UNUSUAL_TAGS = {b"S": ExclusionReason.NOT_CHECKED_OUT, b"M": ExclusionReason.UNMERGED}
_UNUSUAL_MODES = {b"160000": ExclusionReason.SUBMODULE, b"120000": ExclusionReason.SYMLINK}


def listed_files(root: Path) -> list[str] | None:
    """Return tracked and new files below root, without ignored ones; None if git has no answer about root."""
    output = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if not output:  # no work tree, an unsafe owner, too slow, or a directory that is itself ignored
        return None
    return sorted({os.fsdecode(name) for name in output.split(b"\0") if name})


def unusual_entries(root: Path) -> dict[str, ExclusionReason]:
    """Map names in git's index that are not ordinary files to the reason why they cannot be read as such.

    They are submodules, symbolic links (which may have been written as files), files outside of a sparse checkout, and files
    with a merge conflict.
    """
    output = _git(root, "ls-files", "-z", "--cached", "--stage", "-t") or b""
    found: dict[str, ExclusionReason] = {}
    for entry in output.split(b"\0"):  # "H 100644 HASH STAGE<tab>NAME"
        if entry.startswith(b"H 100"):
            continue
        state, _, name = entry.partition(b"\t")
        reason = _UNUSUAL_TAGS.get(state[:1]) or _UNUSUAL_MODES.get(state[2:8])
        if name and reason is not None:
            found[os.fsdecode(name)] = reason
    return found


def is_git_directory(root: Path) -> bool:
    """Return whether a directory is a bare repository, or the `.git` directory of another one."""
    return (root / "HEAD").is_file() and (root / "objects").is_dir() and (root / "refs").is_dir()


def has_commit(root: Path) -> bool:
    """Return whether a directory is in a git repository with a commit."""
    return bool(_head(root))


def _head(root: Path) -> bytes | None:
    return _git(root, "rev-parse", "--verify", "--quiet", "HEAD^{commit}")


def head_state(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit of HEAD, and whether anything below root differs from it; None for what is unknown."""
    commit = _head(root)
    if not commit:
        return None, None
    without_filters = _no_filters(root)
    if without_filters is None:
        return commit.decode().strip(), None
    status = _git(root, *without_filters, "status", "--porcelain", "-z", "--ignore-submodules=all", "--", ".")
    return commit.decode().strip(), None if status is None else bool(status)


def commits_since(root: Path, commit: str) -> int | None:
    """Return how many commits have changed something below root since `commit`, a complete hash in hexadecimal.

    None if the commit does not exist (any more), or is not in the history of HEAD: the history was rewritten, or another
    branch is checked out.
    """
    both = _git(root, "rev-list", "--count", "--left-right", f"{commit}...HEAD", "--", ".")
    if both is None:
        return None
    only_then, _, only_now = both.decode("ascii", "replace").partition("\t")
    return int(only_now) if only_then == "0" and only_now.strip().isdigit() else None


def first_commits(root: Path) -> list[str]:
    """Return the commits of HEAD's history that have no parent: they identify a repository wherever its copies lie.

    Empty without a history, for a shallow clone, and if the history is too long to be followed in a moment.
    """
    if is_shallow(root):
        return []
    output = _git(root, "rev-list", "--max-parents=0", "HEAD", timeout_s=MOMENT_S)
    return sorted(output.decode("ascii", "replace").split()) if output else []


def hooks_directory(root: Path) -> Path | None:
    """Return the directory whose hooks git runs for the repository of root; None if root is in no work tree.

    It is not always in the repository: core.hooksPath names another one. `rev-parse` reads the configuration and runs nothing.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if not top:
        return None
    work_tree = Path(os.fsdecode(top.removesuffix(b"\n")))
    # A relative core.hooksPath is relative to the top of the work tree.
    hooks = _git(work_tree, "rev-parse", "--git-path", "hooks", options=())
    return work_tree / os.fsdecode(hooks.removesuffix(b"\n")) if hooks else None


def is_shallow(root: Path) -> bool:
    return _git(root, "rev-parse", "--is-shallow-repository") == b"true\n"


def commit_times(root: Path) -> dict[str, int] | None:
    """Map files below root to the time of the latest commit that changed them; None if git has no answer."""
    options = ("--no-show-signature", "--no-renames", "--name-only", "-z", "--relative", "--format=%x01%ct")
    output = _git(root, "log", *options, "HEAD", "--", ".")
    if output is None:
        return None
    changes: dict[str, int] = {}
    committed_at = 0
    for part in output.split(b"\0"):  # "\x01TIME", then the files of a commit, the first after a line feed
        if part.startswith(b"\x01") and part[1:].isdigit():
            committed_at = int(part[1:])
        elif name := os.fsdecode(part.removeprefix(b"\n")):
            changes.setdefault(name, committed_at)
    return changes


def _no_filters(root: Path) -> list[str] | None:
    """Return options that disable every content filter, which `status` would run on changed files; None if it is impossible."""
    names = _git(root, "config", "--name-only", "-z", "--get-regexp", r"^filter\.", accept=(0, 1))
    if names is None:
        return None
    options: list[str] = []
    for name in {os.fsdecode(name) for name in names.split(b"\0") if name}:
        if "=" in name:  # `-c` cannot express such a name
            return None
        value = "false" if name.endswith(".required") else ""
        options += ["-c", f"{name}={value}"]
    return options


def _git(
    root: Path,
    *arguments: str,
    accept: Sequence[int] = (0,),
    timeout_s: float | None = None,  # None: TIMEOUT_S
    options: Sequence[str] = _SAFE_OPTIONS,
) -> bytes | None:
    program = shutil.which("git")
    if program is None:
        return None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"}
    # Overrides what the repository allows for single protocols; an older git would otherwise fetch missing objects.
    environment["GIT_ALLOW_PROTOCOL"] = "none"
    try:
        process = subprocess.Popen(  # noqa: S603 - a fixed program and fixed arguments
            [program, *options, "-C", os.fspath(root), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return None
    with process:
        output = _bounded_output(process, time.monotonic() + (TIMEOUT_S if timeout_s is None else timeout_s))
        if output is None:
            process.kill()
    return output if process.returncode in accept else None


def _bounded_output(process: subprocess.Popen[bytes], deadline: float) -> bytes | None:
    """Return all output of the process; None if it takes too long or exceeds the limit."""
    assert process.stdout is not None  # noqa: S101 - it was opened as a pipe
    output = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while (remaining_s := deadline - time.monotonic()) > 0 and len(output) <= MAX_OUTPUT_BYTES:
            if not selector.select(remaining_s):
                return None
            piece = os.read(process.stdout.fileno(), 1 << 20)
            if not piece:
                return bytes(output)
            output += piece
    return None


# Change times, for a split by time.

_HOLD_OUT_BY_FILE = "Or set config.held_out_by = 'file', which needs no history"


def require_history(root: Path) -> None:
    """Refuse a directory without a complete git history, before any work is done.

    Raises:
        DataError: 'no_history', 'shallow_history'.
    """
    if head_state(root)[0] is None:
        raise DataError(
            f"config.held_out_by = 'time' needs a git history, but {root} has none.",
            code="no_history",
            suggestions=("Give the directory of a git repository with commits", _HOLD_OUT_BY_FILE),
        )
    if is_shallow(root):
        raise DataError(
            f"config.held_out_by = 'time' needs the complete git history, but {root} is a shallow clone: most files seem "
            "to have been changed last by its first commit.",
            code="shallow_history",
            suggestions=(f"Run `git -C {root} fetch --unshallow`", _HOLD_OUT_BY_FILE),
        )


def last_change_times(roots: Sequence[Path]) -> list[dict[str, int]]:
    """Map the files of each root to the time (seconds since the epoch) of the latest commit that changed them.

    Files that were never committed are missing.

    Raises:
        DataError: 'no_history' (also if all files of all roots have one time), 'shallow_history'.
    """
    all_times = []
    for root in roots:
        require_history(root)
        changes = commit_times(root)
        if changes is None:
            raise _no_order([root], "git did not answer in time")
        # The history includes deleted files, whose times must not count.
        all_times.append({name: at for name, at in changes.items() if os.path.lexists(root / name)})
    if len({changed_at for times in all_times for changed_at in times.values()}) < 2:
        raise _no_order(roots, "a single commit was the last to change all of them")
    return all_times


def _no_order(roots: Sequence[Path], reason: str) -> DataError:
    return DataError(
        f"config.held_out_by = 'time' cannot order the files of {', '.join(map(str, roots))}: {reason}.",
        code="no_history",
        suggestions=(_HOLD_OUT_BY_FILE,),
    )
