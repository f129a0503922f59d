from __future__ import annotations

import stat
from pathlib import Path

import pytest

from peft_core.system.files import atomic_write, atomic_writer


def test_atomic_write_replaces_the_content_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    atomic_write(path, "old")
    atomic_write(path, "naïve")
    assert path.read_bytes() == "naïve".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_keeps_the_old_content_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "state"
    atomic_write(path, b"old")
    with pytest.raises(ZeroDivisionError), atomic_writer(path) as stream:
        stream.write(b"half of the new" * (1 // 0))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_next_write_overwrites_what_a_killed_process_left(tmp_path: Path) -> None:
    (tmp_path / ".state.tmp").write_bytes(b"half, and longer than the next content")
    atomic_write(tmp_path / "state", b"new")
    assert (tmp_path / "state").read_bytes() == b"new"
    assert not (tmp_path / ".state.tmp").exists()


def test_atomic_write_sets_the_mode_whatever_the_umask(tmp_path: Path) -> None:
    atomic_write(tmp_path / "secret", b"x", mode=0o600)
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
