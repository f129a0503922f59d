"""The real thing: stdio server, runner, training child, bundled model."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from peft_core.bases import resolve
from peft_core.bases.convert import materialise
from peft_core.config import Settings
from peft_core.manager import PEFTManager
from peft_core.results import Status
from tests.toys import write_toy_base

# Three steps may well harm; the tests want the adapters all the same.
SHORT = {
    "max_steps": 3,
    "max_length": 128,
    "batch_size": 2,
    "held_out_fraction": 0.02,
    "make_current": "always",
    "allow_little_data": True,
}


@pytest.fixture(scope="session")
def converted_bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled base converted once, for all data directories of this session."""
    cache = tmp_path_factory.mktemp("bases")
    materialise(resolve(None, Settings(data_dir=cache)), cache, lambda _: None)
    return cache


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For what is about processes, not about the model."""
    return str(write_toy_base(tmp_path_factory.mktemp("toy-base")))


@pytest.fixture
def data_dir(tmp_path: Path, converted_bases: Path) -> Iterator[Path]:
    """A fresh data directory that has the base already."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "base_models").symlink_to(converted_bases)
    yield data
    shutil.rmtree(data, ignore_errors=True)


@pytest.fixture(scope="session")
def stdlib_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real repository that is not this one: three packages of Python's standard library, without git."""
    repository = tmp_path_factory.mktemp("stdlib")
    library = Path(sysconfig.get_paths()["stdlib"])
    for package in ("json", "email", "html"):
        shutil.copytree(library / package, repository / package, ignore=shutil.ignore_patterns("__pycache__", "test*"))
    return repository


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, converted_bases: Path, stdlib_repository: Path) -> Path:
    """A data directory with two trained adapters, of the projects 'mail' and 'json'."""
    data = tmp_path_factory.mktemp("trained")
    (data / "base_models").symlink_to(converted_bases)
    sources = {"mail": stdlib_repository / "email", "json": stdlib_repository / "json"}

    async def train() -> None:
        manager = PEFTManager(Settings(data_dir=data))
        for project, source in sources.items():
            await manager.train_adapter(project, str(source), SHORT)
        for project in sources:
            async for status in manager.watch_training(project):
                last = status
            assert last.status is Status.COMPLETED, last.error

    anyio.run(train)
    return data
