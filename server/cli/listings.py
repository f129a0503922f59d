"""The commands about what is kept: list, disk."""

from __future__ import annotations

import time
from argparse import Namespace

from peft_core.manager import PEFTManager
from peft_core.schemas.counts import counted
from peft_core.schemas.results import AdapterSummary
from peft_core.schemas.storage import DiskUsage, size_in_words
from peft_core.system.durations import age_since
from server.cli import exit_codes
from server.cli.terminal import Terminal, table, with_commands

ADAPTERS = ("PROJECT", "ADAPTER", "CURRENT", "VERDICT", "PERPLEXITY", "SIZE", "AGE", "CODE", "BASE MODEL")


async def list_adapters(manager: PEFTManager, options: Namespace, terminal: Terminal) -> int:
    listed = await manager.list_adapters(options.project)
    now = time.time()
    rows = [_row(adapter, now) for adapter in listed.adapters]
    where = f" of project {options.project}" if options.project else ""
    terminal.result(listed, table(ADAPTERS, rows) if rows else f"There is no adapter{where} yet.")
    if not rows:
        terminal.note("Train one: peft-mcp train PATH")
    return exit_codes.DONE


async def disk(manager: PEFTManager, options: Namespace, terminal: Terminal) -> int:
    usage = await manager.disk_usage(options.free or ())
    terminal.result(usage, _disk_text(usage))
    if usage.items:
        terminal.note("Free what is not needed: peft-mcp disk --free NAME")
    return exit_codes.REFUSED if usage.kept else exit_codes.DONE


def _disk_text(usage: DiskUsage) -> str:
    rows = [
        (
            item.name,
            size_in_words(item.bytes),
            f"{item.description} {f'Kept: {item.reason}' if item.reason else f'If freed: {item.lost}'}",
        )
        for item in usage.items
    ]
    lines = [table(("NAME", "SIZE", "WHAT IT IS"), rows)] if rows else []
    if usage.omitted_items:
        lines.append(f"and {counted(usage.omitted_items, 'smaller one')}")
    return with_commands("\n".join([usage.summary, *lines]))


def _row(adapter: AdapterSummary, now: float) -> tuple[str, ...]:
    measured = adapter.base_perplexity is not None and adapter.adapter_perplexity is not None
    return (
        adapter.project_id,
        adapter.adapter_id,
        "yes" if adapter.current else "",
        adapter.verdict.replace("_", " ") if adapter.verdict else "not evaluated",
        f"{adapter.base_perplexity:.2f} -> {adapter.adapter_perplexity:.2f}" if measured else "",
        f"{adapter.adapter_bytes / 1e6:.1f} MB",
        age_since(adapter.created_at, now),
        adapter.staleness.in_brief if adapter.staleness else "",
        adapter.base_model,
    )
