"""The server as its clients see it, in both protocol eras, without a training."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest
from mcp.client import Client
from mcp.shared.exceptions import MCPError
from mcp.types import ListToolsResult

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.manager import PEFTManager
from peft_core.schemas.results import TrainingDataReport
from peft_core.schemas.training import TrainingConfig
from server.app import build_server
from tests.clients import data_of, stdio_server, text_of
from tests.factories import make_base, record_base
from tests.model_files import write_adapter, write_model

# They answer with text, or with the status of a job, which the tools that are called most describe.
WITHOUT_OUTPUT_SCHEMA = {
    "generate",
    "inspect_training_data",
    "propose_study_plan",
    "compare_adapters",
    "cancel_training",
    "resume_training",
    "refresh_project",
}
Connect = Callable[[], AbstractAsyncContextManager[Client]]

TOOLS = {
    "list_base_models",
    "recommend_base",
    "inspect_training_data",
    "propose_study_plan",
    "train_adapter",
    "refresh_project",
    "evaluate_adapter",
    "compare_adapters",
    "get_training_status",
    "cancel_training",
    "resume_training",
    "list_adapters",
    "get_adapter_info",
    "delete_adapter",
    "verify_adapter_compatibility",
    "load_adapter",
    "unload_adapter",
    "generate",
    "export_adapter",
    "serve_adapter",
    "stop_serving",
    "disk_usage",
}


@pytest.fixture(params=["in process", "stdio"])
def connect(request: pytest.FixtureRequest, era: str, data_dir: Path) -> Connect:
    """Open a client: {in process, stdio} x {legacy, modern}."""
    if request.param == "stdio":
        return lambda: Client(stdio_server(data_dir), mode=era)
    return lambda: Client(build_server(Settings(data_dir=data_dir)), mode=era)


async def test_the_tools_are_listed_with_title_description_schemas_and_hints(connect: Connect) -> None:
    async with connect() as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == TOOLS
        for tool in tools.values():
            assert tool.title
            assert len(tool.description or "") > 60
            assert tool.output_schema or tool.name in WITHOUT_OUTPUT_SCHEMA
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
async def test_the_instructions_explain_the_workflow_in_five_sentences(data_dir: Path, mode: str) -> None:
    async with Client(stdio_server(data_dir), mode=mode) as client:
        assert client.instructions
        assert client.instructions.count(". ") == 4
        assert "train_adapter" in client.instructions


async def test_a_resource_describes_every_training_setting_of_the_schema(connect: Connect) -> None:
    async with connect() as client:
        schema = next(t for t in (await client.list_tools()).tools if t.name == "train_adapter").input_schema
        config = schema["properties"]["config"]["properties"]
        assert {"rank", "learning_rate", "max_steps", "device", "seed"} <= set(config)
        (described,) = (await client.read_resource("settings://training")).contents
        for name in config:
            assert name in described.text  # type: ignore[union-attr]


CODE = "CODE"
UNSET = {
    "null object": ("inspect_training_data", {"training_data": CODE, "config": None}),
    "null as text": ("inspect_training_data", {"training_data": CODE, "config": "null"}),
    "null settings": (
        "inspect_training_data",
        {"training_data": CODE, "config": dict.fromkeys(TrainingConfig.model_fields)},
    ),
    "null settings in an object as text": (
        "inspect_training_data",
        {"training_data": CODE, "config": json.dumps({"rank": None, "mixture": {"instructions": None}})},
    ),
    "empty settings": (
        "inspect_training_data",
        {"training_data": CODE, "config": {"base_model": "", "rank": "", "device": "", "include": [], "mixture": {}}},
    ),
    "empty id": ("list_adapters", {"project_id": ""}),
    "null number and switch": (
        "get_training_status",
        {"project_id": "web", "job_id": None, "wait_s": None, "picture": None},
    ),
    "empty number and switch": (
        "get_training_status",
        {"project_id": "web", "job_id": "", "wait_s": "", "picture": ""},
    ),
    "empty path": ("unload_adapter", {"adapter_path": ""}),
}


async def test_null_and_empty_text_for_optional_arguments_are_the_same_as_omission(
    connect: Connect, code: Path, subtests: pytest.Subtests
) -> None:
    async with connect() as client:
        for case, (tool, given) in UNSET.items():
            arguments = {name: str(code) if value == CODE else value for name, value in given.items()}
            required = {name: arguments[name] for name in ("training_data", "project_id") if arguments.get(name)}
            with subtests.test(case):
                unset = await client.call_tool(tool, arguments)
                omitted = await client.call_tool(tool, required)
                assert not unset.is_error, text_of(unset)
                assert data_of(unset) == data_of(omitted)


async def test_tools_are_listed_in_a_line_that_every_client_can_read(data_dir: Path) -> None:
    tools = await build_server(Settings(data_dir=data_dir)).list_tools()
    line = ListToolsResult(tools=tools).model_dump_json(by_alias=True, exclude_none=True)
    assert len(line.encode()) < 48_000  # asyncio's readline takes 65 536 bytes


async def test_the_status_of_a_project_without_training_is_not_an_error(connect: Connect) -> None:
    async with connect() as client:
        result = await client.call_tool("get_training_status", {"project_id": "web", "wait_s": 30})
        assert not result.is_error
        assert result.structured_content is not None
        assert result.structured_content["status"] == "not_started"
        assert "train_adapter" in result.structured_content["next"]


async def test_an_empty_list_of_adapters_suggests_training_one(connect: Connect) -> None:
    async with connect() as client:
        result = await client.call_tool("list_adapters", {})
        assert result.structured_content is not None
        assert result.structured_content["summary"] == "0 adapters."
        assert "train_adapter" in text_of(result)


async def test_unknown_tools_and_resources_are_errors(connect: Connect) -> None:
    async with connect() as client:
        result = await client.call_tool("train", {})
        assert result.is_error
        assert "train_adapter" in text_of(result)
        with pytest.raises(MCPError, match="No training job 'nope'"):
            await client.read_resource("training://nope")


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A small repository, large enough to train on."""
    directory = tmp_path / "code"
    directory.mkdir()
    for name in ("alpha", "beta", "gamma", "delta"):
        functions = [
            f"def {name}_{number}(value):\n"
            + "".join(f"    {name}_{line} = value * {number} + {line} - len('{name}_{number}')\n" for line in range(16))
            + "    return value\n"
            for number in range(14)
        ]
        (directory / f"{name}.py").write_text("\n\n".join(functions))
    return directory


