"""What others use of the machine: the load of other processes, and whether a model answers."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from peft_core.system import machine_use
from peft_core.system.activity import active, idle_seconds
from peft_core.system.machine_use import MachineMeter


def test_the_load_is_the_share_of_processor_time_that_other_processes_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    totals = iter([(1000.0, 100.0), (1040.0, 130.0), (1080.0, 140.0), (1080.0, 140.0)])
    own = iter([50.0, 60.0, 75.0, 75.0])
    monkeypatch.setattr(machine_use, "_processor_seconds", lambda: next(totals))
    monkeypatch.setattr(machine_use, "_own_seconds", lambda: next(own))
    meter = MachineMeter(tmp_path / "inference.used")
    # 40 s of all processors: 30 s busy of which 10 s are ours; then 10 s busy, although 15 s of ours are counted.
    assert [meter().load for _ in range(4)] == [None, 0.5, 0.0, None]


def test_this_machine_can_be_measured(tmp_path: Path) -> None:
    meter = MachineMeter(tmp_path / "inference.used")
    meter()
    spent = time.process_time()
    while time.process_time() - spent < 0.1:
        pass
    use = meter()
    assert use.load is not None
    assert 0 <= use.load <= 1
    assert use.model_idle_s is None
    assert use.available_bytes > 0


def test_a_model_is_in_use_while_a_process_answers_and_idle_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "inference.used"
    assert idle_seconds(path, time.time()) is None
    with active(path), active(path):  # two workers
        os.utime(path, (0, 0))
        assert idle_seconds(path, 1000.0) == 0
    ended_at = path.stat().st_mtime
    assert ended_at > 0
    assert idle_seconds(path, ended_at + 30) == 30
    assert idle_seconds(path, ended_at - 30) == 0  # the clock was set back


def test_a_model_can_be_used_where_nothing_can_be_recorded(tmp_path: Path) -> None:
    with active(tmp_path / "missing" / "inference.used"), active(None):
        pass
    assert idle_seconds(tmp_path / "missing" / "inference.used", 0.0) is None
