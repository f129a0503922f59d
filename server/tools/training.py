"""The tools around training. Each is a translation."""

from __future__ import annotations

from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import Field

from peft_core.manager import PEFTManager
from peft_core.schemas.results import TrainingDataReport, TrainingStatus
from peft_core.schemas.training import ProjectId, TrainingConfig
from server.format_results import inspection_answer, status_answer
from server.progress import stream_progress
from server.tools import make_tool
from server.tools.adapters import AdapterPath
from server.tools.inference import BaseRef

JobId = Annotated[str | None, Field(description="From train_adapter's answer. Null: the project's latest job.")]
WaitSeconds = Annotated[
    float,
    Field(
        ge=0,
        le=45,
        description="Stay in the call so long and stream progress; it returns earlier when the job ends.",
    ),
]
TrainingData = Annotated[
    str | list[dict[str, Any]],
    Field(
        description="Absolute path of a repository directory (its code is read, secrets are left out), of a .jsonl file "
        "or of a LanceDB table of code chunks (NAME.lance, columns content, language, file_path, ...); "
        'or a list of records, all of one form: {"text"}, {"prompt", "completion"}, {"messages": [{"role", "content"}]}, '
        'or code chunks {"content", "language", "file_path", ...}.',
    ),
]
DEFAULTS = TrainingConfig()


async def train_adapter(
    project_id: ProjectId,
    training_data: TrainingData,
    ctx: Context[PEFTManager, Any],
    config: TrainingConfig = DEFAULTS,
    wait_s: WaitSeconds = 0,
) -> Annotated[CallToolResult, TrainingStatus]:
    """Train a LoRA adapter on a code base, in the background, on this machine. Answers at once with the job, what it will
    train on, and an estimate of time and memory; the job goes on when you and the client are gone. Minutes for a small
    repository. Leave config out for a first run: its defaults were measured. Follow with get_training_status.
    """
    manager = ctx.request_context.lifespan_context
    status = await manager.train_adapter(project_id, training_data, config)
    if wait_s:
        status = await stream_progress(ctx, manager.watch_training(project_id, status.job_id, timeout_s=wait_s))
    return status_answer(status)


async def inspect_training_data(
    training_data: TrainingData,
    ctx: Context[PEFTManager, Any],
    config: TrainingConfig = DEFAULTS,
) -> Annotated[CallToolResult, TrainingDataReport]:
    """What train_adapter would do with this data, without training: how much it would train on, what is left out and why, the
    held-out files, three sample examples, and the settings, time and memory it would take. Changes nothing; takes seconds,
    up to a minute for a huge repository. Use it before a first or a long training, or when a report surprises.
    """
    return inspection_answer(await ctx.request_context.lifespan_context.inspect_training_data(training_data, config))


async def evaluate_adapter(
    adapter_path: AdapterPath,
    evaluation_data: Annotated[
        TrainingData,
        Field(
            description="Code to measure on, as for train_adapter. The adapter's own repository will do: what it was trained "
            "on is left out, where that is recorded.",
        ),
    ],
    *,
    ctx: Context[PEFTManager, Any],
    base_model: BaseRef = None,
    accept_unproven_base: Annotated[
        bool,
        Field(description="Measure although nothing proves that the adapter belongs to this base."),
    ] = False,
    wait_s: WaitSeconds = 0,
) -> Annotated[CallToolResult, TrainingStatus]:
    """Measure whether an adapter helps, ours or anyone's, on any code: base against adapter, with confidence intervals, a
    verdict (helps, no_difference, harms) and a report. Takes minutes in the background, in the same queue as trainings:
    answers at once, follow with get_training_status. Not needed after a training, which ends with the same measurement.
    """
    manager = ctx.request_context.lifespan_context
    status = await manager.evaluate_adapter(
        adapter_path,
        evaluation_data,
        base_model,
        accept_unproven_base=accept_unproven_base,
    )
    if wait_s:
        watched = manager.watch_training(status.project_id, status.job_id, timeout_s=wait_s)
        status = await stream_progress(ctx, watched)
    return status_answer(status)


async def get_training_status(
    project_id: ProjectId,
    ctx: Context[PEFTManager, Any],
    job_id: JobId = None,
    wait_s: WaitSeconds = 20,
    picture: Annotated[bool, Field(description="Add the loss curve as an image.")] = False,
) -> Annotated[CallToolResult, TrainingStatus]:
    """How a training or an evaluation goes: phase, step, loss, speed, time left; at its end whether the adapter helps,
    measured on held-out files (base against adapter), or why it failed. Waits up to wait_s seconds for the end, streaming
    progress meanwhile; call it again until status is completed, failed, cancelled or interrupted. wait_s = 0 answers at once.
    """
    manager = ctx.request_context.lifespan_context
    status = await stream_progress(ctx, manager.watch_training(project_id, job_id, timeout_s=wait_s))
    return status_answer(status, await manager.draw_training(project_id, status.job_id) if picture else None)


async def cancel_training(
    project_id: ProjectId,
    ctx: Context[PEFTManager, Any],
    job_id: JobId = None,
) -> Annotated[CallToolResult, TrainingStatus]:
    """Stop a training: at once while it waits in the queue, within seconds while it runs. What was trained so far stays as
    a checkpoint (resume_training goes on from it); adapters that exist are not touched.
    """
    return status_answer(await ctx.request_context.lifespan_context.cancel_training(project_id, job_id))


async def resume_training(
    job_id: Annotated[str, Field(description="A job that is interrupted, cancelled or failed.")],
    ctx: Context[PEFTManager, Any],
) -> Annotated[CallToolResult, TrainingStatus]:
    """Queue a training that ended early again. It goes on from its last checkpoint, with the same data and settings."""
    return status_answer(await ctx.request_context.lifespan_context.resume_training(job_id))


TOOLS = [
    make_tool(train_adapter, "Train an adapter"),
    make_tool(inspect_training_data, "Inspect training data", reads=True),
    make_tool(evaluate_adapter, "Evaluate an adapter"),
    make_tool(get_training_status, "Training status", reads=True),
    make_tool(cancel_training, "Cancel a training", destroys=True, repeatable=True),
    make_tool(resume_training, "Resume a training"),
]
