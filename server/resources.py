"""Resources: `training://{job_id}`, a job's status with update notifications in both protocol eras, and
`adapter://{project_id}`, what is recorded about a project's adapter.

Modern clients listen (`subscriptions/listen`): the SDK's bus reaches them. Older ones subscribe (`resources/subscribe`),
for which the SDK has no public hook in `MCPServer`: the one use of its low-level server is here.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import Any

import anyio
from mcp.server.context import ServerRequestContext
from mcp.server.mcpserver import Context, MCPServer
from mcp.server.mcpserver.exceptions import ResourceError, ResourceNotFoundError
from mcp.server.session import ServerSession
from mcp.server.subscriptions import InMemorySubscriptionBus, ResourceUpdated
from mcp.types import EmptyResult, SubscribeRequestParams, UnsubscribeRequestParams

from peft_core.errors import AdapterNotFound, InvalidArgument, JobNotFound, PeftMcpError
from peft_core.manager import PEFTManager

POLL_INTERVAL_S = 1.0  # how often the store is asked for changed jobs, and so the shortest time between two updates

log = logging.getLogger(__name__)  # in this process the SDK's logging decides; structlog would cost 0.1 s at the start


class TrainingUpdates:
    """Who wants to hear of which job, and the loop that tells them."""

    def __init__(self) -> None:
        self.bus = InMemorySubscriptionBus()
        self._sessions: defaultdict[str, list[ServerSession]] = defaultdict(list)

    async def subscribe(self, ctx: ServerRequestContext[Any], params: SubscribeRequestParams) -> EmptyResult:
        if ctx.session not in self._sessions[str(params.uri)]:
            self._sessions[str(params.uri)].append(ctx.session)
        return EmptyResult()

    async def unsubscribe(self, _: ServerRequestContext[Any], params: UnsubscribeRequestParams) -> EmptyResult:
        self._sessions.pop(str(params.uri), None)
        return EmptyResult()

    async def tell(self, manager: PEFTManager) -> None:
        """Until cancelled: publish each change of a job to its subscribers."""
        cursor: int | None = None
        warned = ""
        while True:
            try:
                await manager.ensure_runner()  # a job whose process was killed changes only when somebody finds out
                cursor, changed = await manager.changed_jobs(cursor)
                warned = ""
            except Exception as error:  # noqa: BLE001 -- whatever it is, it must not end the session; it looks again soon
                problem = error.message if isinstance(error, PeftMcpError) else repr(error)
                if problem != warned:  # once, not every second for as long as a disk is full
                    log.warning("cannot look for changed jobs: %s", problem)
                changed, warned = [], problem
            for job_id in changed:
                await self._publish(f"training://{job_id}")
            await anyio.sleep(POLL_INTERVAL_S)

    async def _publish(self, uri: str) -> None:
        """To all who listen; who cannot be reached any more is not told again."""
        try:
            await self.bus.publish(ResourceUpdated(uri=uri))
        except Exception as error:  # noqa: BLE001 -- as in `tell`
            log.warning("cannot publish %s: %r", uri, error)
        for session in list(self._sessions.get(uri, ())):
            try:
                await session.send_resource_updated(uri)
            except Exception as error:  # noqa: BLE001 -- a session that was closed must not end the others
                log.warning("cannot tell of %s: %r", uri, error)
                for sessions in self._sessions.values():
                    if session in sessions:
                        sessions.remove(session)


def add_adapter_resource(mcp: MCPServer[PEFTManager]) -> None:
    @mcp.resource(
        "adapter://{project_id}",
        title="Adapter",
        description="A project's current adapter: where it is, its manifest (base, data, run, measurements) and its card.",
        mime_type="application/json",
    )
    async def adapter(project_id: str, ctx: Context[PEFTManager, Any]) -> str:
        try:
            document = await ctx.request_context.lifespan_context.read_card(project_id)
        except (AdapterNotFound, InvalidArgument) as error:
            raise ResourceNotFoundError(str(error)) from error
        except PeftMcpError as error:
            raise ResourceError(str(error)) from error
        return document.model_dump_json(indent=2)


def add_training_resource(mcp: MCPServer[PEFTManager], updates: TrainingUpdates) -> None:
    @mcp.resource(
        "training://{job_id}",
        title="Training job",
        description="Status of one training job, as get_training_status gives it. Subscribe to hear of changes.",
        mime_type="application/json",
    )
    async def training(job_id: str, ctx: Context[PEFTManager, Any]) -> str:
        try:
            status = await ctx.request_context.lifespan_context.get_job(job_id)
        except JobNotFound as error:
            raise ResourceNotFoundError(str(error)) from error
        except PeftMcpError as error:
            raise ResourceError(str(error)) from error
        return status.model_dump_json(indent=2)

    low_level = mcp._lowlevel_server  # noqa: SLF001 -- see the module's docstring
    low_level.add_request_handler("resources/subscribe", SubscribeRequestParams, updates.subscribe)
    low_level.add_request_handler("resources/unsubscribe", UnsubscribeRequestParams, updates.unsubscribe)
