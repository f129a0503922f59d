"""Fixtures of the survival tests."""

from __future__ import annotations

import json
import os
import shutil
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
    use_our_processes(monkeypatch)


def use_our_processes(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.fixture(scope="session")
def with_earlier_adapter(tmp_path_factory: pytest.TempPathFactory, source: Path, small_base: Path) -> Path:
    """A data directory in which the project "earlier" has an adapter, for `scenario` to copy."""
    scenario = Scenario(tmp_path_factory.mktemp("earlier"), source, small_base, project="earlier")
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_our_processes(monkeypatch)
        scenario.start()
        scenario.finish()
        scenario.expect_queue_continues()
        scenario.expect_no_processes()
    return scenario.paths.root


@pytest.fixture
def scenario(tmp_path: Path, source: Path, small_base: Path, with_earlier_adapter: Path) -> Scenario:
    """A data directory in which a project already has an adapter."""
    shutil.copytree(with_earlier_adapter, tmp_path / "data", symlinks=True)
    return Scenario(tmp_path, source, small_base, has_earlier=True)
