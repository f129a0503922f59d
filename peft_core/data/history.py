"""When files were last changed, as git's history tells: what a split by time is made of."""

from __future__ import annotations

import os
from pathlib import Path

from peft_core.data import git
from peft_core.errors import DataError

_BY_FILE = "Or set config.held_out_by = 'file', which needs no history"


def require_history(root: Path) -> None:
    """Refuse early what `last_changes` would refuse.

    Raises:
        DataError: 'no_history', 'shallow_history'.
    """
    if git.state(root)[0] is None:
        raise DataError(
            f"config.held_out_by = 'time' needs a git history, and {root} has none.",
            code="no_history",
            suggestions=("Give the directory of a git repository with commits", _BY_FILE),
        )
    if git.is_shallow(root):
        raise DataError(
            f"The git history of {root} is shallow: it was cut off when it was cloned, and most files seem to be changed last "
            "where it begins.",
            code="shallow_history",
            suggestions=(f"Run `git -C {root} fetch --unshallow`", _BY_FILE),
        )


def last_changes(root: Path) -> dict[str, int]:
    """Seconds since the epoch of the latest commit that touched a file; files without any were never committed.

    Raises:
        DataError: 'no_history', 'shallow_history'; or all files are of one time.
    """
    require_history(root)
    changes = git.last_changes(root)
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
