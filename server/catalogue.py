"""What clients can choose from: adapters and jobs as listed resources, and the completion of their ids while one types.

`MCPServer` lists registered resources only and gives its completion handler no context, so both requests are handled by
its low-level server.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from mcp.server.context import ServerRequestContext
from mcp.server.mcpserver import MCPServer
from mcp.shared.exceptions import MCPError
from mcp.types import (
    INTERNAL_ERROR,
    Annotations,
    CompleteRequestParams,
    CompleteResult,
    Completion,
    ListResourcesResult,
    PaginatedRequestParams,
    PromptReference,
    Resource,
    ResourceTemplateReference,
)

from peft_core.errors import PeftMcpError, sanitize
from peft_core.manager import PEFTManager
from peft_core.schemas.results import AdapterSummary, JobSummary
from peft_core.system.durations import epoch_seconds, rough_age
from server.resources import ADAPTER_URI, TRAINING_URI

MAX_LISTED = 50  # of each kind; a list is for choosing, and older ones can be read by their id
MAX_COMPLETIONS = 100  # the protocol's limit
JSON = "application/json"


def add_catalogue(mcp: MCPServer[PEFTManager]) -> None:
    """Answer resources/list and completion/complete from the state on disk."""

    async def list_resources(
        ctx: ServerRequestContext[PEFTManager, Any], _: PaginatedRequestParams | None
    ) -> ListResourcesResult:
        with _errors_with_text():
            current = await current_resources(ctx.lifespan_context, time.time())
        return ListResourcesResult(resources=[*await mcp.list_resources(), *current])

    async def complete(ctx: ServerRequestContext[PEFTManager, Any], params: CompleteRequestParams) -> CompleteResult:
        with _errors_with_text():
            known = await _known_values(ctx.lifespan_context, params.ref, params.argument.name)
        typed = params.argument.value.casefold()
        matching = [value for value in known if value.casefold().startswith(typed)]
        return CompleteResult(
            completion=Completion(
                values=matching[:MAX_COMPLETIONS],
                total=len(matching),
                has_more=len(matching) > MAX_COMPLETIONS,
            )
        )

    low_level = mcp._lowlevel_server  # noqa: SLF001 -- see the module's docstring
    low_level.add_request_handler("resources/list", PaginatedRequestParams, list_resources)
    low_level.add_request_handler("completion/complete", CompleteRequestParams, complete)


@contextmanager
def _errors_with_text() -> Iterator[None]:
    """Convert errors of the core to those whose text reaches a client, such as that of a damaged database."""
    try:
        yield
    except PeftMcpError as error:
        raise MCPError(code=INTERNAL_ERROR, message=str(error)) from error


async def current_resources(manager: PEFTManager, now: float) -> list[Resource]:
    """Return each project's current adapter and the newest jobs. `now`: seconds since the epoch."""
    adapters = await manager.current_adapters(MAX_LISTED)
    jobs = await manager.newest_jobs(MAX_LISTED)
    return [*(_adapter_resource(adapter, now) for adapter in adapters), *(_job_resource(job, now) for job in jobs)]


def _adapter_resource(adapter: AdapterSummary, now: float) -> Resource:
    """Name the adapter as a person would. Its manifest may be forged or written by hand: nothing in it is taken for granted."""
    project_id = sanitize(adapter.project_id)
    created_at = epoch_seconds(adapter.created_at)
    verdict = adapter.verdict.replace("_", " ") if adapter.verdict else "not evaluated"
    facts = [verdict, *([f"{rough_age(now - created_at)} old"] if created_at is not None else [])]
    perplexity = ""
    if adapter.base_perplexity is not None and adapter.adapter_perplexity is not None:
        perplexity = (
            f" Held-out perplexity {adapter.base_perplexity:.2f} (base), {adapter.adapter_perplexity:.2f} (adapter)."
        )
    return Resource(
        uri=ADAPTER_URI.format(project_id=quote(adapter.project_id, safe="")),
        name=project_id,
        title=f"{project_id}: {', '.join(facts)}",
        description=f"Current adapter of project {project_id}, for {sanitize(adapter.base_model)}.{perplexity}",
        mime_type=JSON,
        annotations=_modified_at(created_at),
    )


def _job_resource(job: JobSummary, now: float) -> Resource:
    state = job.status.replace("_", " ")
    verdict = [job.verdict.replace("_", " ")] if job.verdict else []
    if job.keep is not None:
        verdict = [f"keep {job.keep.replace('_', ' ')}"]
    facts = [f"{job.kind} {state}", *verdict, f"{rough_age(now - job.created_at)} old"]
    return Resource(
        uri=TRAINING_URI.format(job_id=job.job_id),
        name=job.job_id,
        title=f"{job.project_id}: {', '.join(facts)}",
        description=f"Status of job {job.job_id} of project {job.project_id}, with {sanitize(job.base_model)}.",
        mime_type=JSON,
        annotations=_modified_at(job.updated_at),
    )


def _modified_at(seconds: float | None) -> Annotations | None:
    if seconds is None:
        return None
    return Annotations(last_modified=datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds"))


async def _known_values(
    manager: PEFTManager, ref: PromptReference | ResourceTemplateReference, argument: str
) -> list[str]:
    """Return the values that an argument of a prompt or a resource's template can have, most likely first."""
    match ref, argument:
        case ResourceTemplateReference(uri=uri), "job_id" if uri == TRAINING_URI:
            return await manager.job_ids()
        case ResourceTemplateReference(uri=uri), "project_id" if uri == ADAPTER_URI:
            return await _projects_with_adapter(manager)
        case PromptReference(name="complete_with_adapter"), "project_id":
            return await _projects_with_adapter(manager)
        case PromptReference(name="train_and_evaluate"), "project_id":
            return await manager.project_ids()
    return []


async def _projects_with_adapter(manager: PEFTManager) -> list[str]:
    return [adapter.project_id for adapter in await manager.current_adapters(MAX_COMPLETIONS)]
