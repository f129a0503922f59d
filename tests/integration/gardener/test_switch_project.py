"""Switching between projects, in a real inference worker with a tiny model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from peft_core.config import Settings
from peft_core.errors import AdapterNotFound, InferenceError
from peft_core.inference.protocol import Load
from peft_core.manager import PEFTManager
from tests.tiny_models import write_tiny_adapter, write_tiny_base

SHORT = {"prompt": "def f", "max_new_tokens": 12}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture
async def manager(data_dir: Path, base: Path) -> AsyncIterator[PEFTManager]:
    """A manager whose projects `web` and `api` have a current adapter each; Codebase Gardener knows `api` and `new`."""
    settings = Settings(data_dir=data_dir, default_base_model=str(base), log_level="WARNING")
    for seed, project in enumerate(["web", "api"]):
        write_tiny_adapter(settings.paths.adapter(project, "a-01"), base, seed)
        settings.paths.current(project).symlink_to("a-01")
    registry = {"version": "1.0", "projects": {"api": {"name": "API"}, "new": {"name": "New"}}, "active_project": "new"}
    settings.paths.gardener_registry.write_text(json.dumps(registry))
    async with PEFTManager(settings) as opened:
        yield opened


def active(manager: PEFTManager) -> list[str]:
    return [Path(each.adapter_path).parts[-3] for each in manager._inference.resident.adapters if each.active]


def active_there(manager: PEFTManager) -> str:
    active: str = json.loads(manager.settings.paths.gardener_registry.read_text())["active_project"]
    return active


async def test_a_switch_takes_effect_or_leaves_the_previous_adapter_active(
    manager: PEFTManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 1. There and back.
    assert (await manager.switch_project("web")).how == "cold"
    assert active_there(manager) == "new"  # Codebase Gardener does not know this project
    of_web = (await manager.generate(SHORT)).text
    assert (await manager.switch_project("api")).how == "warm"
    assert active_there(manager) == "api"
    of_api = (await manager.generate(SHORT)).text
    assert of_api != of_web
    again = await manager.switch_project("web")
    assert again.how == "switched"
    assert again.elapsed_s < 2
    assert (await manager.generate(SHORT)).text == of_web

    # 2. A project without an adapter, and one whose adapter is damaged.
    await manager.switch_project("api")
    with pytest.raises(AdapterNotFound, match="'new'"):
        await manager.switch_project("new")
    weights = manager.settings.paths.adapter("web", "a-01") / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    with pytest.raises(InferenceError, match="'web' was not switched to") as caught:
        await manager.switch_project("web")
    assert caught.value.code == "not_switched"
    assert (active(manager), active_there(manager)) == (["api"], "api")
    assert (await manager.generate(SHORT)).text == of_api

    # 3. The worker dies while it switches: the previous adapter is loaded again.
    weights.write_bytes(whole)
    client = manager._inference._client
    ask = client.ask

    async def kill_first(request, *arguments):
        if isinstance(request, Load) and "web" in str(request.adapter_path):
            assert client.pid is not None
            os.kill(client.pid, signal.SIGKILL)
        return await ask(request, *arguments)

    monkeypatch.setattr(client, "ask", kill_first)
    with pytest.raises(InferenceError, match="killed"):
        await manager.switch_project("web")
    assert (active(manager), active_there(manager)) == (["api"], "api")
    assert (await manager.generate(SHORT)).text == of_api
