"""Delete temporary files that killed processes left behind."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from peft_core.paths import DataPaths

FREED = ".freed."  # the beginning of the names of what is being deleted (storage/)
LEFT_BEHIND_INSPECTION_S = 3_600.0  # an inspection takes minutes


def prune_inspections(paths: DataPaths) -> None:
    """Delete temporary files of inspections whose process was killed. Safe to call without a lock."""
    remove_older(paths.inspections.glob("*"), LEFT_BEHIND_INSPECTION_S)


def remove_older(paths: Iterable[Path], seconds: float) -> None:
    """Delete files and directories that were last changed more than `seconds` ago; errors are ignored."""
    now = time.time()
    for path in paths:
        with suppress(OSError):
            if now - path.lstat().st_mtime > seconds:
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)
