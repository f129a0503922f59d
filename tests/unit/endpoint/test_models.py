"""Which model answers a request. No text is generated: an editor that only warms up gets the model's name."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from peft_core.adapters.manifest import write_manifest
from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.endpoint.app import Endpoint
from peft_core.manager import PEFTManager
from peft_core.schemas.serving import EndpointState
from tests.factories import make_base, make_manifest

CODER = "Qwen/Qwen2.5-Coder-1.5B"
STATE = EndpointState(address="http://127.0.0.1:1", run_id="run", started_at="")


def publish(settings: Settings, project_id: str, base_model: str, adapter_id: str) -> None:
    draft = settings.paths.root / "drafts" / project_id
    draft.mkdir(parents=True)
    (draft / "adapter_model.safetensors").write_bytes(b"weights")
    write_manifest(draft, make_manifest(adapter_id, project_id, base=make_base(name=base_model)))
    registry = Registry(settings.paths)
    registry.publish(draft, project_id, adapter_id)
    registry.set_current(project_id, adapter_id)
    shutil.rmtree(settings.paths.root / "drafts")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


@pytest.fixture
async def client(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    endpoint = Endpoint(PEFTManager(settings), "token", STATE, lambda: None)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(endpoint.app()),
        base_url="http://127.0.0.1",
        headers={"Authorization": "Bearer token"},
    ) as client:
        yield client


async def answering(client: httpx.AsyncClient, model: str | None = None) -> str:
    response = await client.post("/infill", json={"n_predict": 0, "model": model})
    assert response.status_code == 200, response.text
    return str(response.json()["model"])


async def test_the_name_of_a_model_is_understood_before_the_id_of_a_project(
    settings: Settings, client: httpx.AsyncClient
) -> None:
    publish(settings, "web", CODER, "a-01")
    publish(settings, "qwen2.5-coder-1.5b-web", CODER, "a-02")
    assert await answering(client, "qwen2.5-coder-1.5b-web") == "qwen2.5-coder-1.5b-web"
    assert await answering(client, "web") == "qwen2.5-coder-1.5b-web"


async def test_without_a_model_the_newest_adapter_answers_as_long_as_no_project_was_chosen(
    settings: Settings, client: httpx.AsyncClient
) -> None:
    assert (await client.post("/infill", json={"n_predict": 0})).status_code == 404
    publish(settings, "web", CODER, "a-01")
    assert await answering(client) == "qwen2.5-coder-1.5b-web"
    publish(settings, "api", CODER, "a-02")
    assert await answering(client) == "qwen2.5-coder-1.5b-api"


async def test_the_chosen_project_answers_on_any_base_model_and_the_newest_adapter_after_its_deletion(
    settings: Settings, client: httpx.AsyncClient
) -> None:
    publish(settings, "web", CODER, "a-01")
    publish(settings, "api", CODER, "a-02")
    assert (await client.post("/default", json={"project_id": "nope"})).status_code == 404
    assert (await client.post("/default", json={"project_id": "web"})).status_code == 200
    assert await answering(client) == "qwen2.5-coder-1.5b-web"
    publish(settings, "web", "org/Other", "a-03")
    publish(settings, "new", CODER, "a-04")
    assert await answering(client) == "other-web"
    shutil.rmtree(settings.paths.projects / "web")
    assert await answering(client) == "qwen2.5-coder-1.5b-new"


def test_the_state_of_an_endpoint_of_another_version_is_read() -> None:
    state = {**STATE.model_dump(), "default_model": "base-web"}
    del state["default_project"]
    assert EndpointState.model_validate(state) == STATE
