"""How many threads compute fastest at this moment, for training and for token-by-token generation.

People work on the machine while it trains, and next to another busy process one more thread can be a loss: the others wait for
the thread that shares its core. Both tuners therefore try several numbers of threads again and again.

Training (`ThreadTuner`) probes the matrix product that dominates it, between optimiser steps. Measured on two cores, in GFLOP/s
with one thread, with two, and with the number that the probe chose: 170, 329, 327 on a quiet machine; 171, 149, 168 next to
one busy process; 113, 147, 139 next to two.

Generation (`DecodeThreadTuner`) times the tokens themselves. A prompt is large products, for which every core helps; a token is
hundreds of small ones. On two idle cores, two threads generate 29 tokens/s and one generates 18; next to another process, two
generate 8.

Reproducibility: MKL's products give the same bits with one thread and two, except where a long inner axis is split among
threads: the gradient at the head, [256, 49152] x [49152, 576], differs in the last bits. A run therefore repeats bit for bit if
the number of threads is fixed (OMP_NUM_THREADS) or happens to be the same, and up to float32 rounding (1e-7 of the loss) else.
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
_MAX_SHARE = 0.01  # of the run time that probes may take, on a slow machine too
_ROUNDS = 5  # all candidates take turns, so that other load affects them alike
_CLEARLY_FASTER = 1.1  # smaller gains are noise, and would change the last bits of results to no purpose
_NEARLY_FASTEST = 1.05  # short probes flatter more threads: they report 0.97 for a true ratio of 0.87
PROBE_SHAPE = (512, 576, 1536)  # the bundled model's widest layer, 0.9 GFLOP; larger layers gain even more from threads

TRIAL_TOKENS = 3  # tokens by which a number of threads is judged
PERIOD_TOKENS = 64  # tokens until the next trial, counted over all answers

Probe = Callable[[Sequence[int]], Mapping[int, float]]
"""Returns the seconds that the work takes with each of these numbers of threads."""

_log = structlog.get_logger(__name__)


class _Tuner:
    """The number of threads in use, of at most `most`, and how to set it."""

    def __init__(self, most: int, use: Callable[[int], None], clock: Callable[[], float]) -> None:
        self._most = most
        self._use = use
        self._clock = clock
        self._threads = most

    @property
    def _has_choice(self) -> bool:
        return self._most > 1


class ThreadTuner(_Tuner):
    """Sets torch's number of threads for training on a CPU. A user's OMP_NUM_THREADS takes precedence."""

    def __init__(
        self,
        most: int,
        probe: Probe | None = None,
        use: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(most, use, clock)
        self._candidates = candidates(most)
        self._probe = measure if probe is None else probe
        self._due = clock()

    @classmethod
    def for_training(cls, device: str) -> ThreadTuner:
        """Return a tuner for all usable cores, or one that does nothing off the CPU or with OMP_NUM_THREADS set."""
        is_free = device == "cpu" and "OMP_NUM_THREADS" not in os.environ
        return cls(usable_cores() if is_free else 1)

    def keep_up(self) -> None:
        """Probe if it is time to. Call it between two steps; probes take at most a hundredth of the time."""
        began = self._clock()
        if not self._has_choice or began < self._due:
            return
        seconds = self._probe(self._candidates)
        before, self._threads = self._threads, decide(self._threads, seconds)
        self._use(self._threads)
        if self._threads != before:
            milliseconds = {str(threads): round(1e3 * taken, 1) for threads, taken in seconds.items()}
            _log.info("threads_chosen", threads=self._threads, before=before, product_ms=milliseconds)
        now = self._clock()
        self._due = now + max(_PERIOD_S, (now - began) / _MAX_SHARE)


class DecodeThreadTuner(_Tuner):
    """Sets torch's number of threads for generation. Call `prompt` when a prompt begins and `token` after each token.

    The number does not change the result: each row of a matrix-vector product is computed by one thread.
    """

    def __init__(
        self,
        most: int,
        use: Callable[[int], None] = torch.set_num_threads,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(most, use, clock)
        self._seconds: dict[int, float] = {}  # the shortest time for a token, by number of threads
        self._position = 0  # in the period
        self._last: float | None = None  # when the last token was finished; None: the next one includes the prompt

    def prompt(self) -> None:
        """Use all threads for a prompt."""
        self._last = None
        self._use(self._most)

    def token(self) -> None:
        """Record the time of a token, and set the threads for the next one."""
        if not self._has_choice:
            return
        now = self._clock()
        if self._last is not None:
            self._record(now - self._last)
        self._last = now
        self._use(self._threads)

    def _record(self, taken: float) -> None:
        self._seconds[self._threads] = min(taken, self._seconds.get(self._threads, taken))
        self._position = (self._position + 1) % PERIOD_TOKENS
        match self._position:
            case 0:
                self._seconds.clear()
                self._threads = self._most
            case position if position == TRIAL_TOKENS:
                self._threads = 1
            case position if position == 2 * TRIAL_TOKENS:
                self._threads = min(self._seconds, key=self._seconds.__getitem__)


def candidates(cores: int) -> tuple[int, ...]:
    """Return the numbers of threads to try, descending: all cores, all but one, half of them, and one."""
    return tuple(sorted({cores, max(1, cores - 1), max(1, cores // 2), 1}, reverse=True))


def decide(current: int, seconds: Mapping[int, float]) -> int:
    """Return the number of threads to use next, given the `seconds` of a product with each.

    That is the smallest number that is nearly the fastest; more threads than now are used only for a clear gain.
    """
    shortest = min(seconds.values())
    enough = min(threads for threads, taken in seconds.items() if taken <= _NEARLY_FASTEST * shortest)
    return enough if enough < current or seconds[current] >= _CLEARLY_FASTER * shortest else current


def measure(numbers: Sequence[int]) -> dict[int, float]:
    """Return the mean seconds of a product with each number of threads.

    The mean, not the best: between two time slices of another process a product runs undisturbed, and the best of several would
    favour two threads where they are slower. Products run in blocks, because the scheduler favours a thread that just slept.
    """
    rows, inner, columns = PROBE_SHAPE
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
