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
# The tools that a client may call without asking, where its configuration can say so: reading ones only.
READING = {"get_training_status", "list_adapters", "get_adapter_info"}


def test_every_client_has_a_configuration() -> None:
    assert [path.stem for path in CONFIGURATIONS] == ["claude-code", "cursor", "inspector", "kiro", "vscode"]
    table = (EXAMPLES / "README.md").read_text()
    assert all(path.name in table for path in CONFIGURATIONS)


@pytest.mark.parametrize("path", CONFIGURATIONS, ids=lambda path: path.stem)
async def test_a_configuration_starts_the_server(path: Path, data_dir: Path) -> None:
    configuration = json.loads(path.read_text())
    (servers,) = configuration.values()  # "mcpServers", or "servers" in VS Code
    (server,) = servers.values()
    assert set(server.get("autoApprove", [])) <= READING
    here = Path(sys.executable).parent  # as if the virtual environment were active
    environment = {
        **os.environ,
        **server["env"],
        "PATH": f"{here}{os.pathsep}{os.environ['PATH']}",
        "CODEBASE_GARDENER_DATA_DIR": str(data_dir),
    }
    parameters = StdioServerParameters(command=server["command"], args=server["args"], env=environment)
    async with Client(parameters) as client:
        tools = {tool.name for tool in (await client.list_tools()).tools}
    assert tools > READING
