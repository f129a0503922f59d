"""Random arguments, within the tools' schemas and outside of them, get a clean answer or error; the server survives.

Set ATTACK_CALLS=5000 for the long run, and ATTACK_SEED to repeat a run.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.types import CallToolResult

from peft_core.config import Settings
from server.app import build_server
from tests.clients import data_of, stdio_server, text_of
from tests.factories import make_base, record_base
from tests.model_files import model_shapes, with_length, write_adapter, write_model

CALLS = int(os.environ.get("ATTACK_CALLS", "600"))
SEED = int(os.environ.get("ATTACK_SEED", str(random.SystemRandom().randrange(2**32))))
PLANTED = "hf_plantedPLANTEDplanted0123456789abcdef"
TEXTS = [
    "", " ", "web", "WEB", "current", "..", ".", "../..", "/", "//", "~", "~root", "~nobody_here/x", "/etc/passwd", "/dev/zero",
    "/proc/self/mem", "a/b", "a\0b", "\n", "\x1b[31m", "x" * 300, "x" * 20_000, "é" * 200, "日本", "\u202e", "'; DROP x;--",
    "%s%n", "${HOME}", "$(touch /tmp/x)", "{{7*7}}", "{0.__class__}", "-rf", "--help", "null", "[]", '[{"text": "x"}]', "1e999",
    "org/name", "org/name@main", "org/name@../../x", "file:///etc/passwd", "http://127.0.0.1/x", "ollama:x", "x.gguf", "C:\\x",
    "(a+)+$", "q_proj", "all-linear", "system", "user", "auto", "cuda", "linear", "20260101-000000-abcdef", "adapter-01",
]  # fmt: skip
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    0.5,
    -0.0,
    1e-300,
    1e300,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    10**30,
    -(2**63),
    512,
    513,
    4096,
    45,
    45.1,
]


class RandomArguments:
    """Generate arguments for a tool: mostly of the schema's shape, with extreme values."""

    def __init__(self, seed: str, paths: list[str]) -> None:
        self.random = random.Random(seed)  # noqa: S311 -- not for cryptography
        self.texts = [*TEXTS, *paths]
        self.wild = 0.0  # probability of a value that ignores the schema

    def arguments(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        properties, required = schema["properties"], schema.get("required", [])
        arguments = {
            name: self.value(node)
            for name, node in properties.items()
            if self.random.random() < (0.95 if name in required else 0.35)
        }
        if self.random.random() < self.wild / 2:
            arguments[self.random.choice([*self.texts, *(name + "s" for name in properties)])] = self.anything(2)
        wait_s = arguments.get("wait_s")
        if isinstance(wait_s, int | float) and self.random.random() < 0.5:
            arguments["wait_s"] = min(wait_s, 0.01)
        return arguments

    def value(self, node: Mapping[str, Any]) -> Any:  # noqa: PLR0911 -- one return per kind
        if self.random.random() < self.wild:
            return self.anything(3)
        if "anyOf" in node:
            return self.value(self.random.choice(node["anyOf"]))
        if "enum" in node:
            return self.random.choice([*node["enum"], "other"])
        match node.get("type"):
            case "string" if self.wild == 0 and "pattern" in node:
                return "web"
            case "string":
                return self.random.choice(self.texts)
            case "integer" | "number":
                bounds = [node[key] for key in ("minimum", "maximum") if key in node]
                if self.wild == 0 and bounds:
                    return self.random.choice(
                        [node.get("minimum", 1), node.get("maximum", 1), node.get("default") or 1]
                    )
                near = [bound + step for bound in bounds for step in (-1, 0, 1)]
                return self.random.choice([*NUMBERS, *near, *near])
            case "boolean":
                return self.random.random() < 0.5
            case "array":
                return [self.value(node.get("items", {})) for _ in range(self.random.choice([0, 1, 1, 2, 9]))]
            case "object" if "properties" in node:
                return self.arguments(node)
            case "object":
                keys = ["text", "prompt", "completion", "messages", "content", "language", "file_path", "role", "x"]
                return {key: self.anything(2) for key in self.random.sample(keys, self.random.randrange(4))}
            case _:
                return self.anything(2)

    def anything(self, depth: int) -> Any:
        kinds = [
            lambda: None,
            lambda: self.random.random() < 0.5,
            lambda: self.random.choice(NUMBERS),
            lambda: self.random.choice(self.texts),
            lambda: [self.anything(depth - 1) for _ in range(self.random.randrange(3))] if depth else [],
            lambda: {self.random.choice(self.texts): self.anything(depth - 1)} if depth else {},
            self.deep,
        ]
        return self.random.choice(kinds)()

    def deep(self) -> Any:
        value: Any = "x"
        for _ in range(self.random.choice([5, 60])):
            value = [value] if self.random.random() < 0.5 else {"a": value}
        return value


def check_answer(name: str, arguments: Mapping[str, Any], result: CallToolResult, home: Path) -> None:
    text = text_of(result)
    context = f"seed {SEED}: {name}({json.dumps(arguments)[:600]}) -> {text[:600]}"
    assert PLANTED not in text, context
    is_named = any(form in json.dumps(arguments) for form in ("~", "$HOME", "${HOME}"))  # no other variable is replaced
    assert is_named or str(home) not in text, context
    assert not re.search(r"Traceback|File \"|Error executing|nternal error|object at 0x", text), context
    if result.is_error:
        assert re.search(r"\[[a-z_]+\]$", text) or text.startswith("There is no tool"), context
        assert len(text) < 6_000, context
        assert all(character.isprintable() or character == "\n" for character in text), context
    else:
        assert data_of(result), context


def gigantic(directory: Path) -> Path:
    """Write a valid base of some hundred gigabytes as a sparse file, which takes no space on the disk."""
    shapes = model_shapes(hidden=1 << 15, vocab=1 << 20)
    write_model(directory, hidden_size=1 << 15, vocab_size=1 << 20)
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        entries[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    header = with_length(json.dumps(entries).encode())
    with (directory / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + end)
    return directory


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "homes" / "planted-user"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", PLANTED)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLANTED)
    # No call may load a model or train: no machine has the memory for this base.
    monkeypatch.setenv("CODEBASE_GARDENER_DEFAULT_BASE_MODEL", str(gigantic(tmp_path / "gigantic")))
    return home


@pytest.fixture
def paths(data_dir: Path, tmp_path: Path) -> list[str]:
    """Paths that exist, and one that does not."""
    adapter = record_base(write_adapter(Settings(data_dir=data_dir).paths.adapter("web", "adapter-01")), make_base())
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("x = 1\n")
    (tmp_path / "x.jsonl").write_text('{"text": "x"}\n{"prompt": 1}\n')
    os.mkfifo(tmp_path / "pipe")
    return [
        str(adapter),
        str(data_dir),
        *(str(tmp_path / name) for name in ("code", "x.jsonl", "pipe", "missing", "gigantic")),
    ]


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("transport", ["in process", "stdio"])
async def test_tools_answer_random_arguments_cleanly_and_the_server_survives(
    transport: str, era: str, data_dir: Path, home: Path, paths: list[str]
) -> None:
    generator = RandomArguments(f"{SEED} {transport} {era}", paths)
    server: Any = build_server(Settings(data_dir=data_dir)) if transport == "in process" else stdio_server(data_dir)
    async with Client(server, mode=era) as client:
        tools = {tool.name: tool.input_schema for tool in (await client.list_tools()).tools}
        outcomes = {name: [0, 0] for name in tools}
        for number in range(CALLS // 4):
            name = sorted(tools)[number % len(tools)]
            generator.wild = generator.random.choice([0.0, 0.0, 0.02, 0.15])  # at 0 most calls pass the schema
            arguments = generator.arguments(tools[name])
            result = await client.call_tool(name, arguments)
            check_answer(name, arguments, result, home)
            outcomes[name][bool(result.is_error)] += 1
        assert set(tools) == {tool.name for tool in (await client.list_tools()).tools}
        assert not (await client.call_tool("list_adapters", {})).is_error
    print(f"seed {SEED}: (answers, errors) of {outcomes}")


async def test_deeply_nested_arguments_give_an_error_and_the_server_survives(data_dir: Path, home: Path) -> None:
    async with Client(stdio_server(data_dir), mode="2026-07-28") as client:
        value: Any = "x"
        for _ in range(150):
            value = [value]
        for name, arguments in {
            "train_adapter": {"project_id": "web", "records": [{"text": value}]},
            "generate": {"messages": value},
            "get_adapter_info": {"adapter_path": value},
        }.items():
            result = await client.call_tool(name, arguments)
            assert result.is_error
            check_answer(name, arguments, result, home)
        assert not (await client.call_tool("list_adapters", {})).is_error


async def test_stderr_contains_no_secret_and_no_traceback(data_dir: Path, home: Path, tmp_path: Path) -> None:
    parameters: StdioServerParameters = stdio_server(data_dir)
    from mcp.client.stdio import stdio_client  # noqa: PLC0415 -- used here only

    with (tmp_path / "stderr").open("w+") as errors:
        async with Client(stdio_client(parameters, errlog=errors), mode="legacy") as client:
            generator = RandomArguments(str(SEED), [PLANTED, f"/x/{PLANTED}"])
            tools = {tool.name: tool.input_schema for tool in (await client.list_tools()).tools}
            for number in range(40):
                name = sorted(tools)[number % len(tools)]
                await client.call_tool(name, generator.arguments(tools[name]))
        errors.seek(0)
        output = errors.read()
    assert PLANTED not in output
    assert "Traceback" not in output
