"""Helpers for tests that use the server as an MCP client."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from mcp.client.stdio import StdioServerParameters
from mcp.types import CallToolResult, TextContent

from server.format_results import RESULT_IN_META


def stdio_server(data_dir: Path) -> StdioServerParameters:
    environment = {**os.environ, "CODEBASE_GARDENER_DATA_DIR": str(data_dir)}
    return StdioServerParameters(command=sys.executable, args=["-m", "server"], env=environment)


def data_of(result: CallToolResult) -> dict[str, Any]:
    """Return the data of a result, which is beside its text for tools whose result is text."""
    data = result.structured_content or (result.meta or {})[RESULT_IN_META]
    assert isinstance(data, dict)
    return data


def text_of(result: CallToolResult) -> str:
    return "\n".join(part.text for part in result.content if isinstance(part, TextContent))
