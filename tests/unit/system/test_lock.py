from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peft_core.errors import StorageError
from peft_core.system.lock import FileLock


def test_a_lock_is_held_by_one_owner_at_a_time_and_released_at_the_end_of_the_block(tmp_path: Path) -> None:
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    with first:
        assert first.acquire()
        assert not second.acquire()
    with second:
        assert second.acquire()


def test_a_lock_stays_held_until_the_child_that_inherited_it_is_gone(tmp_path: Path) -> None:
    lock, other = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert lock.acquire()
    command = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[lock.descriptor]) as child:
        lock.release()
        assert not other.acquire()
        child.kill()
    with other:
        assert other.acquire(timeout_s=10)


def test_a_lock_is_not_current_once_its_directory_was_removed(tmp_path: Path) -> None:
    path = tmp_path / "data" / "lock"
    path.parent.mkdir()
    with FileLock(path) as lock:
        assert lock.acquire()
        assert lock.is_current
        path.unlink()
        assert not lock.is_current
        path.touch()  # another process made a new one
        assert not lock.is_current


def test_a_lock_in_a_missing_directory_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        FileLock(tmp_path / "missing" / "lock").acquire()
