"""The server as its clients see it, in both protocol eras; nothing here trains."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from mcp.client import Client
from mcp.shared.exceptions import MCPError

from peft_core.config import Settings
from server.app import build_server
from tests.clients import stdio_server, text_of

Connect = Callable[[], AbstractAsyncContextManager[Client]]

TOOLS = {
    "train_adapter",
    "get_training_status",
    "cancel_training",
    "resume_training",
    "list_adapters",
    "get_adapter_info",
}


@pytest.fixture(params=["in process", "stdio"])
def connect(request: pytest.FixtureRequest, era: str, data_dir: Path) -> Connect:
    """Opens a client: {in process, stdio} x {legacy, modern}."""
    if request.param == "stdio":
        return lambda: Client(stdio_server(data_dir), mode=era)
    return lambda: Client(build_server(Settings(data_dir=data_dir)), mode=era)


async def test_it_lists_its_tools_with_all_that_a_client_needs_to_know(connect: Connect) -> None:
    async with connect() as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == TOOLS
        for tool in tools.values():
            assert tool.title
            assert len(tool.description or "") > 60
            assert tool.output_schema
            assert tool.input_schema["additionalProperties"] is False
            hints = tool.annotations
            assert hints is not None
            assert None not in (
                hints.read_only_hint,
                hints.destructive_hint,
                hints.idempotent_hint,
                hints.open_world_hint,
            )
        assert tools["get_training_status"].annotations.read_only_hint  # type: ignore[union-attr]
        assert not tools["train_adapter"].annotations.read_only_hint  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_it_teaches_the_flow_in_three_sentences(data_dir: Path, mode: str) -> None:
    async with Client(stdio_server(data_dir), mode=mode) as client:
        assert client.instructions
        assert client.instructions.count(". ") == 2
        assert "train_adapter" in client.instructions


async def test_every_setting_of_a_training_is_described_in_the_schema(connect: Connect) -> None:
    async with connect() as client:
        schema = next(t for t in (await client.list_tools()).tools if t.name == "train_adapter").input_schema
        config = schema["$defs"]["TrainingConfig"]["properties"]
        assert {"rank", "learning_rate", "max_steps", "device", "seed"} <= set(config)
        assert all(field["description"] for field in config.values())


async def test_a_project_without_training_is_not_an_error(connect: Connect) -> None:
    async with connect() as client:
        result = await client.call_tool("get_training_status", {"project_id": "web", "wait_s": 30})
        assert not result.is_error
        assert result.structured_content is not None
        assert result.structured_content["status"] == "not_started"
        assert "train_adapter" in result.structured_content["next"]


async def test_an_empty_list_of_adapters_says_what_to_do(connect: Connect) -> None:
    async with connect() as client:
        result = await client.call_tool("list_adapters", {})
        assert result.structured_content is not None
        assert result.structured_content["adapters"] == []
        assert "train_adapter" in text_of(result)


async def test_unknown_tools_and_resources_are_refused(connect: Connect) -> None:
    async with connect() as client:
        result = await client.call_tool("train", {})
        assert result.is_error
        assert "train_adapter" in text_of(result)
        with pytest.raises(MCPError, match="No training job 'nope'"):
            await client.read_resource("training://nope")


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A small repository that could be trained on."""
    directory = tmp_path / "code"
    directory.mkdir()
    for name in ("alpha", "beta", "gamma", "delta"):
        functions = [
            f"def {name}_{number}(value):\n"
            + "".join(f"    value = value * {number} + {line} - len('{name}')\n" for line in range(25))
            + "    return value\n"
            for number in range(6)
        ]
        (directory / f"{name}.py").write_text("\n\n".join(functions))
    return directory


BAD_INPUT: list[tuple[str, dict[str, Any], list[str]]] = [
    ("train_adapter", {"project_id": "web"}, ["training_data", "required"]),
    ("train_adapter", {"project_id": "a/b", "training_data": "CODE"}, ["project_id = 'a/b'", "letters, digits"]),
    ("train_adapter", {"project_id": "..", "training_data": "CODE"}, ["project_id = '..'", "letters, digits"]),
    ("train_adapter", {"project_id": "web", "training_data": "CODE", "epochs": 3}, ["epochs", "no such field"]),
    (
        "train_adapter",
        {"project_id": "web", "training_data": "CODE", "config": {"rank": 0}},
        ["config.rank = 0", "1 to 512"],
    ),
    (
        "train_adapter",
        {"project_id": "web", "training_data": "CODE", "config": {"learnig_rate": 1e-4}},
        ["config.learnig_rate", "learning_rate"],
    ),
    (
        "train_adapter",
        {"project_id": "web", "training_data": "CODE", "config": {"num_epochs": 1, "max_steps": 3}},
        ["num_epochs = 1 and max_steps = 3 exclude each other"],
    ),
    ("train_adapter", {"project_id": "web", "training_data": "/no/such/place"}, ["training_data", "/no/such/place"]),
    ("train_adapter", {"project_id": "web", "training_data": []}, ["training_data"]),
    ("train_adapter", {"project_id": "web", "training_data": [{"foo": 1}]}, ["Record 1"]),
    (
        "train_adapter",
        {"project_id": "web", "training_data": "CODE", "config": {"base_model": "org/unknown-model"}},
        ["base_model", "org/unknown-model"],
    ),
    (
        "train_adapter",
        {"project_id": "web", "training_data": "CODE", "config": {"max_memory_mb": 300}},
        ["config.max_memory_mb = 300", "MB"],
    ),
    (
        "train_adapter",
        {"project_id": "web", "training_data": "CODE", "config": {"target_modules": ["query"]}},
        ["config.target_modules = 'query'", "q_proj", "all-linear"],
    ),
    ("train_adapter", {"project_id": "web", "training_data": "CODE", "wait_s": 46}, ["wait_s = 46", "from 0 to 45"]),
    ("get_training_status", {"project_id": "web", "job_id": "nope"}, ["nope"]),
    ("cancel_training", {"project_id": "web"}, ["Nothing to cancel", "web"]),
    ("resume_training", {"job_id": "nope"}, ["nope"]),
    ("get_adapter_info", {"adapter_path": "nope"}, ["nope", "train_adapter"]),
    ("get_adapter_info", {"adapter_path": "/"}, ["adapter_config.json"]),
]


