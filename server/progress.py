"""Progress of long calls as MCP notifications, sent only while the call is open."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from mcp.server.mcpserver import Context

from peft_core.schemas.results import TrainingStatus
from server.status_text import headline

INTERVAL_S = 1.0  # shortest time between two notifications
MIN_PROGRESS_STEP = 0.01  # MCP requires `progress` to grow each time, even if only the message changed


def progress_callback(ctx: Context[Any, Any]) -> Callable[[float, float | None, str], Awaitable[None]]:
    """Return a function that sends (done, total, message): each new stage immediately, growth once a second."""
    stage, sent, sent_at = "", -MIN_PROGRESS_STEP, float("-inf")

    async def send(done: float, total: float | None, message: str) -> None:
        nonlocal stage, sent, sent_at
        now = time.monotonic()
        if now - sent_at < INTERVAL_S and (done > 0 or message == stage):
            return
        sent, stage, sent_at = max(done, sent + MIN_PROGRESS_STEP), message, now
        await ctx.report_progress(sent, total, message)

    return send


async def stream_progress(ctx: Context[Any, Any], statuses: AsyncIterator[TrainingStatus]) -> TrainingStatus:
    """Send each status as progress (percent of 100) and return the last one.

    Raises:
        ValueError: there was no status.
    """
    latest: TrainingStatus | None = None
    sent_line, sent, sent_at = "", -MIN_PROGRESS_STEP, float("-inf")
    async for latest in statuses:
        line = headline(latest)
        now = time.monotonic()
        if line == sent_line or now - sent_at < INTERVAL_S:
            continue
        sent = max(latest.progress_percent, sent + MIN_PROGRESS_STEP)
        sent_line, sent_at = line, now
        await ctx.report_progress(sent, 100.0, line)
    if latest is None:
        raise ValueError("no status to report")
    return latest
