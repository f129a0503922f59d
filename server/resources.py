"""MCP resources: `training://{job_id}`, a job's status with update notifications; `adapter://{project_id}`, a project's
current adapter; and `settings://training`, every setting of a training.

Clients of the current protocol listen (`subscriptions/listen`), which the SDK's bus serves. Older ones subscribe
(`resources/subscribe`), for which `MCPServer` has no public hook: so it is added to its low-level server, as in `catalogue.py`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
from mcp.server.context import ServerRequestContext
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError
from mcp.server.session import ServerSession
from mcp.server.subscriptions import InMemorySubscriptionBus, ResourcesListChanged, ResourceUpdated
from mcp.types import EmptyResult, SubscribeRequestParams, UnsubscribeRequestParams

from peft_core.errors import AdapterNotFound, InvalidArgument, JobNotFound, PeftMcpError
from peft_core.manager import PEFTManager
from peft_core.schemas.training import SETTINGS_URI, TrainingConfig
from peft_core.schemas.validation import describe_settings
from server.status_text import for_client

ADAPTER_URI = "adapter://{project_id}"
TRAINING_URI = "training://{job_id}"
POLL_INTERVAL_S = 1.0  # how often the store is searched for changed jobs, and so the shortest time between two updates

log = logging.getLogger(__name__)  # the SDK configures logging in this process; importing structlog would take 0.1 s


class TrainingUpdates:
    """The subscriptions to jobs, and the loop that publishes changes to them."""

    def __init__(self) -> None:
        self.bus = InMemorySubscriptionBus()
        self._sessions: defaultdict[str, list[ServerSession]] = defaultdict(list)  # by URI

    async def subscribe(self, ctx: ServerRequestContext[Any], params: SubscribeRequestParams) -> EmptyResult:
        sessions = self._sessions[str(params.uri)]
        if ctx.session not in sessions:
            sessions.append(ctx.session)
        return EmptyResult()

    async def unsubscribe(self, ctx: ServerRequestContext[Any], params: UnsubscribeRequestParams) -> EmptyResult:
        """Remove the subscription of this session only."""
        self._remove(ctx.session, str(params.uri))
        return EmptyResult()

    async def publish_changes(self, manager: PEFTManager) -> None:
        """Publish each change of a job to its subscribers, and each job that is new or has ended, until cancelled.

        An adapter is published when its job ends, so that the list of resources changes too.
        """
        cursor: int | None = None
        unfinished: set[str] | None = None
        warned = ""
        while True:
            try:
                await manager.ensure_runner()  # a job whose process was killed changes only when that is recorded
                cursor, changed = await manager.changed_jobs(cursor)
                before, unfinished = unfinished, await manager.unfinished_jobs()
                if before not in (None, unfinished):
                    await self.bus.publish(ResourcesListChanged())
                warned = ""
            except Exception as error:  # noqa: BLE001 -- no error may end the session; the next round tries again
                problem = error.message if isinstance(error, PeftMcpError) else repr(error)
                if problem != warned:  # once, not every second for as long as a disk is full
                    log.warning("cannot look for changed jobs: %s", problem)
                changed, warned = [], problem
            for job_id in changed:
                await self._publish(TRAINING_URI.format(job_id=job_id))
            await anyio.sleep(POLL_INTERVAL_S)

    async def _publish(self, uri: str) -> None:
        """Notify all subscribers; drop the sessions that can no longer be reached."""
        try:
            await self.bus.publish(ResourceUpdated(uri=uri))
        except Exception as error:  # noqa: BLE001 -- as in `publish_changes`
            log.warning("cannot publish %s: %r", uri, error)
        for session in list(self._sessions.get(uri, ())):
            try:
                await session.send_resource_updated(uri)
            except Exception as error:  # noqa: BLE001 -- a closed session must not keep updates from the others
                log.warning("dropping a session that cannot be notified of %s: %r", uri, error)
                for subscribed in list(self._sessions):
                    self._remove(session, subscribed)

    def _remove(self, session: ServerSession, uri: str) -> None:
        remaining = [other for other in self._sessions.get(uri, ()) if other is not session]
        if remaining:
            self._sessions[uri] = remaining
        else:
            self._sessions.pop(uri, None)


@contextmanager
def resource_errors() -> Iterator[None]:
    """Convert errors of the core to those whose text reaches a client that reads a resource."""
    try:
        yield
    except (AdapterNotFound, InvalidArgument, JobNotFound) as error:
        raise ResourceNotFoundError(str(error)) from error
    except PeftMcpError as error:
        raise ResourceError(str(error)) from error


def add_settings_resource(mcp: MCPServer[PEFTManager]) -> None:
    @mcp.resource(
        SETTINGS_URI,
        title="Training settings",
        description="Every field of config of train_adapter: what it does, what it allows, its default.",
        mime_type="text/markdown",
    )
    def training_settings() -> str:
        return describe_settings(TrainingConfig)


def add_adapter_resource(mcp: MCPServer[PEFTManager]) -> None:
    @mcp.resource(
        ADAPTER_URI,
        title="Adapter",
        description="A project's current adapter: its path, manifest (base model, data, run, results) and model card.",
        mime_type="application/json",
    )
    async def adapter(project_id: str, ctx: Context[PEFTManager, Any]) -> str:
        with resource_errors():
            document = await ctx.request_context.lifespan_context.read_card(project_id)
        return document.model_dump_json(indent=2)


def add_training_resource(mcp: MCPServer[PEFTManager], updates: TrainingUpdates) -> None:
    @mcp.resource(
        TRAINING_URI,
        title="Training job",
        description="The status of one job, as get_training_status returns it. Subscribe to be notified of changes.",
        mime_type="application/json",
    )
    async def training(job_id: str, ctx: Context[PEFTManager, Any]) -> str:
        with resource_errors():
            status = await ctx.request_context.lifespan_context.get_job(job_id)
        return for_client(status).model_dump_json(indent=2)

    low_level = mcp._lowlevel_server  # noqa: SLF001 -- see the module's docstring
    low_level.add_request_handler("resources/subscribe", SubscribeRequestParams, updates.subscribe)
    low_level.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, updates.unsubscribe)