CREDENTIAL = 'KEY = "' + "AKIA" + "IOSFODNN7QXYZABC" + '"\n'
FEW_RECORDS = [{"text": f"the {n}. of few records that say little: {n * n}"} for n in range(30)]
BAD_INPUT: list[tuple[str, dict[str, Any], list[str]]] = [
    ("train_adapter", {"project_id": "web"}, ["training_data", "required"]),
    ("train_adapter", {"project_id": "a/b", "training_data": "CODE"}, ["project_id = 'a/b'", "letters, digits"]),
    ("train_adapter", {"project_id": "..", "training_data": "CODE"}, ["project_id = '..'", "letters, digits"]),
    (
        "train_adapter",
        {"project_id": "web", "training_data": "CODE", "epochs": 3},
        ["epochs", "inside config, as config.num_epochs"],
    ),
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
    ("train_adapter", {"project_id": "web", "training_data": []}, ["training_data is missing"]),
    ("train_adapter", {"project_id": "web", "records": []}, ["training_data is missing", "unless records are given"]),
    ("train_adapter", {"project_id": "web", "training_data": "CODE", "records": [{}]}, ["one of the two"]),
    ("train_adapter", {"project_id": "web", "records": [{"foo": 1}]}, ["Record 1"]),
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
    (
        "train_adapter",
        {
            "project_id": "web",
            "training_data": "CODE",
            "config": {"mixture": {"fill_in_the_middle": 0.7, "instructions": 0.6}},
        },
        ["config.mixture", "must be at most 1"],
    ),
    (
        "train_adapter",
        {"project_id": "web", "training_data": "CODE", "config": {"mixture": {"instructions": 1.5}}},
        ["config.mixture.instructions = 1.5", "0 to 1"],
    ),
    (
        "train_adapter",
        {"project_id": "web", "training_data": "CODE", "config": {"mixture": {"fill_in_the_middle": 0.5}}},
        ["config.mixture.fill_in_the_middle = 0.5", "no known fill-in-the-middle tokens", "it must be 0"],
    ),
    ("train_adapter", {"project_id": "web", "training_data": "CODE", "wait_s": -1}, ["wait_s = -1", "0"]),
    (
        "train_adapter",
        {"project_id": "web", "records": FEW_RECORDS},
        ["Too little data", "30 records", "at least 50", "Retrieval", "config.allow_little_data = true"],
    ),
    ("inspect_training_data", {"records": FEW_RECORDS}, ["Too little data", "config.allow_little_data = true"]),
    ("inspect_training_data", {"training_data": "/no/such/place"}, ["training_data", "/no/such/place"]),
    ("inspect_training_data", {"training_data": "CODE", "config": {"rank": 0}}, ["config.rank = 0", "1 to 512"]),
    ("inspect_training_data", {"project_id": "web", "training_data": "CODE"}, ["project_id", "no such field"]),
    ("get_training_status", {"project_id": "web", "job_id": "nope"}, ["nope"]),
    ("cancel_training", {"project_id": "web"}, ["Nothing to cancel", "web"]),
    ("resume_training", {"job_id": "nope"}, ["nope"]),
    ("get_adapter_info", {"adapter_path": "nope"}, ["nope", "train_adapter"]),
    ("get_adapter_info", {"adapter_path": "/"}, ["adapter_config.json"]),
    ("verify_adapter_compatibility", {"adapter_path": "web"}, ["No adapter at 'web'", "train_adapter"]),
    ("verify_adapter_compatibility", {"adapter_path": __file__}, ["is a file", "adapter_config.json"]),
    (
        "verify_adapter_compatibility",
        {"adapter_path": "ADAPTER", "base_model": "/no/such"},
        ["base_model = '/no/such'"],
    ),
    ("evaluate_adapter", {"adapter_path": "web", "evaluation_data": "/x"}, ["No adapter at 'web'"]),
    (
        "evaluate_adapter",
        {"adapter_path": "ADAPTER", "evaluation_data": "/x"},
        ["base_model is missing", "Set base_model"],
    ),
    ("evaluate_adapter", {"adapter_path": "web"}, ["evaluation_data", "required"]),
    ("compare_adapters", {"adapter_a": "ADAPTER", "adapter_b": "web"}, ["No adapter at 'web'"]),
    ("load_adapter", {"adapter_path": "web"}, ["No adapter at 'web'"]),
    ("load_adapter", {"adapter_path": "ADAPTER"}, ["base_model is missing", "Set base_model"]),
    ("load_adapter", {"adapter_path": "/"}, ["adapter_path = '/'", "adapter_config.json"]),
    ("load_adapter", {"adapter_path": "ADAPTER", "base": "x"}, ["base = 'x'", "Did you mean 'base_model'?"]),
    ("unload_adapter", {"adapter_path": "web"}, ["'web' is not in memory", "nothing to unload"]),
    ("generate", {"prompt": "x"}, ["No adapter is loaded", "load_adapter", "use_base=true"]),
    ("generate", {}, ["arguments = {} cannot", "there is no prompt", "prompt, or messages, or prefix with suffix"]),
    ("generate", {"prompt": "x", "messages": [{"role": "user", "content": "y"}]}, ["exclude each other"]),
    ("generate", {"prefix": "x"}, ["prefix and suffix belong together"]),
    ("get_adapter_info", {"adapter_path": None}, ["adapter_path is missing: it must be a text"]),
    ("generate", {"prompt": "x", "top_p": 0}, ["top_p = 0", "greater than 0 and at most 1"]),
    ("generate", {"prompt": ""}, ["prompt is empty"]),
    ("generate", {"messages": [{"role": "robot", "content": "x"}]}, ["messages.0.role = 'robot'", "'system', 'user'"]),
    ("generate", {"prompt": "x", "max_new_tokens": 0}, ["max_new_tokens = 0", "1 to 4096"]),
    ("generate", {"prompt": "x", "temperature": 3}, ["temperature = 3", "0 to 2"]),
    ("generate", {"prompt": "x", "stop": [""]}, ["stop.0 = ''", "a text of 1 to 200 characters"]),
    ("generate", {"messages": [{"role": "user", "text": "x"}]}, ["messages.0", "content, role"]),
    ("generate", {"prompt": "x", "seed": -1}, ["seed = -1", "from 0 to 4294967295"]),
    ("generate", {"prompt": "x", "use_base": True, "adapter_path": "web"}, ["use_base = True", "asks for an adapter"]),
    ("delete_adapter", {"project_id": "web", "adapter_id": "current"}, ["no adapter 'current'", "list_adapters"]),
    ("delete_adapter", {"project_id": "web"}, ["adapter_id is missing: it must be a text"]),
]


