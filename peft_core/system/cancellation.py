"""Cancellation of a run at its next safe point: on a signal, on the death of the parent, or when nothing reads its events."""

from __future__ import annotations

import os
import signal
import threading
import time

from peft_core.system.child_process import watch_parent

CANCELLED_EXIT_CODE = 128 + signal.SIGTERM
DETACHED_EXIT_CODE = 128 + signal.SIGHUP  # of a bridge that left a run on a cluster to itself
INTERRUPTED_EXIT_CODE = 75  # EX_TEMPFAIL: of a bridge whose run on a cluster ended without a result, but can be resumed
# An orphan must be gone within five seconds, because the lock that it shares blocks the next runner. A step and a checkpoint
# usually take less time; if they do not, the run resumes from the previous checkpoint.
_GRACE_S = 2.0


class Cancelled(Exception):
    """Raised at the next safe point after a request to stop."""


class Interrupted(Exception):
    """A run on a cluster was lost, or cannot be reached, but its job can be resumed. Its text is for the user."""


class StopFlag:
    """Remembers that this process was asked to stop; the work checks it at its safe points."""

    def __init__(self) -> None:
        self._event = threading.Event()

    @property
    def requested(self) -> bool:
        return self._event.is_set()

    def request(self) -> None:
        self._event.set()

    def check(self) -> None:
        """Raise Cancelled if this process was asked to stop."""
        if self.requested:
            raise Cancelled


def stop_on_signals(stop: StopFlag) -> None:
    """Let SIGTERM (from the runner) and SIGINT (from a terminal) stop the run at its next micro-batch."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.request())


def stop_without_parent(stop: StopFlag, parent: int) -> None:
    """Stop the run when the process `parent` is gone; exit by force if that takes longer than the grace period."""

    def on_death() -> None:
        stop.request()
        time.sleep(_GRACE_S)
        os._exit(CANCELLED_EXIT_CODE)

    watch_parent(parent, on_death)
