"""The endpoint as a real process with a tiny model: every adapter answers as alone, and the process is found again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import httpx
import psutil
import pytest

from peft_core.adapters.manifest import read_manifest, write_manifest
from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.endpoint.app import MAX_BODY_BYTES
from peft_core.errors import InvalidArgument, ServingError
from peft_core.manager import PEFTManager
from peft_core.schemas.serving import Serving
from tests.tiny_models import write_byte_level_tokenizer, write_tiny_adapter, write_tiny_base

PROJECTS = ("one", "two", "three")
PROMPT = {"prompt": "def f", "max_tokens": 12}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")
    write_byte_level_tokenizer(directory, ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"])
    return directory


def publish(data: Path, base: Path, project: str, seed: int, adapter_id: str) -> None:
    draft = write_tiny_adapter(data / "drafts" / adapter_id, base, seed)
    manifest = read_manifest(draft)
    assert manifest is not None
    own = {"project_id": project, "adapter_id": adapter_id, "created_at": f"2026-01-{adapter_id[-2:]}T00:00:00Z"}
    write_manifest(draft, manifest.model_copy(update=own))
    registry = Registry(Settings(data_dir=data).paths)
    registry.publish(draft, project, adapter_id)
    registry.set_current(project, adapter_id)


@pytest.fixture(scope="module")
def published(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("published")
    for seed, project in enumerate(PROJECTS):
        publish(data, base, project, seed, f"adapter-0{seed + 1}")
    return data


@contextmanager
def served_data(published: Path, base: Path, place: Path) -> Iterator[Settings]:
    data = shutil.copytree(published, place / "data", symlinks=True)
    settings = Settings(data_dir=data, default_base_model=str(base), log_level="WARNING")
    yield settings
    anyio.run(PEFTManager(settings).stop_serving)


@pytest.fixture
def settings(published: Path, base: Path, tmp_path: Path) -> Iterator[Settings]:
    with served_data(published, base, tmp_path) as settings:
        yield settings


@pytest.fixture(scope="module")
def serving(published: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """An endpoint for tests that leave it as it is."""
    with served_data(published, base, tmp_path_factory.mktemp("served")) as settings:
        yield anyio.run(serve, settings)


async def serve(settings: Settings, **options: Any) -> Serving:
    return await PEFTManager(settings).serve_adapter(**{"port": 0, **options})


def client_of(serving: Serving) -> httpx.AsyncClient:
    token = Path(serving.token_path).read_text().strip()
    return httpx.AsyncClient(
        base_url=serving.address, headers={"Authorization": f"Bearer {token}"}, timeout=60, trust_env=False
    )


async def text_from(client: httpx.AsyncClient, model: str, **more: Any) -> str:
    response = await client.post("/v1/completions", json={**PROMPT, "model": model, **more})
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def process_of(serving: Serving) -> psutil.Process:
    port = int(serving.address.rpartition(":")[2])
    (listening,) = (c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port)
    return psutil.Process(listening.pid)


async def test_fifty_concurrent_requests_are_answered_as_alone(serving: Serving) -> None:
    names = [model.name for model in serving.models]
    assert names == ["base-three", "base-two", "base-one", "base"]
    async with client_of(serving) as client:
        before = (await client.get("/health")).json()["requests"]
        alone = {name: await text_from(client, name) for name in names}
        assert len(set(alone.values())) == 4
        answers: list[tuple[str, str]] = []

        async def ask(name: str, prompt: str) -> None:
            answers.append((name, await text_from(client, name, prompt=prompt)))

        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(ask, names[number % 4], PROMPT["prompt"])
        assert len(answers) == 50
        assert all(text == alone[name] for name, text in answers)
        health = (await client.get("/health")).json()
        assert health["requests"] - before == 54


async def test_each_interface_gives_the_same_text(settings: Settings) -> None:
    serving = await serve(settings, project_id="one")
    assert serving.default_model == "base-one"
    async with client_of(serving) as client:
        whole = await text_from(client, "one", suffix="x")
        infill = await client.post(
            "/infill", json={"input_prefix": "def", "prompt": " f", "input_suffix": "x", "n_predict": 12}
        )
        assert infill.json()["content"] == whole
        body = {"input_prefix": "def f", "input_suffix": "x", "n_predict": 12}
        assert (await client.post("/models/base-two/infill", json=body)).json()["content"] != whole
        assert (await client.post("/infill", json={**body, "n_predict": 0})).json()["content"] == ""

        request = {
            **PROMPT,
            "model": "base-one",
            "suffix": "x",
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with client.stream("POST", "/v1/completions", json=request) as response:
            events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
        assert events[-1] == "[DONE]"
        *chunks, usage = map(json.loads, events[:-1])
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert all(chunk["usage"] is None for chunk in chunks)
        assert (usage["choices"], usage["id"]) == ([], chunks[0]["id"])
        assert usage["usage"]["completion_tokens"] == 12
        assert usage["usage"]["total_tokens"] == 12 + usage["usage"]["prompt_tokens"]

        messages = [{"role": "user", "content": "abc"}]
        chat = await client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 8})
        answer = chat.json()["choices"][0]["message"]
        assert answer["role"] == "assistant"
        assert answer["content"]


async def test_asking_again_gives_another_text_unless_a_seed_is_given(serving: Serving) -> None:
    async with client_of(serving) as client:
        fixed = [await text_from(client, "base-one", temperature=1.5, seed=0) for _ in range(2)]
        assert len(set(fixed)) == 1
        drawn = [await text_from(client, "base-one", temperature=1.5, **seed) for seed in ({}, {}, {"seed": -1})]
        assert len(set(drawn)) == 3


async def test_a_new_adapter_is_used_from_its_publication_on_and_no_request_is_lost(
    settings: Settings, base: Path
) -> None:
    serving = await serve(settings)
    async with client_of(serving) as client:
        before = await text_from(client, "base-one")
        texts: list[str] = []

        async def keep_asking(enough: anyio.Event) -> None:
            while not enough.is_set():
                texts.append(await text_from(client, "base-one"))

        enough = anyio.Event()
        async with anyio.create_task_group() as group:
            group.start_soon(keep_asking, enough)
            await anyio.to_thread.run_sync(publish, settings.data_dir, base, "one", 9, "adapter-09")
            after = await text_from(client, "base-one")
            enough.set()
        assert after != before
        assert set(texts) <= {before, after}
        assert sorted(texts, key=lambda text: text == after) == texts  # never the old one again


async def test_the_endpoint_is_found_again_and_replaced_after_a_kill(settings: Settings) -> None:
    serving = await serve(settings)
    assert (await serve(settings)).address == serving.address
    process = process_of(serving)
    worker = process.children()
    process.kill()
    process.wait(30)
    async with client_of(serving) as client:
        with pytest.raises(httpx.HTTPError):
            await text_from(client, "base-one")
    psutil.wait_procs(worker, timeout=30)
    again = await serve(settings)
    async with client_of(again) as client:  # the token is the same
        assert await text_from(client, "base-one")


async def test_a_killed_worker_gives_an_error_and_the_next_request_an_answer(settings: Settings) -> None:
    serving = await serve(settings)
    async with client_of(serving) as client:
        expected = await text_from(client, "base-one")
        (worker,) = process_of(serving).children()
        worker.kill()
        worker.wait(30)
        assert await text_from(client, "base-one") == expected


async def test_wrong_requests_are_refused_in_the_form_of_the_interface(serving: Serving) -> None:
    async with client_of(serving) as client:

        async def refused(path: str, **options: Any) -> tuple[int, str, str]:
            response = await client.post(path, **options)
            error = response.json()["error"]
            return response.status_code, error["code"], error["message"]

        status, code, message = await refused("/v1/completions", json={**PROMPT, "model": "nope"})
        assert (status, code) == (404, "model_not_found")
        assert "base-one" in message
        wrong = {"headers": {"Authorization": "Bearer wrong"}}
        assert (await refused("/v1/completions", json=PROMPT, **wrong))[:2] == (401, "invalid_api_key")
        assert (await refused("/v1/completions", content=b"{"))[:2] == (400, "invalid_argument")
        assert (await refused("/v1/completions", content=b" " * (MAX_BODY_BYTES + 1)))[:2] == (413, "too_large")
        assert (await client.get("/health", headers={"Host": "evil.example"})).status_code == 400
        assert (await client.get("/v1/models", headers={"Authorization": ""})).status_code == 401
        served = (await client.get("/v1/models")).json()["data"]
        assert [model["id"] for model in served] == [model.name for model in serving.models]


async def test_what_cannot_be_served_is_said(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="no adapter") as nothing:
        await serve(Settings(data_dir=tmp_path / "empty"))
    assert nothing.value.code == "nothing_to_serve"
    with pytest.raises(InvalidArgument, match="must be a project with a current adapter: three, two, one"):
        await serve(settings, project_id="four")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"port = {port} cannot be used") as caught:
            await serve(settings, port=port)
        assert caught.value.code == "port_taken"
    serving = await serve(settings)
    with pytest.raises(InvalidArgument, match=f"already runs at {serving.address}"):
        await serve(settings, port=port)
    shutil.rmtree(settings.paths.projects / "one")
    async with client_of(serving) as client:
        response = await client.post("/v1/completions", json={**PROMPT, "model": "base-one"})
        assert response.status_code == 404
    assert (await PEFTManager(settings).stop_serving()).status == "stopped"
    assert (await PEFTManager(settings).stop_serving()).status == "not_running"


async def test_two_servers_that_start_it_together_get_one_endpoint(settings: Settings) -> None:
    found: list[str] = []

    async def start() -> None:
        while True:
            with suppress(ServingError):  # "is starting"
                found.append((await serve(settings)).address)
                return

    async with anyio.create_task_group() as group:
        group.start_soon(start)
        group.start_soon(start)
    assert len(set(found)) == 1


async def test_the_default_model_can_be_changed_while_it_runs(settings: Settings) -> None:
    serving = await serve(settings)
    assert serving.default_model == "base-three"
    assert (await serve(settings, project_id="two")).default_model == "base-two"
    again = await serve(settings)
    assert (again.address, again.default_model) == (serving.address, "base-two")
    async with client_of(again) as client:
        response = await client.post("/v1/completions", json=PROMPT)
        assert response.json()["model"] == "base-two"
        shutil.rmtree(settings.paths.projects / "two")
        response = await client.post("/v1/completions", json=PROMPT)
        assert response.json()["model"] == "base-three"
    assert (await serve(settings)).default_model == "base-three"


async def test_a_client_that_leaves_during_a_stream_does_not_affect_the_next(serving: Serving) -> None:
    async with client_of(serving) as client:
        expected = await text_from(client, "base-one")
        request = {"model": "base-one", "prompt": "x", "max_tokens": 200, "temperature": 1.0, "stream": True}
        async with client.stream("POST", "/v1/completions", json=request) as response:
            await anext(response.aiter_lines())
        assert await text_from(client, "base-one") == expected


async def test_the_command_serves_until_it_is_interrupted(settings: Settings) -> None:
    environment = {
        **os.environ,
        "CODEBASE_GARDENER_DATA_DIR": str(settings.data_dir),
        "CODEBASE_GARDENER_DEFAULT_BASE_MODEL": str(settings.default_base_model),
    }
    command = [sys.executable, "-m", "server", "serve", "--port", "0"]
    async with await anyio.open_process(command, env=environment, stdout=None) as process:
        assert process.stderr is not None
        shown = b""
        while b"serving.token" not in shown:
            shown += await process.stderr.receive()
        serving = await serve(settings)  # found, not started
        assert serving.address in shown.decode()
        async with client_of(serving) as client:
            assert await text_from(client, "one")
        process.send_signal(signal.SIGINT)
        with anyio.fail_after(60):
            await process.wait()
    assert (await PEFTManager(settings).stop_serving()).status == "not_running"