async def test_invalid_arguments_give_one_clear_error_and_no_job(
    connect: Connect, code: Path, data_dir: Path, subtests: pytest.Subtests
) -> None:
    adapter = str(write_adapter(code / "adapter"))
    async with connect() as client:
        for tool, given, expected in BAD_INPUT:
            arguments = {name: {"CODE": str(code), "ADAPTER": adapter}.get(str(v), v) for name, v in given.items()}
            with subtests.test(tool=tool, arguments=arguments):
                result = await client.call_tool(tool, arguments)
                assert result.is_error
                message = text_of(result)
                for part in expected:
                    assert part in message
                for never in ("pydantic", "Traceback", "Error executing tool"):
                    assert never not in message
        status = await client.call_tool("get_training_status", {"project_id": "web", "wait_s": 0})
        assert status.structured_content is not None
        assert status.structured_content["status"] == "not_started"
    assert not (data_dir / "jobs").exists()


async def test_inspect_training_data_shows_the_dataset_and_writes_nothing(
    connect: Connect, code: Path, data_dir: Path
) -> None:
    (code / "licence.py").write_text("# Copyright 2026 Some One, all rights reserved, more or less\n" + CREDENTIAL)
    async with connect() as client:
        result = await client.call_tool("inspect_training_data", {"training_data": str(code)})
        assert not result.is_error, text_of(result)
        tool = next(t for t in (await client.list_tools()).tools if t.name == "inspect_training_data")
        assert tool.annotations is not None
        assert tool.annotations.read_only_hint
    report, text = TrainingDataReport.model_validate({"unread_files": 0, **data_of(result)}), text_of(result)
    assert (report.files, report.languages, report.secrets_removed) == (4, {"python": 4}, 1)
    assert report.left_out == {"licence": 1}
    assert report.train_examples > report.held_out_examples >= 1
    assert 0 < report.estimate.memory_bytes < 3e9
    assert report.config.num_epochs == 3, "a small code base"
    assert report.config.rank == 16
    assert "examples make only" in report.estimate.chosen
    assert report.estimate.chosen in text
    assert len(report.samples) == 3
    for sample in report.samples:
        assert sample.path not in report.held_out_files
        assert f"{sample.path}:{sample.start_line}-{sample.end_line}" in text
        assert sample.learned.rstrip() in text, "the code verbatim, not as JSON"
        assert sample.learned.split("\n")[0] in (code / sample.path).read_text()
    assert "train_adapter" in report.next
    assert not (data_dir / "jobs").exists()
    assert not (data_dir / "peft.db").exists()


