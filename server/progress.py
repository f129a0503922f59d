"""Job status → progress notifications, while a call is open and never after it."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from mcp.server.mcpserver import Context

from peft_core.jobs.report import headline
from peft_core.results import TrainingStatus

INTERVAL_S = 1.0  # at most one notification in this time
NUDGE = 0.01  # MCP wants `progress` to grow each time, even when only the message is new


async def stream_progress(ctx: Context[Any, Any], statuses: AsyncIterator[TrainingStatus]) -> TrainingStatus:
    """Forward statuses as progress (percent of 100) and return the last one. Needs at least one status."""
    latest: TrainingStatus | None = None
    shown, sent, sent_at = "", -NUDGE, float("-inf")
    async for latest in statuses:
        line = headline(latest)
        now = time.monotonic()
        if line == shown or now - sent_at < INTERVAL_S:
            continue
        sent = max(latest.progress_percent, sent + NUDGE)
        shown, sent_at = line, now
        await ctx.report_progress(sent, 100.0, line)
    if latest is None:
        raise ValueError("no status to report")
    return latest
