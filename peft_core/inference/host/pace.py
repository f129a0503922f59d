"""How many threads write tokens fastest, at this moment.

A prompt is read in large matrix products, for which every core helps. A token is hundreds of small ones: on two quiet
cores two threads wrote 29 tokens/s where one wrote 18, and 8 as soon as another process took its share of the machine
(bundled base). So both are tried, again and again, for a few tokens each. Each row of a matrix-vector product is one
thread's work: how many there are does not change the numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

TRIAL = 3  # tokens by which a number of threads is judged
PERIOD = 64  # tokens after which it is judged again, over all answers


class Pace:
    """Tell it when a prompt begins and of every token; it sets the threads."""

    def __init__(
        self,
        most: int,
        use: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._most = most
        self._use = use
        self._clock = clock
        self._threads = most  # to write with
        self._seconds: dict[int, float] = {}  # the shortest time for a token, by number of threads
        self._position = 0  # in the period
        self._last: float | None = None  # when the last token was there; None: its successor's time is the prompt's

    def prompt(self) -> None:
        self._last = None
        self._use(self._most)

    def token(self) -> None:
        if self._most == 1:
            return
        now = self._clock()
        if self._last is not None:
            self._judge(now - self._last)
        self._last = now
        self._use(self._threads)

    def _judge(self, taken: float) -> None:
        self._seconds[self._threads] = min(taken, self._seconds.get(self._threads, taken))
        self._position = (self._position + 1) % PERIOD
        match self._position:
            case 0:
                self._seconds.clear()
                self._threads = self._most
            case position if position == TRIAL:
                self._threads = 1
            case position if position == 2 * TRIAL:
                self._threads = min(self._seconds, key=self._seconds.__getitem__)
