"""What a tool answers: a line for people, then the data; the same data again as structured content."""

from __future__ import annotations

from mcp.types import CallToolResult, TextContent
from pydantic import BaseModel

from peft_core.jobs.report import headline
from peft_core.results import TrainingStatus


def answer(result: BaseModel, line: str) -> CallToolResult:
    """`line` first, so that whoever reads along need not read JSON. Nulls are left out of the text, not of the data."""
    return CallToolResult(
        content=[
            TextContent(type="text", text=line),
            TextContent(type="text", text=result.model_dump_json(exclude_none=True)),
        ],
        structured_content=result.model_dump(mode="json"),
    )


def status_answer(status: TrainingStatus) -> CallToolResult:
    parts = [f"{status.project_id}: {headline(status)}."]
    if status.training_data and not status.status.is_final and status.step == 0:
        parts.append(f"Training data: {status.training_data}. Base: {status.base_model} on {status.device}.")
        if estimate := status.estimate:
            time = f"about {max(1, round(estimate.seconds / 60))} min" if estimate.seconds else "unknown time"
            parts.append(
                f"Estimate: {estimate.steps} steps, {time}, {estimate.memory_bytes / 1e9:.1f} GB of memory ({estimate.basis})."
            )
    return answer(status, " ".join([*parts, status.next]))
