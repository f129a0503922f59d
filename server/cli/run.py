"""Carry out a command of `peft-mcp`."""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections.abc import Awaitable, Callable
from contextlib import redirect_stdout
from functools import partial

import anyio

from peft_core.config import Settings
from peft_core.errors import PeftMcpError
from peft_core.manager import PEFTManager
from server.cli import exit_codes, jobs, listings, refresh
from server.cli.doctor import doctor
from server.cli.terminal import Terminal

COMMANDS: dict[str, Callable[[PEFTManager, Namespace, Terminal], Awaitable[int]]] = {
    "train": jobs.train,
    "status": jobs.show_status,
    "refresh": refresh.refresh,
    "evaluate": jobs.evaluate,
    "compare": jobs.compare,
    "cancel": jobs.cancel,
    "resume": jobs.resume,
    "list": listings.list_adapters,
    "disk": listings.disk,
    "doctor": doctor,
}


def run(options: Namespace, settings: Settings) -> int:
    """Carry out a command and return the exit code."""
    terminal = Terminal(sys.stdout, sys.stderr, as_json=getattr(options, "json", False))
    try:
        if options.command == "serve":
            from server.cli.serve import serve  # noqa: PLC0415 -- a web server, which the others do not need

            serve(settings, options.port, terminal)
            return exit_codes.DONE
        with redirect_stdout(sys.stderr):  # what a library prints must not be taken for a result
            return anyio.run(partial(_run, COMMANDS[options.command], settings, options, terminal))
    except PeftMcpError as error:
        terminal.error(error)
        return exit_codes.REFUSED
    except BrokenPipeError:  # such as `peft-mcp list | head -1`
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # so that the flush at the exit does not fail again
        return exit_codes.DONE
    except KeyboardInterrupt:  # while a request is checked; `follow` handles it later
        queues = options.command in ("train", "evaluate", "compare", "resume", "refresh")
        advice = " `peft-mcp status` shows whether a job was queued before." if queues else ""
        terminal.note(f"peft-mcp: interrupted.{advice}")
        return exit_codes.LEFT_RUNNING


async def _run(
    command: Callable[[PEFTManager, Namespace, Terminal], Awaitable[int]],
    settings: Settings,
    options: Namespace,
    terminal: Terminal,
) -> int:
    async with PEFTManager(settings) as manager:
        return await command(manager, options, terminal)