@pytest.mark.parametrize(("tool", "arguments", "expected"), BAD_INPUT)
async def test_bad_input_gets_one_clear_error_and_makes_no_job(
    connect: Connect, code: Path, data_dir: Path, tool: str, arguments: dict[str, Any], expected: list[str]
) -> None:
    if arguments.get("training_data") == "CODE":
        arguments = {**arguments, "training_data": str(code)}
    async with connect() as client:
        result = await client.call_tool(tool, arguments)
        assert result.is_error
        message = text_of(result)
        for part in expected:
            assert part in message
        assert "pydantic" not in message
        assert "Traceback" not in message
        assert "Error executing tool" not in message
        status = await client.call_tool("get_training_status", {"project_id": "web", "wait_s": 0})
        assert status.structured_content is not None
        assert status.structured_content["status"] == "not_started"
    assert not (data_dir / "jobs").exists()


def test_an_unwritable_data_directory_is_named(tmp_path: Path, code: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    request = {"project_id": "web", "training_data": str(code)}
    message = call_by_hand(tmp_path / "file", "train_adapter", request)["content"][0]["text"]
    assert "CODEBASE_GARDENER_DATA_DIR" in message


def start_by_hand(data_dir: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "CODEBASE_GARDENER_DATA_DIR": str(data_dir)}
    return subprocess.Popen(
        [sys.executable, "-m", "server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    )


def say(server: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
    assert server.stdin
    server.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
    server.stdin.flush()


def hear(server: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert server.stdout
    message: dict[str, Any] = json.loads(server.stdout.readline())
    return message


def initialize(server: subprocess.Popen[bytes]) -> dict[str, Any]:
    client = {"name": "by hand", "version": "0"}
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client}
    say(server, {"id": 0, "method": "initialize", "params": params})
    answer = hear(server)
    say(server, {"method": "notifications/initialized"})
    return answer


def call_by_hand(data_dir: Path, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    server = start_by_hand(data_dir)
    initialize(server)
    say(server, {"id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}})
    result: dict[str, Any] = hear(server)["result"]
    server.communicate(timeout=20)
    return result


def test_it_leaves_when_its_client_does(data_dir: Path) -> None:
    server = start_by_hand(data_dir)
    answer = initialize(server)
    assert answer["result"]["capabilities"]["resources"]["subscribe"] is True
    server.communicate(timeout=20)  # closes stdin
    assert server.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_leaves_on_a_signal_although_its_client_stays(data_dir: Path, number: signal.Signals) -> None:
    server = start_by_hand(data_dir)
    initialize(server)
    server.send_signal(number)
    assert server.wait(timeout=20) == 128 + number
    server.communicate()


def test_the_server_imports_nothing_heavy() -> None:
    script = """
import sys
from server.app import build_server
from peft_core.config import Settings
import peft_core.jobs.planning
build_server(Settings())
heavy = {"torch", "transformers", "peft", "accelerate", "numpy", "tree_sitter", "detect_secrets", "huggingface_hub"}
print(sorted(heavy & set(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_help_and_version_are_for_people() -> None:
    for flag, expected in (("--help", "CODEBASE_GARDENER_DATA_DIR"), ("--version", "peft-mcp 0.")):
        output = subprocess.run([sys.executable, "-m", "server", flag], capture_output=True, text=True, check=True)
        assert expected in output.stdout


def test_a_wrong_setting_is_named_at_the_start() -> None:
    environment = {**os.environ, "CODEBASE_GARDENER_MAX_MEMORY_MB": "lots"}
    output = subprocess.run(
        [sys.executable, "-m", "server"], env=environment, capture_output=True, text=True, check=False
    )
    assert output.returncode == 2
    assert "CODEBASE_GARDENER_MAX_MEMORY_MB = 'lots'" in output.stderr
