"""Fixtures that all tests share, and the option `--without-torch` of the fast loop (`make unit`)."""

from __future__ import annotations

import ast
import gc
import os
import shutil
import sys
from collections.abc import Callable, Generator
from functools import cache
from pathlib import Path

import pytest
import structlog
from filelock import FileLock
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.modeling.environment import ENVIRONMENT

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "transformers", "peft", "accelerate", "safetensors", "gguf", "lance", "pyarrow"}  # seconds to import


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-torch", action="store_true", help="skip test files that import torch or Arrow")


def pytest_configure(config: pytest.Config) -> None:
    # As in every process of the product. The test processes and their children share the cores: threads that wait actively, as
    # they do by default, take up to four times the processor time.
    os.environ.setdefault("GOMP_SPINCOUNT", ENVIRONMENT["GOMP_SPINCOUNT"])
    os.environ.setdefault("CODEBASE_GARDENER_ANSWER_WITHIN_S", "600")  # a load on a busy machine is one call
    settings.register_profile("all", deadline=None)  # a busy machine is no failure
    settings.register_profile("fast", deadline=None, max_examples=10)
    settings.load_profile("fast" if config.getoption("--without-torch") else "all")
    if config.getoption("--without-torch"):
        sys.modules.update(dict.fromkeys(HEAVY, None))  # type: ignore[arg-type] -- None makes `import torch` fail


class OneProcessForTheCluster(LoadScopeScheduling):
    """Gives each test to the next free process, and those of a Ray cluster, first, to one: two clusters would compete.

    The groups of xdist would do, but their names are lost with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return "tests/cluster" if nodeid.startswith("tests/cluster/") else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneProcessForTheCluster:
    return OneProcessForTheCluster(config, log)


@pytest.fixture(autouse=True)
def logs_as_before() -> Generator[None, None, None]:
    """Undo what a test that runs an entry point in this process configures: later tests capture logs."""
    yield
    if structlog.is_configured():
        structlog.reset_defaults()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect no garbage while modules are imported, and scan none of their objects later, as in the workers of the product."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Share the cores among the test processes."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip a test file that needs torch before it is imported. None leaves the decision to pytest."""
    skip = config.getoption("--without-torch") and collection_path.suffix == ".py" and needs_torch(collection_path)
    return True if skip else None


@cache
def needs_torch(path: Path) -> bool:
    """Whether a test file imports torch, itself or through the product's or the tests' modules (read, not imported)."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        if any(module.split(".")[0] in HEAVY or module_needs_torch(module) for module in modules):
            return True
    return False


@cache
def module_needs_torch(module: str) -> bool:
    """The codebase's rule: torch is imported in `modeling/`, `training/` and directories called `worker/` only."""
    package, *rest = module.split(".")
    if package == "peft_core":
        return bool(rest) and (rest[0] in ("modeling", "training") or "worker" in rest)
    file = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    return package == "tests" and file.exists() and needs_torch(file)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(params=["legacy", "2026-07-28"])
def era(request: pytest.FixtureRequest) -> str:
    """The MCP protocol era, as a value of `Client(mode=...)`."""
    return str(request.param)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return tmp_path / "data"


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
    """The converted bundled base, made by one process of this session."""
    from peft_core.modeling.convert import ensure_hf_directory  # noqa: PLC0415 -- torch

    def convert(cache: Path) -> None:
        ensure_hf_directory(resolve(None, Settings(data_dir=cache)), cache, lambda _: None)

    return make_once(shared / "bases", convert)
