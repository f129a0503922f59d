"""Fixtures of the survival tests."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from peft_core.jobs import supervisor
from tests.model_files import write_model
from tests.survival.scenario import Scenario

ROOT = Path(__file__).parents[2]
SITE = Path(__file__).parent / "site"
RUNNER = [sys.executable, "-P", "-m", "tests.survival.runner"]


@pytest.fixture(autouse=True)
def _our_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all processes that a test starts import `site/sitecustomize.py`, and the runner start the small worker."""
    if sys.platform != "linux":
        pytest.skip("processes are found and starved through /proc")
    monkeypatch.setattr(supervisor, "RUNNER", RUNNER)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SITE), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "records.jsonl"
    lines = [{"text": f"def add_{n}(a, b):\n    return a + {n} * b\n", "path": f"m{n}.py"} for n in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("small-base"))


@pytest.fixture
def scenario(tmp_path: Path, source: Path, small_base: Path) -> Scenario:
    """A data directory in which a project already has an adapter."""
    return make_scenario(tmp_path, source, small_base)


def make_scenario(root: Path, source: Path, base: Path) -> Scenario:
    scenario = Scenario(root, source, base)
    scenario.job_id, scenario.project = None, "earlier"
    scenario.start()
    scenario.finish()
    scenario.expect_queue_continues()
    scenario.job_id, scenario.project, scenario.has_earlier = None, "small", True
    return scenario
