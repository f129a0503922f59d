"""How many threads write tokens fastest, at this moment.

A prompt is read in large matrix products, for which every core helps. A token is hundreds of small ones: on two quiet
cores two threads wrote 29 tokens/s where one wrote 18, and 8 as soon as another process took its share of the machine
(bundled base). So both are tried, again and again, for two tokens each. Each row of a matrix-vector product is one
thread's work: how many there are does not change the numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

TRIAL = 2  # tokens by which a number of threads is judged
PERIOD = 64  # tokens after which it is judged again


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
        self._tokens = 0
        self._threads = most
        self._fastest: dict[int, float] = {}  # seconds for a token, by number of threads
        self._last = 0.0

    def prompt(self) -> None:
        self._tokens = 0
        self._choose(self._most)

    def token(self) -> None:
        if self._most == 1:
            return
        now = self._clock()
        if self._tokens > 0:  # the first one's time is the prompt's
            taken = now - self._last
            self._fastest[self._threads] = min(taken, self._fastest.get(self._threads, taken))
        self._last = now
        match self._tokens % PERIOD:
            case 0:
                self._fastest.clear()
                self._choose(self._most)
            case position if position == TRIAL:
                self._choose(1)
            case position if position == 2 * TRIAL:
                self._choose(min(self._fastest, key=self._fastest.__getitem__))
        self._tokens += 1

    def _choose(self, threads: int) -> None:
        self._threads = threads
        self._use(threads)
