"""The tools that look at adapters. Each is a translation."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult, ToolAnnotations
from pydantic import Field

from peft_core.adapters.info import AdapterInfo
from peft_core.manager import PEFTManager
from peft_core.spec import AdapterList, ProjectId
from server.answers import answer

AdapterPath = Annotated[
    str, Field(description="Absolute path of an adapter's directory, or a project id: the project's current adapter.")
]
READS = ToolAnnotations(read_only_hint=True, destructive_hint=False, idempotent_hint=True, open_world_hint=False)


async def list_adapters(
    ctx: Context[PEFTManager, Any],
    project_id: Annotated[ProjectId | None, Field(description="Only this project's. Null: all.")] = None,
) -> Annotated[CallToolResult, AdapterList]:
    """The adapters trained on this machine, newest first: base, held-out perplexity of base and adapter, size, path. Each
    project has one current adapter, the one its project id stands for; earlier ones stay.
    """
    found = await ctx.request_context.lifespan_context.list_adapters(project_id)
    return answer(found, f"{len(found.adapters)} adapter{'s'[: len(found.adapters) != 1]}. {found.next}")


async def get_adapter_info(
    adapter_path: AdapterPath, ctx: Context[PEFTManager, Any]
) -> Annotated[CallToolResult, AdapterInfo]:
    """Everything recorded about one adapter: its base and fingerprint, what it was trained on, every setting, and what was
    measured on held-out files.
    """
    info = await ctx.request_context.lifespan_context.get_adapter_info(adapter_path)
    return answer(info, f"{info.adapter_path}: rank {info.rank}, {info.adapter_bytes / 1e6:.1f} MB. {info.next}")


TOOLS = [
    Tool.from_function(list_adapters, title="List adapters", annotations=READS),
    Tool.from_function(get_adapter_info, title="Adapter details", annotations=READS),
]
