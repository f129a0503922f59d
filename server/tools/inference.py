"""The tools that use adapters. Each is a translation."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import Field

from peft_core.manager import PEFTManager
from peft_core.schemas.generation import (
    Generation,
    MaxNewTokens,
    Messages,
    Prefix,
    Prompt,
    Seed,
    StopFlag,
    Suffix,
    Temperature,
    TopP,
)
from peft_core.schemas.results import Compatibility, LoadedAdapter, UnloadedAdapter
from server.format_results import compatibility_answer, generation_answer, loaded_answer, unloaded_answer
from server.progress import relay
from server.tools import make_tool
from server.tools.adapters import AdapterPath

BaseRef = Annotated[
    str | None,
    Field(
        description="A model directory, a .gguf file, a cached hub id, or 'bundled'. Null: the base that the adapter was "
        "trained on, where it is on this machine.",
    ),
]


async def verify_adapter_compatibility(
    adapter_path: AdapterPath,
    ctx: Context[PEFTManager, Any],
    base_model: BaseRef = None,
    scan_weights: Annotated[
        bool,
        Field(description="Read the weights too: numbers that are none, an adapter that does nothing."),
    ] = False,
) -> Annotated[CallToolResult, Compatibility]:
    """Whether an adapter, ours or anyone's PEFT LoRA, belongs to a base model: in milliseconds, from headers and
    configuration, without loading anything. Answers a verdict (exact, sampled, same_family, shape_only, incompatible),
    every reason and what to do about each. load_adapter does this check by itself.
    """
    manager = ctx.request_context.lifespan_context
    return compatibility_answer(
        await manager.verify_adapter_compatibility(adapter_path, base_model, scan_weights=scan_weights),
    )


async def load_adapter(
    adapter_path: AdapterPath,
    ctx: Context[PEFTManager, Any],
    base_model: BaseRef = None,
    accept_unproven_base: Annotated[
        bool,
        Field(description="Load although nothing proves that the adapter belongs to this base (shape_only)."),
    ] = False,
) -> Annotated[CallToolResult, LoadedAdapter]:
    """Load an adapter into memory and make it the one that generate uses: seconds the first time, milliseconds to switch
    back to one that is still in memory. Verified before, and proved to take effect after. When it cannot be used the
    status is 'fallback', with the reason: what was active stays active, or else the base answers alone.
    """
    manager = ctx.request_context.lifespan_context
    return loaded_answer(
        await manager.load_adapter(
            adapter_path,
            base_model,
            accept_unproven_base=accept_unproven_base,
            report=relay(ctx),
        ),
    )


async def unload_adapter(
    ctx: Context[PEFTManager, Any],
    adapter_path: Annotated[
        str | None,
        Field(description="Which of the adapters in memory: its directory or project id. Null: the active one."),
    ] = None,
) -> Annotated[CallToolResult, UnloadedAdapter]:
    """Take an adapter out of memory. When no other is left the base model goes too, and the memory back to the operating
    system: the answer says how much was held before and after.
    """
    return unloaded_answer(await ctx.request_context.lifespan_context.unload_adapter(adapter_path))


async def generate(
    *,
    ctx: Context[PEFTManager, Any],
    prompt: Prompt = None,
    messages: Messages = None,
    prefix: Prefix = None,
    suffix: Suffix = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Annotated[StopFlag, Field()] = [],  # noqa: B006 -- read by pydantic, never changed
    compare_with_base: Annotated[
        bool,
        Field(description="Write twice, with and without adapter; see base_text."),
    ] = False,
    adapter_path: Annotated[
        str | None,
        Field(description="Which of the adapters in memory: its directory or project id. Null: the active one."),
    ] = None,
    use_base: Annotated[bool, Field(description="Let the base answer, without adapter.")] = False,
) -> Annotated[CallToolResult, Generation]:
    """Write with the loaded adapter: continue a prompt, answer messages, or fill in between prefix and suffix. Give one of
    the three. Streams progress (tokens so far). compare_with_base=true also returns what the base alone writes, so that
    one sees what the adapter changes.
    """
    request = {
        "prompt": prompt,
        "messages": messages,
        "prefix": prefix,
        "suffix": suffix,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "stop": stop,
        "compare_with_base": compare_with_base,
    }
    manager = ctx.request_context.lifespan_context
    return generation_answer(
        await manager.generate(request, adapter_path=adapter_path, use_base=use_base, report=relay(ctx)),
    )


TOOLS = [
    make_tool(verify_adapter_compatibility, "Check an adapter", reads=True),
    make_tool(load_adapter, "Load an adapter", repeatable=True),
    make_tool(unload_adapter, "Unload an adapter", repeatable=True),
    make_tool(generate, "Generate", reads=True),
]
