"""An export is killed at several points: what is visible is an older export or the new one, and complete."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from peft_core.export.request import MANIFEST_NAME
from tests.survival.kill_points import EXPORT_WORKER, KillPoint

pytestmark = pytest.mark.survival

NAMES = sorted(["model.gguf", MANIFEST_NAME])


def export(root: Path, token: str, text: str) -> int:
    """Export in a process of its own; return its exit status."""
    command = [
        sys.executable,
        "-m",
        "tests.survival.export_worker",
        str(root / "out" / "x"),
        str(root / "lock"),
        token,
        text,
    ]
    return subprocess.run(command, cwd=root, check=False, timeout=120).returncode


def visible(root: Path) -> set[str]:
    """Return the content of the export, from each of its files; nothing if there is none."""
    if not (root / "out" / "x").exists():
        return set()
    assert sorted(path.name for path in (root / "out" / "x").iterdir()) == NAMES
    manifest = json.loads((root / "out" / "x" / MANIFEST_NAME).read_text())
    return {(root / "out" / "x" / "model.gguf").read_text(), manifest["adapter_id"]}


@pytest.mark.parametrize("point", EXPORT_WORKER, ids=str)
def test_a_killed_export_leaves_the_older_one_or_the_new_one(tmp_path: Path, point: KillPoint) -> None:
    assert export(tmp_path, "00000001", "old") == 0
    armed = {**asdict(point), "action": "SIGKILL", "mark": str(tmp_path / "mark")}
    (tmp_path / "point.json").write_text(json.dumps(armed))
    assert export(tmp_path, "00000002", "new") == -signal.SIGKILL
    (tmp_path / "point.json").unlink()
    assert visible(tmp_path) in (set(), {"old"}, {"new"})
    is_moved_aside = visible(tmp_path) == set()
    if is_moved_aside:  # between two renames; the older export is complete beside it
        (aside,) = (tmp_path / "out").glob(".x.replaced")
        assert sorted(path.name for path in aside.iterdir()) == NAMES

    assert export(tmp_path, "00000003", "newest") == 0
    assert visible(tmp_path) == {"newest"}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x"]


def test_a_first_export_that_is_killed_is_not_visible(tmp_path: Path) -> None:
    (point,) = (point for point in EXPORT_WORKER if "written and compared" in point.state)
    armed = {**asdict(point), "action": "SIGKILL", "mark": str(tmp_path / "mark")}
    (tmp_path / "point.json").write_text(json.dumps(armed))
    assert export(tmp_path, "00000001", "new") == -signal.SIGKILL
    assert visible(tmp_path) == set()
    assert [path.name[:1] for path in (tmp_path / "out").iterdir()] == ["."]