async def test_inspected_records_are_split_into_context_and_learned_text(data_dir: Path) -> None:
    records = [{"prompt": f"What is {n} + {n}?", "completion": f"It is {n + n}, {n} twice."} for n in range(60)]
    async with PEFTManager(Settings(data_dir=data_dir)) as manager:
        report = await manager.inspect_training_data(records, {"max_steps": 5})
    assert report.train_examples + report.held_out_examples == 60
    assert report.estimate.steps == 5
    assert all(sample.given.startswith("What is") and "twice" in sample.learned for sample in report.samples)


async def test_the_result_of_verification_is_in_the_text_and_in_the_data(connect: Connect, tmp_path: Path) -> None:
    base = write_model(tmp_path / "tiny")
    adapter = record_base(write_adapter(tmp_path / "adapter"), resolve(str(base), Settings()))
    async with connect() as client:
        result = await client.call_tool(
            "verify_adapter_compatibility", {"adapter_path": str(adapter), "base_model": str(base)}
        )
        assert result.structured_content is not None
        assert (result.structured_content["verdict"], result.structured_content["compatible"]) == ("sampled", True)
        assert text_of(result).startswith("SAMPLED (samples of every tensor")
        assert f": {adapter} with tiny. Call load_adapter" in text_of(result)
        (adapter / "adapter_config.json").write_text('{"peft_type": "LOHA"}')
        result = await client.call_tool(
            "verify_adapter_compatibility", {"adapter_path": str(adapter), "base_model": str(base)}
        )
        assert not result.is_error
        assert result.structured_content is not None
        assert result.structured_content["verdict"] == "incompatible"
        assert {"not_lora", "altered"} <= {reason["code"] for reason in result.structured_content["reasons"]}
        assert "INCOMPATIBLE" in text_of(result)


