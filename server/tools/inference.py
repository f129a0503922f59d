"""Tools that verify and load adapters and generate text with them."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import Field

from peft_core.manager import PEFTManager
from peft_core.schemas.generation import EngineChoice, GenerationRequest
from peft_core.schemas.results import Compatibility, LoadedAdapter, UnloadedAdapter
from server.format_results import format_compatibility, format_generation, format_loaded, format_unloaded
from server.progress import with_progress
from server.tools import arguments_from, make_tool
from server.tools.adapters import AdapterPath

BaseRef = Annotated[
    str | None,
    Field(
        description="A model directory, .gguf file, cached hub id, ollama:NAME or 'bundled'. Omit to use the base model that "
        "the adapter was trained on, if it is on this machine."
    ),
]
ResidentPath = Annotated[
    str | None, Field(description="An adapter in memory: its directory or project id. Omit to use the active one.")
]


async def verify_adapter_compatibility(
    adapter_path: AdapterPath,
    ctx: Context[PEFTManager, Any],
    base_model: BaseRef = None,
    scan_weights: Annotated[
        bool, Field(description="Also scan the weights for NaN, Inf and all-zero B matrices.")
    ] = False,
) -> Annotated[CallToolResult, Compatibility]:
    """Check whether a PEFT LoRA adapter (trained here or not) matches a base model. Reads only headers and configuration, so
    it takes milliseconds. load_adapter does this check itself. Returns a verdict (exact, sampled, same_family, shape_only,
    incompatible), every reason and its fix.
    """
    manager = ctx.request_context.lifespan_context
    return format_compatibility(
        await manager.verify_adapter_compatibility(adapter_path, base_model, scan_weights=scan_weights)
    )


async def load_adapter(
    adapter_path: AdapterPath,
    ctx: Context[PEFTManager, Any],
    base_model: BaseRef = None,
    accept_unproven_base: Annotated[
        bool, Field(description="Load although nothing proves that the adapter belongs to this base (shape_only).")
    ] = False,
    engine: Annotated[
        EngineChoice | None,
        Field(description="torch, or llamacpp (faster on a CPU). Omit to choose automatically."),
    ] = None,
) -> Annotated[CallToolResult, LoadedAdapter]:
    """Load an adapter with its base model and activate it for generate: seconds the first time, milliseconds to switch back
    to one in memory. It is verified before, and its effect measured after. If it cannot be used, status is 'fallback' with
    the reason: the active adapter stays active, or else the base model answers.
    """
    load = partial(
        ctx.request_context.lifespan_context.load_adapter,
        adapter_path,
        base_model,
        accept_unproven_base=accept_unproven_base,
        engine=engine,
    )
    return format_loaded(await with_progress(ctx, lambda report: load(on_progress=report)))


async def unload_adapter(
    ctx: Context[PEFTManager, Any], adapter_path: ResidentPath = None
) -> Annotated[CallToolResult, UnloadedAdapter]:
    """Unload an adapter. Unloading the last one also unloads the base model and frees its memory. Returns memory before and
    after.
    """
    return format_unloaded(await ctx.request_context.lifespan_context.unload_adapter(adapter_path))


@arguments_from(GenerationRequest)
async def generate(
    *,
    ctx: Context[PEFTManager, Any],
    adapter_path: ResidentPath = None,
    use_base: Annotated[bool, Field(description="Use the base model without an adapter.")] = False,
    **request: Any,
) -> CallToolResult:
    """Generate text with the active adapter: continue a prompt, answer messages, or fill in between prefix and suffix. Give
    one of the three. Streams progress in tokens. Returns the text; compare_with_base=true adds the base model's text.
    """
    write = partial(
        ctx.request_context.lifespan_context.generate, request, adapter_path=adapter_path, use_base=use_base
    )
    return format_generation(await with_progress(ctx, lambda report: write(on_progress=report)))


TOOLS = [
    make_tool(verify_adapter_compatibility, "Check an adapter", reads=True),
    make_tool(load_adapter, "Load an adapter", repeatable=True),
    make_tool(unload_adapter, "Unload an adapter", repeatable=True),
    make_tool(generate, "Generate", reads=True),
]
