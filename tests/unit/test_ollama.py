"""Tests of the client of Ollama, with the real package `ollama` and a server that keeps Ollama's contract."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ollama")

from peft_core.errors import OllamaError
from peft_core.ollama import MERGED_KEY, OllamaClient, OllamaStatus, canonical
from peft_core.system.addresses import is_on_this_machine, local_address
from tests.model_files import GGUF_METADATA, TEXT, gguf_bytes
from tests.ollama_server import OllamaServer, ollama_server

LORA = gguf_bytes({"general.architecture": (TEXT, "llama"), "general.type": (TEXT, "adapter")}, {"blk.0.x": (4, 4)})
MERGED = gguf_bytes(GGUF_METADATA | {MERGED_KEY: (TEXT, "LoRA of rank 4")})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OllamaServer]:
    store = tmp_path / "store"
    (store / "blobs").mkdir(parents=True)
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    with ollama_server(store) as running:
        running.pull("tiny", gguf_bytes(), template="{{ .Prompt }}")
        yield running


@pytest.fixture
def client(server: OllamaServer) -> OllamaClient:
    return OllamaClient(server.address)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    path = tmp_path / "lora.gguf"
    path.write_bytes(LORA)
    return path


def closed_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


def test_a_running_server_is_described(client: OllamaClient) -> None:
    status = client.status()
    assert (status.reachable, status.version, list(status.models)) == (True, "0.33.0", ["tiny:latest"])


def test_an_absent_server_is_a_status_and_any_other_call_an_error() -> None:
    client = OllamaClient(f"http://127.0.0.1:{closed_port()}")
    status = client.status()
    assert not status.reachable
    assert "does not run at http://127.0.0.1" in status.reason
    with pytest.raises(OllamaError, match="does not run at") as caught:
        client.generate("x", "tiny", base_model="tiny")
    assert caught.value.code == "ollama_unreachable"


@pytest.mark.parametrize("address", ["http://[", "http://127.0.0.1:port", "gopher://127.0.0.1", "http://a b"])
def test_what_is_no_address_is_a_status_too(address: str) -> None:
    status = OllamaClient(address).status()
    assert not status.reachable
    assert status.reason


def test_another_server_at_the_address_is_told_from_ollama(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.listen()
        client = OllamaClient(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout_s=0.2)
        assert "did not answer in time" in client.status().reason


def test_a_model_created_with_an_adapter_writes_with_it(client: OllamaClient, lora: Path) -> None:
    client.create("mine", from_="tiny", adapters={"lora.gguf": client.upload(lora, timeout_s=10)}, timeout_s=10)
    answer = client.generate("x", "mine")
    assert (answer.text, answer.adapter_applied, answer.fallback_reason) == ("from adapter", True, "")


def test_a_merged_model_is_recognised_by_its_metadata(server: OllamaServer, client: OllamaClient) -> None:
    server.pull("merged", MERGED)
    assert client.generate("x", "merged").adapter_applied
    answer = client.generate("x", "tiny")
    assert not answer.adapter_applied
    assert "no adapter is in it" in answer.fallback_reason


def test_the_base_answers_with_the_reason_where_the_model_is_missing(client: OllamaClient) -> None:
    answer = client.generate("x", "mine", base_model="tiny")
    assert (answer.model, answer.text, answer.adapter_applied) == ("tiny", "from base", False)
    assert "model 'mine' not found" in answer.fallback_reason
    with pytest.raises(OllamaError, match="not found") as caught:
        client.generate("x", "mine")
    assert caught.value.code == "ollama_no_model"


def test_what_is_transient_is_tried_again(server: OllamaServer, client: OllamaClient) -> None:
    server.failures = 2
    assert client.status().reachable
    server.failures = 9
    assert "server busy" in client.status().reason
    assert server.failures == 6


def test_a_generation_has_a_time_limit(server: OllamaServer) -> None:
    server.hang = True
    client = OllamaClient(server.address, generation_timeout_s=0.2)
    with pytest.raises(OllamaError, match="did not answer in time") as caught:
        client.generate("x", "tiny")
    assert caught.value.code == "ollama_timeout"


def test_an_error_inside_a_200_stream_is_an_error(server: OllamaServer, client: OllamaClient, lora: Path) -> None:
    server.error_in_stream = "no space left on device"
    with pytest.raises(OllamaError, match="no space left on device"):
        client.create("mine", from_="tiny", adapters={"a": client.upload(lora, timeout_s=10)}, timeout_s=10)
    assert server.layers("mine") is None


def test_nothing_is_fetched_for_a_base_that_the_server_has_not(server: OllamaServer, client: OllamaClient) -> None:
    with pytest.raises(OllamaError, match="not fetched"):
        client.create("mine", from_="llama3", timeout_s=10)
    assert [path for path, _ in server.requests] == []


@pytest.mark.parametrize(
    ("version", "takes_adapters", "is_too_old"),
    [
        ("0.5.4", False, True),
        ("0.5.5", True, False),
        ("0.33.0-rc2", True, False),
        ("0.34.0", True, False),
        ("0.34.1", False, False),
        ("1.0.0", False, False),
        ("0.0.0", False, False),
        ("unknown", False, False),
    ],
)
def test_what_a_version_takes(version: str, takes_adapters: bool, is_too_old: bool) -> None:
    status = OllamaStatus(address="x", reachable=True, version=version)
    assert (status.takes_adapters, status.is_too_old) == (takes_adapters, is_too_old)


def test_addresses_and_names_are_compared_as_ollama_does() -> None:
    assert local_address("0.0.0.0:11434") == "127.0.0.1:11434"
    assert local_address("http://0.0.0.0/") == "http://127.0.0.1"
    assert local_address("http://10.0.0.0:1") == "http://10.0.0.0:1"
    assert [is_on_this_machine(address) for address in ("localhost:1", "http://127.0.0.1:1", "[::1]:1", ":1")] == [
        True
    ] * 4
    assert not is_on_this_machine("http://gpu.example:11434")
    assert canonical("Tiny") == canonical("tiny:LATEST")
