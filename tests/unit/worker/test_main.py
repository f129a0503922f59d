from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from peft_core.schemas.events import EVENT, JobFailed
from peft_core.system.cancellation import StopFlag
from peft_core.worker import __main__ as worker

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_the_kind_of_the_task_selects_what_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def stub(name: str) -> Any:
        return SimpleNamespace(run=lambda _task, _emit, _stop: ran.append(name))

    monkeypatch.setattr(worker, "importing_torch", contextlib.nullcontext)
    monkeypatch.setitem(sys.modules, "peft_core.training.run", stub("train"))
    monkeypatch.setitem(sys.modules, "peft_core.evaluation.worker.run", stub("evaluate"))
    task: Any = SimpleNamespace(kind=kind)
    worker._run(task, lambda _event: None, StopFlag())
    assert ran == [kind]


def test_an_unusable_task_is_a_failed_job_and_exit_code_1() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "peft_core.worker"],
        input="{}",
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    event = EVENT.validate_json(process.stdout)
    assert process.returncode == 1
    assert isinstance(event, JobFailed)
    assert "standard input" in event.error.message


def test_an_invalid_setting_in_the_environment_is_a_failed_job() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "peft_core.worker"],
        input="{}",
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CODEBASE_GARDENER_LOG_LEVEL": "LOUD"},
    )
    event = EVENT.validate_json(process.stdout)
    assert process.returncode == 1
    assert isinstance(event, JobFailed)
    assert "log_level" in event.error.message
