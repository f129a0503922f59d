"""A child's end of the wire: one JSON object per line on what was standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from pydantic import BaseModel

Write = Callable[[BaseModel], None]


def claim_stdout() -> int:
    """Take standard output for the wire: a stray print of any library goes to standard error from here on."""
    sys.stdout.flush()
    wire = os.dup(1)
    os.dup2(2, 1)
    return wire


def line_writer(fd: int, closed: Callable[[], None]) -> Write:
    """A function that writes one object as one line. `closed` is called when nobody reads any more."""

    def write(said: BaseModel) -> None:
        try:
            line = memoryview(said.model_dump_json().encode() + b"\n")
            while line:
                line = line[os.write(fd, line) :]
        except BrokenPipeError:
            closed()

    return write
