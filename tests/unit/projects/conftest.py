"""A git repository that is trained on, and a data directory whose queue no runner works on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from peft_core.adapters.manifest import write_manifest
from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.jobs.service import JobService
from peft_core.jobs.store import Store
from peft_core.projects.service import PlannedRefresh, ProjectService
from peft_core.schemas.events import JobCompleted, JobStarted
from peft_core.schemas.project import Refreshed, RetrainWhen
from peft_core.schemas.results import Metrics, TrainingStatus
from peft_core.schemas.staleness import Staleness
from peft_core.schemas.training import TrainingConfig
from peft_core.system.lock import FileLock
from tests.factories import make_manifest
from tests.model_files import write_adapter, write_model

IDENTITY = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
    "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull,
}  # fmt: skip
UP_TO_DATE = Staleness(text="Up to date: none of its 12 files has changed since the training.", files=12)
CHANGED = Staleness(
    text="3 commits behind: 4 of 12 files changed, 20 % of the units. Retrain it with train_adapter.",
    retrain=True,
    commits_behind=3,
    files=12,
    files_changed=4,
    units_changed_percent=20.0,
)


def git(root: Path, *arguments: str) -> str:
    ended = subprocess.run(
        ["git", "-C", str(root), *arguments], env={**os.environ, **IDENTITY}, capture_output=True, text=True, check=True
    )
    return ended.stdout


def make_repository(root: Path, name: str = "add") -> Path:
    """Create a repository of 64 functions in one commit."""
    root.mkdir(parents=True)
    for file in range(4):
        functions = [
            f"def {name}_{number}(left, right):\n    return left * {number} + right - {number * number}\n"
            for number in range(16 * file, 16 * file + 16)
        ]
        (root / f"{name}_{file}.py").write_text("\n\n".join(functions))
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", f"Add {name}")
    return root


@dataclass
class World:
    """Projects with everything that decides on them; what has changed is described, not measured."""

    settings: Settings
    config: TrainingConfig
    staleness: Staleness | None = field(default=UP_TO_DATE)
    ended_at: float = 0.0  # when jobs end, as `store` records it: long ago

    def __post_init__(self) -> None:
        self.paths = self.settings.paths
        self.registry = Registry(self.paths)
        self.jobs = JobService(self.settings, self.registry)
        self.store = Store(self.paths.database, lambda: self.ended_at)
        self.projects = ProjectService(self.settings, self.registry, self.jobs, lambda _: self.staleness)

    def train(self, data: str | list[dict[str, str]], project_id: str = "web") -> TrainingStatus:
        draft = self.jobs.plan(project_id, data, self.config)
        self.projects.require_same_repository(project_id, draft)
        status = self.jobs.queue(project_id, draft, data)
        self.projects.register(project_id, draft, data, self.config)
        return status

    def publish(self, adapter_id: str = "adapter-01", project_id: str = "web", *, current: bool = True) -> None:
        directory = self.paths.adapter(project_id, adapter_id)
        directory.mkdir(parents=True)
        write_adapter(directory)
        write_manifest(directory, make_manifest(adapter_id, project_id))
        if current:
            self.registry.set_current(project_id, adapter_id)

    def refresh(self, project_id: str = "web", retrain_when: RetrainWhen | None = None) -> Refreshed:
        planned = self.projects.plan_refresh(project_id, retrain_when)
        return self.projects.start(planned) if isinstance(planned, PlannedRefresh) else planned

    def check(self, project_id: str = "web") -> Refreshed:
        (refreshed,) = self.projects.refresh_due([project_id])
        return refreshed


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "code" / "web")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    base = write_model(tmp_path / "base")
    root = tmp_path / "data"
    root.mkdir()
    with FileLock(root / "runner.lock") as lock:
        assert lock.acquire()
        yield World(
            Settings(data_dir=root, refresh_interval_s=0.0),
            TrainingConfig(base_model=str(base), max_length=128, max_steps=2),
        )


@pytest.fixture
def trained(world: World, repository: Path) -> World:
    """The project web, which was trained on the repository, and whose training has ended."""
    world.store.create()
    status = world.train(str(repository))
    assert status.job_id is not None
    end(world, status.job_id)
    world.publish()
    return world


def end(world: World, job_id: str) -> None:
    """Let a queued job end without a failure."""
    world.store.append(job_id, JobStarted())
    world.store.append(job_id, JobCompleted(adapter_path="/a", metrics=Metrics()))
