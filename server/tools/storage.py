"""The tool that shows what is kept on disk, and frees it."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import BeforeValidator, Field

from peft_core.manager import PEFTManager
from peft_core.schemas.storage import DiskUsage
from server.format_results import format_disk_usage
from server.tools import make_tool

MAX_NAMES = 200

Names = Annotated[
    list[str],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(max_length=MAX_NAMES, description="Names as listed. Omit to list only."),
]


async def disk_usage(ctx: Context[PEFTManager, Any], free: Names | None = None) -> Annotated[CallToolResult, DiskUsage]:
    """Show what is kept on disk (converted base models, adapters, jobs, exports, logs) and free what is named in `free`.
    Without `free` nothing is deleted. What is in use is never freed; each item says what would be lost with it.
    """
    usage = await ctx.request_context.lifespan_context.disk_usage(free or ())
    if usage.freed:
        await ctx.notify_resources_changed()
    return format_disk_usage(usage)


TOOLS = [make_tool(disk_usage, "Disk usage", destroys=True)]
