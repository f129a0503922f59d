"""Progress of long calls as MCP notifications, sent only while the call is open.

Clients give up on a call that is silent for long, so the latest message is repeated while nothing changes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import anyio
from mcp.server.mcpserver import Context

from peft_core.schemas.results import TrainingStatus
from peft_core.system.durations import format_duration
from server.status_text import headline, subject

INTERVAL_S = 1.0  # shortest time between two notifications
HEARTBEAT_S = 5.0  # longest
MIN_PROGRESS_STEP = 0.01  # MCP requires `progress` to grow each time, even if only the message changed

Report = Callable[[float, float | None, str], Awaitable[None]]  # done, total, message
T = TypeVar("T")


class Recipient(Protocol):
    """Takes the progress of a call that may outlive its request, see `long_calls.py`."""

    async def record(self, done: float, total: float | None, message: str) -> None: ...


recipient: ContextVar[Recipient | None] = ContextVar("recipient", default=None)  # instead of the client


class _Notifications:
    """Progress notifications of one call: each new stage immediately, growth once a second."""

    def __init__(self, ctx: Context[Any, Any]) -> None:
        self._ctx = ctx
        self._began = time.monotonic()
        self._sent, self._sent_at = -MIN_PROGRESS_STEP, float("-inf")
        self._total: float | None = None
        self._message = ""

    async def report(self, done: float, total: float | None, message: str) -> None:
        is_stage = done <= 0 and message != self._message
        if is_stage or time.monotonic() - self._sent_at >= INTERVAL_S:
            await self._send(done, total, message, message)
        else:  # `repeat` sends it, if nothing newer comes
            self._total, self._message = total, message

    async def repeat(self) -> None:
        """Repeat the latest message with the time since the call began, whenever nothing was sent for a while."""
        while True:
            wait_s = self._sent_at + HEARTBEAT_S - time.monotonic()
            if wait_s > 0:
                await anyio.sleep(wait_s)
            elif self._message:
                elapsed = format_duration(time.monotonic() - self._began)
                await self._send(self._sent, self._total, self._message, f"{self._message} ({elapsed})")
            else:
                await anyio.sleep(INTERVAL_S)

    async def _send(self, done: float, total: float | None, message: str, shown: str) -> None:
        self._sent = max(done, self._sent + MIN_PROGRESS_STEP)
        self._total, self._message, self._sent_at = total, message, time.monotonic()
        if (call := recipient.get()) is not None:
            await call.record(self._sent, total, shown)
        else:
            await self._ctx.report_progress(self._sent, total, shown)


async def with_progress(ctx: Context[Any, Any], operation: Callable[[Report], Awaitable[T]]) -> T:
    """Await `operation`, which gets a function that reports (done, total, message), and send its progress to the client."""
    notifications = _Notifications(ctx)
    outcome: list[T] = []
    problem: Exception | None = None
    async with anyio.create_task_group() as group:
        group.start_soon(notifications.repeat)
        try:
            outcome.append(await operation(notifications.report))
        except Exception as error:  # noqa: BLE001 -- raised below, as it is and not in the group's exception
            problem = error
        group.cancel_scope.cancel()
    if problem is not None:
        raise problem
    return outcome[0]


async def stream_progress(ctx: Context[Any, Any], statuses: AsyncIterator[TrainingStatus]) -> TrainingStatus:
    """Send each status as progress (percent of 100) and return the last one.

    Raises:
        ValueError: there was no status.
    """

    async def follow(report: Report) -> TrainingStatus | None:
        latest, sent_line = None, ""
        async for latest in statuses:
            line = headline(latest) if latest.kind == "training" else f"{subject(latest)}: {headline(latest)}"
            if line != sent_line:
                await report(latest.progress_percent, 100.0, line)
                sent_line = line
        return latest

    latest = await with_progress(ctx, follow)
    if latest is None:
        raise ValueError("no status to report")
    return latest
