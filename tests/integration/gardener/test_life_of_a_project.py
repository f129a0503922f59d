"""A whole life with Codebase Gardener: add, train, switch, change the code, refresh, remove. Only its side is a double."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import anyio
import pytest

from peft_core.config import Settings
from peft_core.errors import AdapterNotFound, InvalidArgument
from peft_core.manager import PEFTManager
from peft_core.schemas.results import Status
from tests.integration.gardener.codebase_gardener import ProjectRegistry
from tests.tiny_models import write_tiny_adapter, write_tiny_base

EXAMPLE = Path(__file__).parents[3] / "examples" / "codebase_gardener.py"
PROMPT = {"prompt": "def total_", "max_new_tokens": 12}


def write_code(directory: Path) -> Path:
    directory.mkdir()
    for file in range(8):
        functions = [
            f"def total_{file}_{n}(items):\n    found = [item * {n} for item in items]\n    return sum(found) + {file}\n"
            for n in range(8)
        ]
        (directory / f"module_{file}.py").write_text("\n\n".join(functions))
    return directory


async def test_a_project_of_codebase_gardener_is_trained_switched_to_refreshed_and_removed(
    tmp_path: Path, data_dir: Path
) -> None:
    base = write_tiny_base(tmp_path / "base")
    code = write_code(tmp_path / "web")
    settings = Settings(data_dir=data_dir, default_base_model=str(base), log_level="WARNING")
    gardener = ProjectRegistry(data_dir)
    api = gardener.register_project("api", tmp_path / "api")

    # 1. The example adds a project, trains it, and switches to it.
    environment = {"CODEBASE_GARDENER_DATA_DIR": str(data_dir), "CODEBASE_GARDENER_DEFAULT_BASE_MODEL": str(base)}
    command = [sys.executable, str(EXAMPLE), str(code)]
    example = await anyio.run_process(command, env={**os.environ, **environment}, check=False)
    assert example.returncode == 0, example.stderr.decode()
    (web,) = [project_id for project_id in gardener.project_ids if project_id != api]
    shown = gardener.get_project(web)
    lines = example.stdout.decode().splitlines()
    assert lines[0].endswith("in the registry: training")
    assert [
        line for line in lines if line.startswith("100.0 %") and line.endswith("step 3  in the registry: completed")
    ]
    assert f"trained: {shown['lora_adapter_path']}" in lines
    assert (shown["training_status"], gardener.active_project) == ("completed", web)
    assert lines[-1].startswith("refresh: nothing_changed.")
    assert gardener.get_project(api)["training_status"] == "not_started"

    write_tiny_adapter(settings.paths.adapter(api, "a-01"), base, seed=1)
    settings.paths.current(api).symlink_to("a-01")
    async with PEFTManager(settings) as manager:
        # 2. Switch between two projects.
        await manager.switch_project(web)
        of_web = (await manager.generate(PROMPT)).text
        await manager.switch_project(api)
        assert gardener.active_project == api
        again = await manager.switch_project(web)
        assert (again.how, again.adapter_path, gardener.active_project) == ("switched", shown["lora_adapter_path"], web)
        assert again.elapsed_s < 2
        assert (await manager.generate(PROMPT)).text == of_web

        # 3. The code changes, and the adapter catches up.
        more = [f"def difference_{n}(first, second):\n    return first - {n} * second\n" for n in range(20)]
        (code / "module_8.py").write_text("\n\n".join(more))
        refreshed = await manager.refresh_project(web)
        assert refreshed.job is not None, refreshed.reason
        assert gardener.get_project(web)["training_status"] == "training"
        async for latest in manager.watch_training(web, refreshed.job.job_id):
            status = latest
        assert status.status is Status.COMPLETED, status.error
        caught_up = gardener.get_project(web)
        assert (caught_up["training_status"], caught_up["lora_adapter_path"]) == ("completed", status.adapter_path)
        assert caught_up["lora_adapter_path"] != shown["lora_adapter_path"]
        assert (await manager.switch_project(web)).adapter_path == status.adapter_path

        # 4. The project is removed there, with its directory.
        await manager.switch_project(api)
        gardener.remove_project(web)
        with pytest.raises(InvalidArgument, match=f"Codebase Gardener has no project with the id '{web}'"):
            await manager.train_adapter(web)
        with pytest.raises(AdapterNotFound):
            await manager.switch_project(web)
        assert [adapter.project_id for adapter in (await manager.list_adapters()).adapters] == [api]
        assert gardener.active_project == api
