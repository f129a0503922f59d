"""The tool that shows what is kept on disk, and frees it."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import Field

from peft_core.errors import sanitize
from peft_core.manager import PEFTManager
from peft_core.schemas.frozen import ONE_TEXT_IS_A_LIST
from peft_core.schemas.storage import DiskUsage, size_in_words
from server.confirm import require_consent
from server.format_results import format_disk_usage
from server.tools import make_tool

MAX_NAMES = 200
MAX_ASKED = 10  # items that a question names
IRREPLACEABLE = ("adapter", "job", "export", "other")  # what is not made again when it is needed

Names = Annotated[
    list[str],
    ONE_TEXT_IS_A_LIST,
    Field(max_length=MAX_NAMES, description="Names as listed. Omit to list only."),
]


async def disk_usage(ctx: Context[PEFTManager, Any], free: Names | None = None) -> Annotated[CallToolResult, DiskUsage]:
    """Show what is kept on disk (converted base models, adapters, jobs, exports, logs) and free what is named in `free`.
    Without `free` nothing is deleted. What is in use is never freed; each item says what would be lost with it.
    """
    manager = ctx.request_context.lifespan_context
    if free and (lost := _lost_with(free, await manager.disk_usage())):
        await require_consent(ctx, f"Delete {lost}? This cannot be undone.", "Nothing was freed")
    usage = await manager.disk_usage(free or ())
    if usage.freed:
        await ctx.notify_resources_changed()
    return format_disk_usage(usage)


def _lost_with(names: list[str], listed: DiskUsage) -> str:
    """Return in words which of the named items cannot be made again; an empty text if all of them can."""
    items, lost = {item.name: item for item in listed.items}, []
    for name in dict.fromkeys(name.strip(" \t\r\n\"'`") for name in names):
        item = items.get(name)
        if item is None and listed.omitted_items:  # one of the small items of a long list
            lost.append(sanitize(name))
        elif item is not None and item.can_free and item.kind in IRREPLACEABLE:
            lost.append(f"{name} ({size_in_words(item.bytes)})")
    more = f" and {len(lost) - MAX_ASKED} more" if len(lost) > MAX_ASKED else ""
    return f"{', '.join(lost[:MAX_ASKED])}{more}"


TOOLS = [make_tool(disk_usage, "Disk usage", destroys=True)]
