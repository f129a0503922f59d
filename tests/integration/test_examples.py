"""The example configurations start what they say."""

from __future__ import annotations

import json
import os
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

from server.app import TOOLS

EXAMPLES = Path(__file__).parents[2] / "examples"
CODEX = EXAMPLES / "codex.toml"
CONFIGURATIONS = [*sorted(EXAMPLES.glob("*.json")), CODEX]
PERMISSIONS = sorted((EXAMPLES / "permissions").glob("*.json"))
READING = {tool.name for tool in TOOLS if tool.annotations is not None and tool.annotations.read_only_hint}


def test_every_client_has_a_configuration() -> None:
    assert [path.stem for path in CONFIGURATIONS] == ["claude-code", "cursor", "inspector", "kiro", "vscode", "codex"]
    table = (EXAMPLES / "README.md").read_text()
    assert all(path.name in table for path in [*CONFIGURATIONS, *PERMISSIONS])


def server_in(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    configuration = tomllib.loads(text) if path == CODEX else json.loads(text)
    (servers,) = configuration.values()  # "mcpServers", "servers" in VS Code, "mcp_servers" in Codex
    server: dict[str, Any] = servers["peft-mcp"]
    return server


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
async def test_a_configuration_starts_the_server(path: Path, data_dir: Path) -> None:
    server = server_in(path)
    here = Path(sys.executable).parent  # as if the virtual environment were active
    environment = {
        **os.environ,
        **server.get("env", {}),
        "PATH": f"{here}{os.pathsep}{os.environ['PATH']}",
        "CODEBASE_GARDENER_DATA_DIR": str(data_dir),
    }
    parameters = StdioServerParameters(command=server["command"], args=server["args"], env=environment)
    async with Client(parameters) as client:
        assert (await client.list_tools()).tools


def test_a_client_may_call_the_tools_that_only_read_without_asking_and_no_others() -> None:
    kiro, codex = server_in(EXAMPLES / "kiro.json")["autoApprove"], server_in(CODEX)["tools"]
    claude_code, cursor = (json.loads(path.read_text(encoding="utf-8")) for path in PERMISSIONS)
    assert set(kiro) == READING
    assert {name for name, tool in codex.items() if tool == {"approval_mode": "approve"}} == set(codex) == READING
    assert set(claude_code["permissions"]["allow"]) == {f"mcp__peft-mcp__{name}" for name in READING}
    assert set(cursor["mcpAllowlist"]) == {f"peft-mcp:{name}" for name in READING}
