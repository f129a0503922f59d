"""A day in the life of a project, with real commits: its adapter keeps up with the code by itself."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import anyio
import psutil
import pytest
from anyio.to_thread import run_sync
from mcp.client import Client
from mcp.types import CallToolResult

from peft_core.adapters.manifest import read_manifest
from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.jobs.store import Store
from peft_core.manager import PEFTManager
from peft_core.projects import hook
from peft_core.projects.check import DUE
from peft_core.projects.hook import plan_hook
from peft_core.schemas.results import Status
from peft_core.system.lock import FileLock
from server.app import build_server
from tests.clients import text_of
from tests.tiny_models import write_tiny_base
from tests.unit.projects.conftest import git, make_repository

ROOT = Path(__file__).parents[2]
CONFIG = {"max_length": 64, "max_steps": 2, "make_current": "always", "held_out_fraction": 0.2}
TIMEOUT_S = 240  # on a busy machine; seconds otherwise


def change(repository: Path, number: int) -> None:
    """Rewrite half of the functions of one file, and commit."""
    file = repository / f"add_{number}.py"
    text = file.read_text()
    file.write_text(text.replace("return left *", f"return {number} + right - left *", 8))
    git(repository, "commit", "-q", "-a", "-m", f"Change {file.name}")


async def wait_for_trainings(manager: PEFTManager, count: int) -> None:
    """Wait until the project has so many trainings, and all have ended."""
    with anyio.fail_after(TIMEOUT_S):
        while True:
            trainings = [job for job in await manager.newest_jobs(10) if job.kind == "training"]
            if len(trainings) >= count and all(job.status.is_final for job in trainings):
                break
            await manager.ensure_runner()
            await anyio.sleep(0.1)
    assert [job.status for job in trainings] == [Status.COMPLETED] * count


async def kill_runner(settings: Settings, manager: PEFTManager) -> None:
    """Kill the runner as soon as it has started a worker, and record that it is dead once its worker has ended."""
    with anyio.fail_after(TIMEOUT_S):
        while (worker := find_worker(settings)) is None:
            await manager.ensure_runner()
            await anyio.sleep(0.02)
        runner = worker.parent()
        assert runner is not None
        runner.kill()
        await run_sync(psutil.wait_procs, [runner, worker], TIMEOUT_S)
        await manager.ensure_runner()


def find_worker(settings: Settings) -> psutil.Process | None:
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            command = process.cmdline()
            if "peft_core.worker" in command and command[-1].startswith(str(settings.data_dir)):
                return process
    return None


def check(settings: Settings) -> None:
    """Look whether the project is due, as the process does that a server starts."""
    subprocess.run([*DUE, settings.model_dump_json(), "web"], check=True, timeout=TIMEOUT_S)


async def call(settings: Settings, tool: str, **arguments: object) -> CallToolResult:
    async with Client(build_server(settings)) as client:
        return await client.call_tool(tool, arguments)


async def test_a_day_in_the_life(tmp_path: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What others use of this machine must not decide; and no pause between two trainings.
    environment = {
        "CODEBASE_GARDENER_DATA_DIR": str(data_dir),
        "CODEBASE_GARDENER_REFRESH_MAX_LOAD": "100",
        "CODEBASE_GARDENER_REFRESH_ON_BATTERY": "true",
        "CODEBASE_GARDENER_REFRESH_QUIET_S": "0",
        "CODEBASE_GARDENER_REFRESH_INTERVAL_S": "0",
        "PYTHONPATH": str(ROOT),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(hook, "_program", lambda: [sys.executable, "-m", "server"])
    settings = Settings()
    registry, store = Registry(settings.paths), Store(settings.paths.database, lambda: 0.0)
    repository = make_repository(tmp_path / "web")
    base = str(write_tiny_base(tmp_path / "base"))

    async with PEFTManager(settings) as manager:
        # 1. In the morning the project is trained, and is up to date.
        await manager.train_adapter("web", str(repository), {**CONFIG, "base_model": base})
        await wait_for_trainings(manager, 1)
        (first,) = registry.adapters("web")
        assert first.current
        refreshed = await manager.refresh_project("web", {"commits": 2})
        assert (refreshed.outcome, refreshed.job) == ("not_due", None)

        # 2. The hook is there. One commit is not enough.
        plan_hook(str(repository), "web", os.environ).apply()
        change(repository, 0)
        (checked,) = await manager.refresh_due(["web"])
        assert checked.outcome == "not_due"
        assert "1 commit behind: 1 of 4 files changed" in checked.reason

        # 3. After the second one the hook and a server's check both find that it is due. One training is queued.
        with FileLock(settings.paths.runner_lock) as lock:  # it does not begin before all have looked
            assert lock.acquire(TIMEOUT_S)
            change(repository, 1)
            await run_sync(check, settings)
            status = await call(settings, "get_training_status", project_id="web", wait_s=0)
            assert "It was started by itself: 2 commits behind: 2 of 4 files changed" in text_of(status)

        # 4. In the middle of it the runner is killed. The adapter stays current, and the next check continues the training.
        await kill_runner(settings, manager)
        assert registry.current_path("web") == Path(first.adapter_path)
        await manager.refresh_due(["web"])
        await wait_for_trainings(manager, 2)
        job = store.trainings("web")[0]
        assert job.only_while_free
        assert job.started_because.startswith("started by itself: 2 commits behind")
        events = [event.kind for event in store.events(job.job_id)]
        assert (events.count("job_interrupted"), events.count("job_resumed")) == (1, 1)

        # 5. The new adapter is the current one, and there is nothing left to do.
        second, earlier = registry.adapters("web")
        manifest = read_manifest(Path(second.adapter_path))
        assert manifest is not None
        assert manifest.run.continued_from == first.adapter_id
        assert (second.adapter_id, second.current) == (job.job_id, True)
        assert (earlier.adapter_id, earlier.current) == (first.adapter_id, False)
        (checked,) = await manager.refresh_due()
        assert checked.outcome == "not_due"
        nothing = await call(settings, "refresh_project", project_id="web")
        assert not nothing.is_error
        assert text_of(nothing).startswith("web: Up to date: none of its 4 files has changed since the training.")
        assert len(await manager.newest_jobs(10)) == 2
