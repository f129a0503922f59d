"""The tools that list the base models on this machine, and recommend one."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import Field

from peft_core.manager import PEFTManager
from peft_core.schemas.local_bases import LocalBases
from peft_core.schemas.recommendation import BaseRecommendation
from peft_core.schemas.training import ProjectId
from server.format_results import format_bases, format_recommendation
from server.tools import make_tool


async def list_base_models(ctx: Context[PEFTManager, Any]) -> Annotated[CallToolResult, LocalBases]:
    """List the base models on this machine: bundled, in the Hugging Face cache, of Ollama, LM Studio and llama.cpp. Returns for
    each the name to give as base_model, size, fill-in-the-middle, chat, whether it can be trained, memory and time.
    """
    return format_bases(await ctx.request_context.lifespan_context.list_base_models())


async def recommend_base(
    ctx: Context[PEFTManager, Any],
    project_id: Annotated[ProjectId | None, Field(description="Estimate for this project's code.")] = None,
    training_data: Annotated[str | None, Field(description="Estimate for this data, as for train_adapter.")] = None,
) -> Annotated[CallToolResult, BaseRecommendation]:
    """Say which base model to train on this machine: up to three, models for code with fill-in-the-middle first, with time,
    memory and reason; which cannot be trained here and why; which to download if none is for code. Downloads nothing.
    """
    manager = ctx.request_context.lifespan_context
    return format_recommendation(await manager.recommend_base(project_id, training_data))


TOOLS = [
    make_tool(list_base_models, "List base models", reads=True),
    make_tool(recommend_base, "Recommend a base model", reads=True),
]
