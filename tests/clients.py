"""Helpers for tests that use the server as an MCP client."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from mcp.client.stdio import StdioServerParameters
from mcp.types import CallToolResult, TextContent


def stdio_server(data_dir: Path) -> StdioServerParameters:
    environment = {**os.environ, "CODEBASE_GARDENER_DATA_DIR": str(data_dir)}
    return StdioServerParameters(command=sys.executable, args=["-m", "server"], env=environment)


def text_of(result: CallToolResult) -> str:
    return "\n".join(part.text for part in result.content if isinstance(part, TextContent))
