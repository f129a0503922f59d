"""How many threads train fastest, at this moment.

People work on the machine while it trains, and next to another process a core more can be a loss: the others wait for the
thread that shares its core. So the numbers of threads that could pay are tried on the matrix product that training consists
of, at the start and again every half a minute, between two optimiser steps.

Measured on two cores, in GFLOP/s, with one thread, with two, and with what the probe chose: 170, 329, 327 on a quiet machine;
171, 149, 168 beside one busy process; 113, 147, 139 beside two.

The same product gives the same bits with one thread and two (MKL), but for the one with a long inner axis, which is cut
among the threads: the head's gradient, [256, 49152] x [49152, 576], differs in the last bits. A run is therefore equal to its
repetition, or to its continuation from a checkpoint, to the bit where the number of threads is fixed (OMP_NUM_THREADS) or
comes out the same, and to float32's rounding (1e-7 of the loss) where it does not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

import structlog
import torch

from peft_core.system.machine import usable_cores

_PERIOD_S = 30.0
_PROBE_S = 0.25  # for all candidates together
_SHARE = 0.01  # of the time that probes may take, on however slow a machine
_ROUNDS = 5  # of all candidates in turn, so that what else the machine does strikes them alike
_CLEARLY = 1.1  # times as fast: less is noise, and not worth other last bits
_NEARLY = 1.05  # times the shortest: short probes flatter the larger number, 0.97 times as fast for 0.87 (see above)
SHAPE = (512, 576, 1536)  # the bundled base's widest layer, 0.9 GFLOP; larger ones gain only more by threads

TokenBudget = Callable[[Sequence[int]], Mapping[int, float]]

_log = structlog.get_logger(__name__)


def candidates(cores: int) -> tuple[int, ...]:
    """All cores; one left to the user; half of them; one: descending."""
    return tuple(sorted({cores, max(1, cores - 1), max(1, cores // 2), 1}, reverse=True))


def decide(current: int, seconds: Mapping[int, float]) -> int:
    """The number of threads to go on with, from the `seconds` that a product takes with each.

    The fewest that are nearly the fastest: more would only take cores from others. Up from there only for a clear gain.
    """
    shortest = min(seconds.values())
    enough = min(threads for threads, taken in seconds.items() if taken <= _NEARLY * shortest)
    return enough if enough < current or seconds[current] >= _CLEARLY * shortest else current


def measure(numbers: Sequence[int]) -> dict[int, float]:
    """Mean seconds of a product with each number of threads.

    The mean, not the best: between two turns of the other process a product runs undisturbed, and the best of several
    says that two threads are twice as fast as one where they are slower. Nor one product at a time: a thread that has just
    slept is let in first, which flatters the larger number.
    """
    rows, inner, columns = SHAPE
    left, right, out = torch.ones(rows, inner), torch.ones(inner, columns), torch.empty(rows, columns)
    block_s = _PROBE_S / (_ROUNDS * len(numbers))
    taken, products = dict.fromkeys(numbers, 0.0), dict.fromkeys(numbers, 0)
    for _ in range(_ROUNDS):
        for threads in numbers:
            torch.set_num_threads(threads)
            torch.mm(left, right, out=out)  # wakes the threads
            began = time.perf_counter()
            passed = 0.0
            while passed < block_s:
                torch.mm(left, right, out=out)
                products[threads] += 1
                passed = time.perf_counter() - began
            taken[threads] += passed
    return {threads: taken[threads] / products[threads] for threads in numbers}


class ThreadTuner:
    """Sets torch's number of threads for a training on the CPU. Whoever sets OMP_NUM_THREADS knows better: it stays."""

    def __init__(
        self,
        most: int,
        measure: TokenBudget = measure,
        use: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._candidates = candidates(most)
        self._measure = measure
        self._use = use
        self._clock = clock
        self._threads = most
        self._due = clock()

    @classmethod
    def for_training(cls, device: str) -> ThreadTuner:
        """All cores may be tried where the CPU computes and nobody has said how many; otherwise nothing is."""
        free = device == "cpu" and "OMP_NUM_THREADS" not in os.environ
        return cls(usable_cores() if free else 1)  # of one candidate nothing is tried or set

    def keep_up(self) -> None:
        """Call it between two steps: probes when it is time to, which takes at most a hundredth of the time."""
        began = self._clock()
        if len(self._candidates) == 1 or began < self._due:
            return
        seconds = self._measure(self._candidates)
        before, self._threads = self._threads, decide(self._threads, seconds)
        self._use(self._threads)
        if self._threads != before:
            milliseconds = {str(threads): round(1e3 * taken, 1) for threads, taken in seconds.items()}
            _log.info("threads_chosen", threads=self._threads, before=before, product_ms=milliseconds)
        now = self._clock()
        self._due = now + max(_PERIOD_S, (now - began) / _SHARE)


# FOLDED FROM peft_core.modeling.threads: How many threads write tokens fastest, at this moment.
#
# A prompt is read in large matrix products, for which every core helps. A token is hundreds of small ones: on two quiet
# cores two threads wrote 29 tokens/s where one wrote 18, and 8 as soon as another process took its share of the machine
# (bundled base). So both are tried, again and again, for a few tokens each. Each row of a matrix-vector product is one
# thread's work: how many there are does not change the numbers.
#

TRIAL = 3  # tokens by which a number of threads is judged
PERIOD = 64  # tokens after which it is judged again, over all answers


class DecodeThreadTuner:
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
