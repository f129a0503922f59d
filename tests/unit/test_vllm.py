"""The client of vLLM against a server that keeps its contract, and what each refusal says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peft_core.errors import VllmError
from peft_core.vllm import VllmClient
from tests.vllm_server import VllmServer, vllm_server


@pytest.fixture
def server() -> Iterator[VllmServer]:
    with vllm_server(Path("/base")) as running:
        yield running


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4}))
    return tmp_path


def said(error: VllmError) -> str:
    return " ".join([error.message, *error.suggestions])


def test_an_adapter_is_loaded_and_unloaded(server: VllmServer, adapter: Path) -> None:
    client = VllmClient(server.address)
    client.load("mine", adapter)
    assert client.models() == {"base": None, "mine": "base"}
    assert client.version() == "0.32.0"
    client.unload("mine")
    client.unload("mine")
    assert server.adapters == {}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"permits_loading": False}, "Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"),
        ({"max_rank": 1}, "LoRA rank 4 is greater than max_lora_rank 1. Start vLLM with a larger --max-lora-rank"),
        ({"key": "secret"}, "vLLM answers 401: Unauthorized. Set VLLM_API_KEY"),
    ],
)
def test_a_refusal_says_what_to_do(server: VllmServer, adapter: Path, changes: dict[str, Any], expected: str) -> None:
    for name, value in changes.items():
        setattr(server, name, value)
    with pytest.raises(VllmError) as refused:
        VllmClient(server.address).load("mine", adapter)
    assert expected in said(refused.value)
    assert len(said(refused.value)) < 400


def test_a_directory_that_the_server_cannot_read_is_named(server: VllmServer) -> None:
    with pytest.raises(VllmError, match="vLLM cannot read /nowhere") as refused:
        VllmClient(server.address).load("mine", Path("/nowhere"))
    assert "must run on this machine" in said(refused.value)


def test_the_key_is_sent_if_there_is_one(server: VllmServer, adapter: Path) -> None:
    server.key = "secret"
    VllmClient(server.address, api_key="secret").load("mine", adapter)
    assert server.keys_seen == {"Bearer secret"}


@pytest.mark.parametrize("answer", [{}, {"choices": []}, {"choices": [{"prompt_logprobs": [None, {"7": {}}]}]}, "text"])
def test_an_answer_without_log_probabilities_is_refused(
    server: VllmServer, answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "answer", lambda *_: (200, answer))
    with pytest.raises(VllmError, match="without log-probabilities"):
        VllmClient(server.address).log_probs("base", [5, 7])


def test_an_answer_without_end_is_cut_off(server: VllmServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_core.vllm.MAX_ANSWER_BYTES", 10)
    with pytest.raises(VllmError, match="answer without end"):
        VllmClient(server.address).models()


def test_a_server_that_does_not_run_is_reported() -> None:
    with pytest.raises(VllmError, match=r"does not run at http://127\.0\.0\.1:9"):
        VllmClient("http://127.0.0.1:9").models()
