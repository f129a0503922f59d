"""The child's end of the wire: one event per line on what was standard output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from peft_core.events import EVENT, Event
from peft_core.training.stop import Stop

Emit = Callable[[Event], None]


def claim_stdout() -> int:
    """Take standard output for the events: a stray print of any library goes to standard error from here on."""
    sys.stdout.flush()
    wire = os.dup(1)
    os.dup2(2, 1)
    return wire


def event_writer(fd: int, stop: Stop) -> Emit:
    """A function that writes one event at a time. A reader that has gone away is a request to stop."""

    def emit(event: Event) -> None:
        try:
            line = memoryview(EVENT.dump_json(event) + b"\n")
            while line:
                line = line[os.write(fd, line) :]
        except BrokenPipeError:
            stop.request()

    return emit


def say_nothing(_event: Event) -> None:
    """What processes other than the main one do with events."""
