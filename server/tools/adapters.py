"""The tools that look at adapters. Each is a translation."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import Field

from peft_core.adapters.info import AdapterInfo
from peft_core.manager import PEFTManager
from peft_core.schemas.results import AdapterList, DeletedAdapter
from peft_core.schemas.training import ProjectId
from server.format_results import adapters_answer, answer
from server.tools import make_tool

AdapterPath = Annotated[
    str,
    Field(description="Absolute path of an adapter's directory, or a project id: the project's current adapter."),
]


async def list_adapters(
    ctx: Context[PEFTManager, Any],
    project_id: Annotated[ProjectId | None, Field(description="Only this project's. Null: all.")] = None,
) -> Annotated[CallToolResult, AdapterList]:
    """The adapters trained on this machine, newest first: base, held-out perplexity of base and adapter, size, path. Each
    project has one current adapter, the one its project id stands for; earlier ones stay. Says which are in memory now.
    """
    found = await ctx.request_context.lifespan_context.list_adapters(project_id)
    return adapters_answer(found)


async def get_adapter_info(
    adapter_path: AdapterPath,
    ctx: Context[PEFTManager, Any],
) -> Annotated[CallToolResult, AdapterInfo]:
    """Everything recorded about one adapter: its base and fingerprint, what it was trained on, every setting, and what was
    measured on held-out files.
    """
    info = await ctx.request_context.lifespan_context.get_adapter_info(adapter_path)
    return answer(info, f"{info.adapter_path}: rank {info.rank}, {info.adapter_bytes / 1e6:.1f} MB. {info.next}")


async def delete_adapter(
    project_id: ProjectId,
    adapter_id: Annotated[
        str,
        Field(description="Spelled out, as list_adapters gives it; the project id is not enough."),
    ],
    ctx: Context[PEFTManager, Any],
) -> Annotated[CallToolResult, DeletedAdapter]:
    """Delete one adapter that was trained on this machine, for good. Refused while it is loaded. Where it was the project's
    current one, the newest of the others takes its place.
    """
    deleted = await ctx.request_context.lifespan_context.delete_adapter(project_id, adapter_id)
    return answer(deleted, f"Deleted {adapter_id}: {deleted.freed_bytes / 1e6:.1f} MB freed. {deleted.next}")


TOOLS = [
    make_tool(delete_adapter, "Delete an adapter", destroys=True),
    make_tool(list_adapters, "List adapters", reads=True),
    make_tool(get_adapter_info, "Adapter details", reads=True),
]
