"""A request to stop: by signal, by the death of the parent, or because nobody reads the events any more."""

from __future__ import annotations

import os
import signal
import threading
import time

EXIT_CODE = 128 + signal.SIGTERM
# Within five seconds of its parent's death this process is gone, and whoever asks is told so. A step and a checkpoint take
# less, mostly; where they do not, the checkpoint before it stands.
_POLL_S = 0.25
_GRACE_S = 3.0


class Cancelled(Exception):
    """Raised at the next safe point after a request to stop."""


class StopFlag:
    """Remembers that this process was asked to stop; work asks at its safe points."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        self._event.set()

    def check(self) -> None:
        """Raise Stopped if this process was asked to stop."""
        if self.requested:
            raise Cancelled


def stop_on_signals(stop: StopFlag) -> None:
    """SIGTERM (the runner) and SIGINT (a person at a terminal) end the run at the next micro-batch."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.request())


def stop_without_parent(stop: StopFlag, parent: int) -> None:
    """Stop when `parent` (a pid) is no longer this process's parent; leave by force after a grace period.

    An orphan has another parent, so the comparison cannot be fooled by a reused pid.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        stop.request()
        time.sleep(_GRACE_S)
        os._exit(EXIT_CODE)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