async def test_the_manifest_and_card_of_an_adapter_are_a_resource(connect: Connect, data_dir: Path) -> None:
    lora = data_dir / "projects" / "web" / "lora"
    record_base(write_adapter(lora / "adapter-01"), make_base())
    (lora / "adapter-01" / "README.md").write_text("# A card")
    (lora / "current").symlink_to("adapter-01")
    async with connect() as client:
        resource = await client.read_resource("adapter://web")
        document = json.loads(resource.contents[0].text)  # type: ignore[union-attr]
        assert document["manifest"]["adapter_id"] == "adapter-01"
        assert document["card"] == "# A card"
        with pytest.raises(MCPError, match="No adapter at 'nope'"):
            await client.read_resource("adapter://nope")
        listed = await client.call_tool("list_adapters", {})
        assert listed.structured_content is not None
        assert listed.structured_content["adapters"][0]["resident"] is False
        assert listed.structured_content["loaded"] == {"memory_bytes": 0}
        deleted = await client.call_tool("delete_adapter", {"project_id": "web", "adapter_id": "adapter-01"})
        assert "'web' has no current adapter now" in text_of(deleted)
    assert [path.name for path in lora.iterdir()] == [".lock"]


def test_an_unwritable_data_directory_is_reported_with_its_setting(tmp_path: Path, code: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    request = {"project_id": "web", "training_data": str(code)}
    message = call_without_sdk(tmp_path / "file", "train_adapter", request)["content"][0]["text"]
    assert "CODEBASE_GARDENER_DATA_DIR" in message


def start_without_sdk(data_dir: Path, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "CODEBASE_GARDENER_DATA_DIR": str(data_dir)}
    return subprocess.Popen(
        [sys.executable, "-m", "server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, **options
    )


def send(server: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
    assert server.stdin
    server.stdin.write(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n")
    server.stdin.flush()


def receive(server: subprocess.Popen[bytes]) -> dict[str, Any]:
    assert server.stdout
    message: dict[str, Any] = json.loads(server.stdout.readline())
    return message


def initialize(server: subprocess.Popen[bytes]) -> dict[str, Any]:
    client = {"name": "test", "version": "0"}
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client}
    send(server, {"id": 0, "method": "initialize", "params": params})
    answer = receive(server)
    send(server, {"method": "notifications/initialized"})
    return answer


def call_without_sdk(data_dir: Path, tool: str, arguments: dict[str, Any]) -> dict[str, Any]:
    server = start_without_sdk(data_dir)
    initialize(server)
    send(server, {"id": 1, "method": "tools/call", "params": {"name": tool, "arguments": arguments}})
    result: dict[str, Any] = receive(server)["result"]
    server.communicate(timeout=20)
    return result


def test_the_server_exits_when_its_client_closes_stdin(data_dir: Path) -> None:
    server = start_without_sdk(data_dir)
    answer = initialize(server)
    assert answer["result"]["capabilities"]["resources"]["subscribe"] is True
    server.communicate(timeout=20)  # closes stdin
    assert server.returncode == 0


def test_a_rejected_call_is_one_line_in_the_log(data_dir: Path) -> None:
    server = start_without_sdk(data_dir, stderr=subprocess.PIPE)
    initialize(server)
    arguments = {"project_id": "not an id", "training_data": "/x", "config": {"rank": "many"}}
    send(server, {"id": 1, "method": "tools/call", "params": {"name": "train_adapter", "arguments": arguments}})
    assert receive(server)["result"]["isError"]
    log = server.communicate(timeout=20)[1].decode().splitlines()
    assert len(log) == 1
    assert "INFO Tool 'train_adapter' rejected" in log[0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_exits_on_a_signal_while_its_client_is_connected(data_dir: Path, number: signal.Signals) -> None:
    server = start_without_sdk(data_dir)
    initialize(server)
    server.send_signal(number)
    assert server.wait(timeout=20) == 128 + number
    server.communicate()


def test_the_server_imports_nothing_heavy() -> None:
    script = """
import sys
from server.app import build_server
from peft_core.base_models import resolve
from peft_core.config import Settings
from peft_core.manager import PEFTManager
from peft_core.schemas.results import TrainingDataReport
import peft_core.planning.planner
build_server(Settings())
heavy = {"torch", "transformers", "peft", "accelerate", "numpy", "tree_sitter", "detect_secrets", "huggingface_hub"}
heavy |= {"structlog"}  # light, but 0.1 s
print(sorted(heavy & set(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_help_and_version_are_printed() -> None:
    for flag, expected in (("--help", "CODEBASE_GARDENER_DATA_DIR"), ("--version", "peft-mcp 0.")):
        output = subprocess.run([sys.executable, "-m", "server", flag], capture_output=True, text=True, check=True)
        assert expected in output.stdout


def test_an_invalid_setting_is_reported_at_the_start() -> None:
    environment = {**os.environ, "CODEBASE_GARDENER_MAX_MEMORY_MB": "lots"}
    output = subprocess.run(
        [sys.executable, "-m", "server"], env=environment, capture_output=True, text=True, check=False
    )
    assert output.returncode == 2
    assert "CODEBASE_GARDENER_MAX_MEMORY_MB = 'lots'" in output.stderr


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_clients_see_who_the_server_is(data_dir: Path, mode: str) -> None:
    async with Client(build_server(Settings(data_dir=data_dir)), mode=mode) as client:
        info = client.server_info
        assert info is not None
        assert info.description
        assert info.website_url
        assert info.website_url.startswith("https://")
        (icon,) = info.icons or []
        assert b64decode(icon.src.removeprefix("data:image/svg+xml;base64,")).startswith(b"<svg ")


async def test_prompts_are_listed_and_rendered(connect: Connect) -> None:
    async with connect() as client:
        prompts = {prompt.name: prompt for prompt in (await client.list_prompts()).prompts}
        assert set(prompts) == {"train_and_evaluate", "complete_with_adapter", "clean_up"}
        assert all(prompt.title and prompt.description for prompt in prompts.values())
        rendered = await client.get_prompt("train_and_evaluate", {"path": "/code/web", "project_id": "web"})
        (message,) = rendered.messages
        assert "'/code/web'" in message.content.text  # type: ignore[union-attr]
