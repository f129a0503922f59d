"""The tool that lists the base models on this machine."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult

from peft_core.manager import PEFTManager
from peft_core.schemas.local_bases import LocalBases
from server.format_results import format_bases
from server.tools import make_tool


async def list_base_models(ctx: Context[PEFTManager, Any]) -> Annotated[CallToolResult, LocalBases]:
    """List the base models on this machine: bundled, in the Hugging Face cache, of Ollama, LM Studio and llama.cpp. Returns for
    each the name to give as base_model, size, fill-in-the-middle, chat, whether it can be trained, memory and time.
    """
    return format_bases(await ctx.request_context.lifespan_context.list_base_models())


TOOLS = [make_tool(list_base_models, "List base models", reads=True)]
