"""Fixtures of the end-to-end tests: real stdio server, runner, worker and bundled model."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from tests.conftest import make_once
from tests.e2e.main_job import MainJob, do_main_job
from tests.tiny_models import write_tiny_base


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give whichever test does the main job enough time for it, and do not let other processes wait for it meanwhile."""
    using = [item for item in items if "main_job" in getattr(item, "fixturenames", ())]
    for item in using:
        item.add_marker(pytest.mark.timeout(1800))
    rest = [item for item in items if item not in using[1:]]
    later = next((place for place, item in enumerate(rest) if "survival" in item.path.parts), len(rest))
    items[:] = [*rest[:later], *using[1:], *rest[later:]]


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


@pytest.fixture(scope="session")
def main_job(shared: Path, converted_bases: Path, stdlib_repository: Path) -> MainJob:
    """The main job, done by one process of this session."""

    def do(directory: Path) -> None:
        anyio.run(do_main_job, directory, converted_bases, stdlib_repository)

    return MainJob(make_once(shared / "main-job", do))


@pytest.fixture
def trained(main_job: MainJob, tmp_path: Path) -> Path:
    """A test's own copy of a data directory with trained adapters of the projects 'wsgiref' and 'mime'."""
    return shutil.copytree(main_job.data, tmp_path / "trained", symlinks=True)
