"""The tool that exports an adapter to other runtimes."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import Field

from peft_core.manager import PEFTManager
from peft_core.schemas.export import ExportOptions, ExportReport, ExportTarget
from server.format_results import format_export
from server.progress import with_progress
from server.tools import arguments_from, make_tool
from server.tools.adapters import AdapterPath


@arguments_from(ExportOptions)
async def export_adapter(
    adapter_path: AdapterPath,
    to: Annotated[
        ExportTarget,
        Field(
            description="gguf-lora: LoRA file for llama.cpp. merged: whole model. ollama: model in Ollama. "
            "vllm, mlx, hub: directory for it. editors: LoRA file and settings."
        ),
    ],
    *,
    ctx: Context[PEFTManager, Any],
    **options: Any,
) -> Annotated[CallToolResult, ExportReport]:
    """Write an adapter in the form another runtime takes (llama.cpp, Ollama, LM Studio, vLLM, MLX, the Hub), load the written
    file there and compare it with PEFT: an export that computes something else is refused. Takes a minute or more; streams
    progress. Returns files, figures and how to use them.
    """
    export = partial(ctx.request_context.lifespan_context.export_adapter, adapter_path, to, options)
    return format_export(await with_progress(ctx, lambda report: export(on_progress=report)))


TOOLS = [make_tool(export_adapter, "Export an adapter", destroys=True)]
