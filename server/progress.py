"""What long work says → progress notifications, while a call is open and never after it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from mcp.server.mcpserver import Context

from peft_core.jobs.status import headline
from peft_core.schemas.results import TrainingStatus

INTERVAL_S = 1.0  # at most one notification in this time
MIN_PROGRESS_STEP = 0.01  # MCP wants `progress` to grow each time, even when only the message is new


def relay(ctx: Context[Any, Any]) -> Callable[[float, float | None, str], Awaitable[None]]:
    """A function that forwards (done, total, message) as progress: each new stage at once, growth once a second."""
    stage, sent, sent_at = "", -MIN_PROGRESS_STEP, float("-inf")

    async def report(done: float, total: float | None, message: str) -> None:
        nonlocal stage, sent, sent_at
        now = time.monotonic()
        if now - sent_at < INTERVAL_S and (done > 0 or message == stage):
            return
        sent, stage, sent_at = max(done, sent + MIN_PROGRESS_STEP), message, now
        await ctx.report_progress(sent, total, message)

    return report


async def stream_progress(ctx: Context[Any, Any], statuses: AsyncIterator[TrainingStatus]) -> TrainingStatus:
    """Forward statuses as progress (percent of 100) and return the last one. Needs at least one status."""
    latest: TrainingStatus | None = None
    shown, sent, sent_at = "", -MIN_PROGRESS_STEP, float("-inf")
    async for latest in statuses:
        line = headline(latest)
        now = time.monotonic()
        if line == shown or now - sent_at < INTERVAL_S:
            continue
        sent = max(latest.progress_percent, sent + MIN_PROGRESS_STEP)
        shown, sent_at = line, now
        await ctx.report_progress(sent, 100.0, line)
    if latest is None:
        raise ValueError("no status to report")
    return latest
