"""Tools that serve adapters to editors and scripts over HTTP."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import Field

from peft_core.manager import PEFTManager
from peft_core.schemas.serving import Serving, ServingStopped
from server.format_results import format_serving, tool_result
from server.tools import make_tool


async def serve_adapter(
    ctx: Context[PEFTManager, Any],
    project_id: Annotated[
        str | None,
        Field(description="Whose adapter answers requests that name no model. Omit to use the newest."),
    ] = None,
    port: Annotated[
        int | None, Field(ge=0, le=65535, description="Of 127.0.0.1; 0: a free one. Omit to use 8012.")
    ] = None,
) -> Annotated[CallToolResult, Serving]:
    """Serve the current adapters of all projects to editors and scripts on this machine: an OpenAI-compatible endpoint
    (/v1/completions, /v1/chat/completions, /v1/models, /infill). It keeps running when the client closes. If it runs already,
    returns its address. Returns address, token file, model names and commands to copy.
    """
    return format_serving(await ctx.request_context.lifespan_context.serve_adapter(project_id, port))


async def stop_serving(ctx: Context[PEFTManager, Any]) -> Annotated[CallToolResult, ServingStopped]:
    """Stop the endpoint that serve_adapter started. Requests that are being answered are finished first."""
    stopped = await ctx.request_context.lifespan_context.stop_serving()
    return tool_result(stopped, stopped.summary)


TOOLS = [
    make_tool(serve_adapter, "Serve adapters", repeatable=True),
    make_tool(stop_serving, "Stop serving", repeatable=True),
]
