"""The real runner in a process of its own, with workers that follow a script."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from peft_core.jobs.store import Store
from peft_core.paths import DataPaths

ROOT = Path(__file__).parents[2]
Spawn = Callable[[], "subprocess.Popen[bytes]"]


@pytest.fixture
def paths(tmp_path: Path) -> DataPaths:
    return DataPaths(tmp_path)


@pytest.fixture
def store(paths: DataPaths) -> Store:
    store = Store(paths.database, time.time)
    store.create()
    return store


@pytest.fixture
def spawn(paths: DataPaths) -> Iterator[Spawn]:
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.integration.scripted_runner", str(paths.root)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
