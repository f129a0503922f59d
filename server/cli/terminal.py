"""What a command writes: the result to standard output, everything else to standard error."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from pydantic import BaseModel

from peft_core.errors import PeftMcpError
from peft_core.schemas.results import ErrorInfo, TrainingStatus
from server.status_text import headline, subject

LINE_INTERVAL_S = 30.0  # between two lines of the same phase where no bar can be drawn
# What errors and next steps call the tools, as commands. The others have no command.
_COMMANDS = {
    "train_adapter": "peft-mcp train",
    "get_training_status": "peft-mcp status",
    "refresh_project": "peft-mcp refresh",
    "evaluate_adapter": "peft-mcp evaluate",
    "compare_adapters": "peft-mcp compare",
    "cancel_training": "peft-mcp cancel",
    "resume_training": "peft-mcp resume",
    "list_adapters": "peft-mcp list",
    "serve_adapter": "peft-mcp serve",
    "disk_usage": "peft-mcp disk",
}
_TOOL = re.compile(rf"(?<![\w/.'-])([Cc]all )?({'|'.join(_COMMANDS)})(?![\w/'-])(\([^()]*\))?")


class Terminal:
    """Writes results as text or as JSON.

    Args:
        out: Standard output.
        err: Standard error.
        as_json: Whether results, errors included, are printed as JSON.
    """

    def __init__(self, out: TextIO, err: TextIO, *, as_json: bool) -> None:
        self._out, self._err = out, err
        self._as_json = as_json

    def result(self, result: BaseModel, text: str) -> None:
        """Print `text`, or the result as one JSON object without nulls."""
        print(result.model_dump_json(exclude_none=True) if self._as_json else text, file=self._out, flush=True)

    def confirm(self, question: str) -> bool:
        """Ask a question on the terminal; return whether the answer is yes. Without a terminal it is not."""
        if not (sys.stdin.isatty() and self._err.isatty()):
            return False
        self._err.write(f"{question} [y/N] ")
        self._err.flush()
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    def note(self, text: str) -> None:
        print(text, file=self._err)

    def error(self, error: PeftMcpError) -> None:
        """Print an error; as JSON too, so that a script finds one object on standard output."""
        self.note(f"peft-mcp: {with_commands(str(error))}")
        if self._as_json:
            print(json.dumps({"error": ErrorInfo.from_error(error).model_dump()}), file=self._out, flush=True)

    @contextmanager
    def progress(self) -> Iterator[Callable[[TrainingStatus], None]]:
        """Yield a function that shows the state of a job: as a bar on a terminal, else as a line now and then."""
        if self._err.isatty() and os.environ.get("TERM", "dumb") != "dumb":
            with _bar(self._err) as show:
                yield show
        else:
            yield _lines(self.note)


def with_commands(text: str) -> str:
    """Return a text about tools as one about commands: "Call list_adapters" becomes "Run `peft-mcp list`"."""
    verb = {"Call ": "Run ", "call ": "run ", None: ""}
    return _TOOL.sub(lambda match: f"{verb[match[1]]}`{_COMMANDS[match[2]]}`", text)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    lines = [titles, *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


@contextmanager
def _bar(err: TextIO) -> Iterator[Callable[[TrainingStatus], None]]:
    from rich.console import Console  # noqa: PLC0415 -- only a terminal needs it
    from rich.progress import BarColumn, Progress, TextColumn  # noqa: PLC0415
    from rich.table import Column  # noqa: PLC0415

    columns = (
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    with Progress(*columns, console=Console(file=err), transient=True, expand=True) as bar:
        task = bar.add_task("", total=100)
        yield lambda status: bar.update(
            task, completed=status.progress_percent, description=f"{subject(status)}: {headline(status)}"
        )


def _lines(write: Callable[[str], None]) -> Callable[[TrainingStatus], None]:
    shown, shown_at = None, float("-inf")

    def show(status: TrainingStatus) -> None:
        nonlocal shown, shown_at
        stage, now = (status.status, status.phase), time.monotonic()
        if status.status.is_final:
            return  # the result says so
        if stage != shown or now - shown_at >= LINE_INTERVAL_S:
            shown, shown_at = stage, now
            write(f"{subject(status)}: {headline(status)}")

    return show
