"""The tool that exports an adapter to other runtimes."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import Field

from peft_core.manager import PEFTManager
from peft_core.schemas.export import ExportReport, ExportTarget
from server.format_results import format_export
from server.progress import progress_callback
from server.tools import make_tool
from server.tools.adapters import AdapterPath
from server.tools.inference import BaseRef


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
    output_path: Annotated[
        str | None, Field(description="Absolute path of the directory to create. Omit to use the project's exports.")
    ] = None,
    format: Annotated[  # noqa: A002 -- the argument's name for users
        str | None,
        Field(
            description="gguf-lora: f32, f16. merged: f16, bf16, f32, q8_0, huggingface, ... Omit to use the default."
        ),
    ] = None,
    base_model: BaseRef = None,
    overwrite: Annotated[bool, Field(description="Replace an earlier export.")] = False,
    model_name: Annotated[
        str | None, Field(description="Of the model in Ollama. Omit to name it after the project.")
    ] = None,
) -> Annotated[CallToolResult, ExportReport]:
    """Write an adapter in the form another runtime takes (llama.cpp, Ollama, LM Studio, vLLM, MLX, the Hub), load the written
    file there and compare it with PEFT: an export that computes something else is refused. Takes a minute or more; streams
    progress. Returns files, figures and how to use them.
    """
    manager = ctx.request_context.lifespan_context
    return format_export(
        await manager.export_adapter(
            adapter_path,
            to,
            output_path=output_path,
            format=format,
            base_model=base_model,
            overwrite=overwrite,
            model_name=model_name,
            on_progress=progress_callback(ctx),
        )
    )


TOOLS = [make_tool(export_adapter, "Export an adapter", destroys=True)]
