"""Fixtures of the end-to-end tests: real stdio server, runner, worker and bundled model."""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import anyio
import pytest
from filelock import FileLock

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.manager import PEFTManager
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.paths import DataPaths
from peft_core.schemas.results import Status
from tests.tiny_models import write_tiny_base

# Three steps may harm, but the tests need a current adapter.
SHORT = {
    "max_steps": 3,
    "max_length": 128,
    "batch_size": 2,
    "held_out_fraction": 0.02,
    "make_current": "always",
    "allow_little_data": True,
}


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of this test session, shared by all pytest-xdist processes."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def make_once(directory: Path, make: Callable[[Path], None]) -> Path:
    """Return the directory, made by the first process that asks; the others wait."""
    done = directory.with_suffix(".done")
    with FileLock(directory.with_suffix(".lock")):
        if not done.exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            make(directory)
            done.touch()
    return directory


@pytest.fixture(scope="session")
def converted_bases(shared: Path) -> Path:
    """The converted bundled base, shared by all data directories of this session."""

    def convert(cache: Path) -> None:
        ensure_hf_directory(resolve(None, Settings(data_dir=cache)), cache, lambda _: None)

    return make_once(shared / "bases", convert)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model for tests of processes, in which the model does not matter."""
    return str(write_tiny_base(tmp_path_factory.mktemp("tiny-base")))


@pytest.fixture
def data_dir(tmp_path: Path, converted_bases: Path) -> Iterator[Path]:
    """A new data directory that already contains the converted base."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "base_models").symlink_to(converted_bases)
    yield data
    shutil.rmtree(data, ignore_errors=True)


@pytest.fixture(scope="session")
def stdlib_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of real code: two small packages of Python's standard library, without git."""
    repository = tmp_path_factory.mktemp("stdlib")
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in ("email/mime", "wsgiref"):
        ignored = shutil.ignore_patterns("__pycache__", "test*")
        shutil.copytree(library / package, repository / Path(package).name, ignore=ignored)
    return repository


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A test's own copy of a data directory with trained adapters of the projects 'wsgiref' and 'mime'."""
    return shutil.copytree(trained_once, tmp_path / "trained", symlinks=True)


@pytest.fixture(scope="session")
def trained_once(shared: Path, converted_bases: Path, stdlib_repository: Path) -> Path:
    """The data directory that `trained` copies."""

    async def train(data: Path) -> None:
        (data / "base_models").symlink_to(converted_bases)
        manager = PEFTManager(Settings(data_dir=data))
        for project in ("wsgiref", "mime"):
            await manager.train_adapter(project, str(stdlib_repository / project), SHORT)
        for project in ("wsgiref", "mime"):
            async for status in manager.watch_training(project):
                last = status
            assert last.status is Status.COMPLETED, last.error
        # The runner deletes the checkpoint after it reported the end, so wait until it has exited.
        with FileLock(DataPaths(data).runner_lock):
            pass

    return make_once(shared / "trained", lambda data: anyio.run(train, data))
