"""Tools that show and delete adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import Field

from peft_core.adapters.info import AdapterInfo
from peft_core.errors import sanitize
from peft_core.manager import PEFTManager
from peft_core.schemas.results import AdapterList, AdapterSummary, DeletedAdapter
from peft_core.schemas.training import ProjectId
from server.confirm import require_consent
from server.format_results import format_adapter_info, format_adapters, format_deleted
from server.tools import make_tool

AdapterPath = Annotated[
    str,
    Field(description="Absolute path of an adapter directory, a project id (its current adapter) or a cached hub id."),
]


async def list_adapters(
    ctx: Context[PEFTManager, Any],
    project_id: Annotated[ProjectId | None, Field(description="Omit to list all projects.")] = None,
) -> Annotated[CallToolResult, AdapterList]:
    """List the adapters trained on this machine, newest first. Returns base model, held-out perplexity of base and adapter,
    size and path of each, which are in memory, and of current ones how far the code has moved on since. A project id refers
    to its current adapter; earlier ones are kept.
    """
    return format_adapters(await ctx.request_context.lifespan_context.list_adapters(project_id))


async def get_adapter_info(
    adapter_path: AdapterPath, ctx: Context[PEFTManager, Any]
) -> Annotated[CallToolResult, AdapterInfo]:
    """Show one adapter. Returns all that is recorded: base model and its fingerprint, training data, settings, results on
    held-out files, and how far the code has moved on since.
    """
    return format_adapter_info(await ctx.request_context.lifespan_context.get_adapter_info(adapter_path))


async def delete_adapter(
    project_id: ProjectId,
    adapter_id: Annotated[str, Field(description="As list_adapters shows it; a project id is not enough.")],
    ctx: Context[PEFTManager, Any],
) -> Annotated[CallToolResult, DeletedAdapter]:
    """Permanently delete an adapter that was trained on this machine. Refused while it is loaded. If it was the project's
    current adapter, the newest remaining one becomes current.
    """
    manager = ctx.request_context.lifespan_context

    async def approve() -> None:
        listed = (await manager.list_adapters(project_id, compare_for_s=0)).adapters
        question = deletion_question(project_id, adapter_id, listed)
        await require_consent(ctx, question, nothing_done="Nothing was deleted")

    deleted = await manager.delete_adapter(project_id, adapter_id, approve=approve)
    await ctx.notify_resources_changed()
    return format_deleted(deleted)


def deletion_question(project_id: str, adapter_id: str, adapters: Sequence[AdapterSummary]) -> str:
    """Return the question before a deletion, with what is known about the adapter."""
    facts = [
        fact
        for adapter in adapters
        if adapter.adapter_id == adapter_id
        for fact in (
            "its current adapter" if adapter.current else "",
            adapter.verdict.replace("_", " ") if adapter.verdict else "not evaluated",
            f"{adapter.adapter_bytes / 1e6:.1f} MB",
        )
    ]
    known = f" ({', '.join(filter(None, facts))})" if facts else ""
    return f"Delete adapter {sanitize(adapter_id)} of project {project_id}{known}? This cannot be undone."


TOOLS = [
    make_tool(delete_adapter, "Delete an adapter", destroys=True),
    make_tool(list_adapters, "List adapters", reads=True),
    make_tool(get_adapter_info, "Adapter details", reads=True),
]
