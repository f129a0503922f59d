"""The example configurations start what they say."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

EXAMPLES = Path(__file__).parents[2] / "examples"
CONFIGURATIONS = sorted(EXAMPLES.glob("*.json"))


def test_every_client_has_a_configuration() -> None:
    assert [path.stem for path in CONFIGURATIONS] == ["claude-code", "cursor", "inspector", "kiro", "vscode"]
    table = (EXAMPLES / "README.md").read_text()
    assert all(path.name in table for path in CONFIGURATIONS)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
async def test_a_configuration_starts_the_server(path: Path, data_dir: Path) -> None:
    configuration = json.loads(path.read_text())
    (servers,) = configuration.values()  # "mcpServers", or "servers" in VS Code
    (server,) = servers.values()
    here = Path(sys.executable).parent  # as if the virtual environment were active
    environment = {
        **os.environ,
        **server["env"],
        "PATH": f"{here}{os.pathsep}{os.environ['PATH']}",
        "CODEBASE_GARDENER_DATA_DIR": str(data_dir),
    }
    parameters = StdioServerParameters(command=server["command"], args=server["args"], env=environment)
    async with Client(parameters) as client:
        tools = (await client.list_tools()).tools
    assert tools
    # What a client may call without asking, where its configuration can say so: tools that only read.
    reading = {tool.name for tool in tools if tool.annotations is not None and tool.annotations.read_only_hint}
    assert set(server.get("autoApprove", [])) <= reading
