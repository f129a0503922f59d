"""Tools that train and evaluate adapters.

Tools whose result is the status of a job share its schema; only those that are called most declare it, which keeps the list of
tools short.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.types import CallToolResult
from pydantic import AfterValidator, Field

from peft_core.errors import InvalidArgument
from peft_core.manager import PEFTManager
from peft_core.schemas.cluster import ASK_ABOVE_BYTES
from peft_core.schemas.project import RetrainWhen
from peft_core.schemas.results import Estimate, TrainingStatus
from peft_core.schemas.training import DataSelection, ProjectId, TrainingConfig
from peft_core.system.durations import rough_duration
from server.confirm import require_consent
from server.format_results import format_inspection, format_refreshed, format_status, format_study_plan
from server.progress import stream_progress
from server.status_text import WAIT_S, short_headline
from server.tools import make_tool
from server.tools.adapters import AdapterPath
from server.tools.inference import BaseRef
from server.training_page import SHOWN_ON_PAGE

JobId = Annotated[str | None, Field(description="As train_adapter returned it. Omit to use the project's latest job.")]
MAX_WAIT_S = 45.0  # several clients end a call after 60 s
WaitSeconds = Annotated[
    float,
    Field(
        ge=0,
        description="Wait so many seconds; stream progress.",
        json_schema_extra={"maximum": MAX_WAIT_S},
    ),
    AfterValidator(lambda seconds: min(seconds, MAX_WAIT_S)),
]
TrainingData = Annotated[
    str | None,
    Field(
        description="Absolute path of a repository, a file of records (.jsonl, .json, .csv, .parquet, or a session of Claude "
        "Code or Codex) or a LanceDB table (NAME.lance) of code chunks."
    ),
]
Records = Annotated[
    list[dict[str, Any]] | None,
    Field(
        description='Instead of a path: records of one form: {"text"}, {"prompt", "completion"}, '
        '{"messages": [{"role", "content"}]}, {"instruction", "input", "output"}, {"content", "language", "file_path"}.'
    ),
]
ComparedAdapter = Annotated[str, Field(min_length=1, description="A project id (its current adapter) or a directory.")]
DEFAULTS = TrainingConfig()
LONG_S = 3600.0  # a training that takes longer is worth a question
ALL_DATA = DataSelection()


def _one_source(field: str, path: str | None, records: list[dict[str, Any]] | None) -> str | list[dict[str, Any]]:
    """Return the path or the records, of which a call must give one."""
    if path is not None and records is not None:
        raise InvalidArgument(field, path, "it was given together with records; give one of the two")
    if records is not None:
        return records
    if path is None:
        raise InvalidArgument(
            field, None, "the absolute path of a repository or a file is required, unless records are given"
        )
    return path


async def train_adapter(
    project_id: ProjectId,
    training_data: TrainingData = None,
    records: Records = None,
    *,
    ctx: Context[PEFTManager, Any],
    config: TrainingConfig = DEFAULTS,
    wait_s: WaitSeconds = 0,
) -> Annotated[CallToolResult, TrainingStatus]:
    """Start training a LoRA adapter on a code base, locally and in the background: minutes for a small repository. Omit
    config for a first run: its defaults were measured. Returns immediately with the job, a data summary and a time and
    memory estimate; the job keeps running after you disconnect. Follow it with get_training_status. A project that was added
    in Codebase Gardener needs no training_data: give its id.
    """
    manager, began = ctx.request_context.lifespan_context, time.monotonic()
    given = training_data is not None or records is not None
    data = _one_source("training_data", training_data, records) if given else None
    status = await manager.train_adapter(project_id, data, config, approve=partial(_approve, ctx, project_id))
    if (left_s := wait_s - (time.monotonic() - began)) > 0:  # a cluster may have taken its time to answer
        status = await stream_progress(ctx, manager.watch_training(project_id, status.job_id, timeout_s=left_s))
    return format_status(status, is_new=True)


async def _approve(ctx: Context[PEFTManager, Any], project_id: str, estimate: Estimate) -> None:
    """Ask the person before a training that takes long, or for which a large base model is sent."""
    if (estimate.seconds or 0) > LONG_S or estimate.sent_bytes > ASK_ABOVE_BYTES:
        await require_consent(ctx, training_question(project_id, estimate), "No training was started")


def training_question(project_id: str, estimate: Estimate) -> str:
    time = "an unknown time" if estimate.seconds is None else f"about {rough_duration(estimate.seconds)}"
    cluster = f" {estimate.cluster}" if estimate.cluster else ""
    return (
        f"Start a training for project {project_id} that takes {time} and {estimate.memory_bytes / 1e9:.1f} GB of memory?"
        f"{cluster} It runs in the background, and can be stopped at any time."
    )


async def inspect_training_data(
    training_data: TrainingData = None,
    records: Records = None,
    *,
    ctx: Context[PEFTManager, Any],
    config: TrainingConfig = DEFAULTS,
) -> CallToolResult:
    """Dry run of train_adapter. Use it before a first or long run, or when results look wrong. Returns the dataset size,
    exclusions and reasons, held-out files, 3 sample examples, chosen settings, time and memory. Read-only; takes seconds, up
    to a minute for a huge repository.
    """
    data = _one_source("training_data", training_data, records)
    return format_inspection(await ctx.request_context.lifespan_context.inspect_training_data(data, config))


async def propose_study_plan(
    project_id: ProjectId,
    ctx: Context[PEFTManager, Any],
    training_data: Annotated[
        str | None, Field(description="Directory of the code; omit for a project that was trained.")
    ] = None,
) -> CallToolResult:
    """Say which functions and classes of a code base are most worth questions and answers that you write for training: most
    called, undocumented, new since the last training; with signature, callers, excerpt, and the record format. Read-only.
    """
    return format_study_plan(await ctx.request_context.lifespan_context.propose_study_plan(project_id, training_data))


async def evaluate_adapter(
    adapter_path: AdapterPath,
    evaluation_data: Annotated[
        TrainingData,
        Field(
            description="Code to evaluate on, as for train_adapter. The adapter's own repository is fine: text that it was "
            "trained on is left out, if recorded."
        ),
    ] = None,
    records: Records = None,
    *,
    ctx: Context[PEFTManager, Any],
    base_model: BaseRef = None,
    config: DataSelection = ALL_DATA,
    accept_unproven_base: Annotated[
        bool, Field(description="Evaluate although nothing proves that the adapter belongs to this base (shape_only).")
    ] = False,
    wait_s: WaitSeconds = 0,
) -> Annotated[CallToolResult, TrainingStatus]:
    """Measure whether an adapter (trained here or not) helps on any code. Not needed after train_adapter, which ends with the
    same evaluation. Takes minutes in the training queue. Returns immediately with the job; get_training_status has the
    result: base model against adapter with confidence intervals, a verdict (helps, no_difference, harms) and a report.
    """
    manager = ctx.request_context.lifespan_context
    status = await manager.evaluate_adapter(
        adapter_path,
        _one_source("evaluation_data", evaluation_data, records),
        base_model,
        config=config,
        accept_unproven_base=accept_unproven_base,
    )
    if wait_s:
        statuses = manager.watch_training(status.project_id, status.job_id, timeout_s=wait_s)
        status = await stream_progress(ctx, statuses)
    return format_status(status, is_new=True)


async def compare_adapters(
    adapter_a: ComparedAdapter,
    adapter_b: ComparedAdapter,
    evaluation_data: Annotated[
        str | None,
        Field(description="As for evaluate_adapter. Omit for what the newer one's training held out."),
    ] = None,
    *,
    ctx: Context[PEFTManager, Any],
    base_model: str | None = None,
    accept_unproven_base: bool = False,
    wait_s: WaitSeconds = 0,
) -> CallToolResult:
    """Find out which of two adapters of one base model to keep, or neither: all three are measured on the same code, on which
    no adapter was trained. A background job like evaluate_adapter, with confidence intervals.
    """
    manager = ctx.request_context.lifespan_context
    status = await manager.compare_adapters(
        adapter_a, adapter_b, evaluation_data, base_model, accept_unproven_base=accept_unproven_base
    )
    if wait_s:
        statuses = manager.watch_training(status.project_id, status.job_id, timeout_s=wait_s)
        status = await stream_progress(ctx, statuses)
    return format_status(status, is_new=True)


async def get_training_status(
    project_id: ProjectId,
    ctx: Context[PEFTManager, Any],
    job_id: JobId = None,
    wait_s: WaitSeconds = WAIT_S,
    picture: Annotated[bool, Field(description="Add the loss curve as an image.")] = False,
) -> Annotated[CallToolResult, TrainingStatus]:
    """Follow a training or evaluation. Waits up to wait_s seconds for its end and streams progress; call it again until
    status is completed, failed, cancelled or interrupted. Returns phase, step, loss, speed and time left; at the end whether
    the adapter helps on held-out files, or why the job failed.
    """
    manager = ctx.request_context.lifespan_context
    status = await stream_progress(ctx, manager.watch_training(project_id, job_id, timeout_s=wait_s))
    image = None
    if picture:
        image = await manager.draw_training(project_id, status.job_id, title=f"{project_id}: {short_headline(status)}")
    return format_status(status, image)


async def cancel_training(
    project_id: ProjectId, ctx: Context[PEFTManager, Any], job_id: JobId = None
) -> CallToolResult:
    """Stop a job: immediately while it is queued, within seconds while it runs. Its last checkpoint is kept for
    resume_training; published adapters are not affected. Returns the job's status.
    """
    return format_status(await ctx.request_context.lifespan_context.cancel_training(project_id, job_id))


async def resume_training(
    job_id: Annotated[str, Field(description="An interrupted, cancelled or failed job.")],
    ctx: Context[PEFTManager, Any],
) -> CallToolResult:
    """Queue a job that ended early again. It continues from its last checkpoint, with the same data and settings."""
    return format_status(await ctx.request_context.lifespan_context.resume_training(job_id))


async def refresh_project(
    project_id: ProjectId,
    ctx: Context[PEFTManager, Any],
    retrain_when: Annotated[
        RetrainWhen | None,
        Field(
            description="Only set when it is retrained by itself, while the machine is free; trains now only if due."
        ),
    ] = None,
) -> CallToolResult:
    """Bring a project's adapter up to date with its code: trains in the background on the same source with the same settings,
    or says that nothing has changed. Returns the job, as train_adapter, or why there is none.
    """
    manager = ctx.request_context.lifespan_context
    approve = partial(_approve, ctx, project_id)
    return format_refreshed(await manager.refresh_project(project_id, retrain_when, approve=approve))


TOOLS = [
    make_tool(train_adapter, "Train an adapter", meta=SHOWN_ON_PAGE),
    make_tool(inspect_training_data, "Inspect training data", reads=True),
    make_tool(propose_study_plan, "Propose a study plan", reads=True),
    make_tool(refresh_project, "Refresh a project", repeatable=True),
    make_tool(evaluate_adapter, "Evaluate an adapter", meta=SHOWN_ON_PAGE),
    make_tool(compare_adapters, "Compare two adapters", meta=SHOWN_ON_PAGE),
    make_tool(get_training_status, "Training status", reads=True, meta=SHOWN_ON_PAGE),
    make_tool(cancel_training, "Cancel a training", destroys=True, repeatable=True),
    make_tool(resume_training, "Resume a training", meta=SHOWN_ON_PAGE),
]
