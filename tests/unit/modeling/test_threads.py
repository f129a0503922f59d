"""The number of threads: tuned by timed products in training, by timed tokens in generation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from peft_core.modeling.threads import (
    PERIOD_TOKENS,
    TRIAL_TOKENS,
    DecodeThreadTuner,
    ThreadTuner,
    candidates,
    decide,
    measure,
)

QUIET = {2: 2.7, 1: 5.3}
BUSY = {2: 6.0, 1: 5.3}


class Machine:
    """A clock, and the time of a product with each number of threads."""

    def __init__(self, seconds: dict[int, float], probe_s: float = 0.25) -> None:
        self.seconds = seconds
        self.probe_s = probe_s
        self.now = 0.0
        self.probes: list[float] = []  # when
        self.used: list[int] = []

    def measure(self, numbers: Sequence[int]) -> dict[int, float]:
        self.probes.append(self.now)
        self.now += self.probe_s
        return {threads: self.seconds[threads] for threads in numbers}

    def threads(self) -> ThreadTuner:
        return ThreadTuner(max(self.seconds), self.measure, self.used.append, lambda: self.now)

    def train(self, threads: ThreadTuner, seconds: int) -> None:
        for _ in range(seconds):
            threads.keep_up()
            self.now += 1


@pytest.fixture
def torch_threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.mark.parametrize(("cores", "tried"), [(1, (1,)), (2, (2, 1)), (3, (3, 2, 1)), (16, (16, 15, 8, 1))])
def test_candidates_are_all_cores_all_but_one_half_and_one(cores: int, tried: tuple[int, ...]) -> None:
    assert candidates(cores) == tried


@pytest.mark.parametrize(
    ("current", "seconds", "chosen"),
    [
        (2, QUIET, 2),
        (1, QUIET, 2),
        (2, BUSY, 1),
        (1, BUSY, 1),
        (1, {2: 0.92, 1: 1.0}, 1),  # a gain too small to change for
        (2, {2: 0.92, 1: 1.0}, 2),  # and to give up
        (2, {2: 0.97, 1: 1.0}, 1),  # a core more for nothing
        (16, {16: 1.0, 15: 1.02, 8: 1.9, 1: 14.0}, 15),
        (16, {16: 3.0, 15: 1.1, 8: 1.0, 1: 7.0}, 8),
        (1, {16: 1.0, 15: 1.02, 8: 1.9, 1: 14.0}, 15),
    ],
)
def test_the_fewest_nearly_fastest_threads_are_chosen_and_more_only_for_a_clear_gain(
    current: int, seconds: dict[int, float], chosen: int
) -> None:
    assert decide(current, seconds) == chosen


def test_training_adapts_when_the_machine_becomes_busy_and_quiet() -> None:
    machine = Machine(QUIET)
    threads = machine.threads()
    machine.train(threads, 31)
    assert machine.used[-1] == 2
    machine.seconds = BUSY
    machine.train(threads, 31)
    assert machine.used[-1] == 1
    machine.seconds = QUIET
    machine.train(threads, 31)
    assert machine.used[-1] == 2


@pytest.mark.parametrize("probe_s", [0.25, 3.0])
def test_probes_take_at_most_a_hundredth_of_the_time(probe_s: float) -> None:
    machine = Machine(QUIET, probe_s)
    machine.train(machine.threads(), 1500)
    first, *later = machine.probes
    assert first == 0.0
    assert len(later) * probe_s <= 0.01 * machine.now
    assert len(later) >= 4


def test_one_core_needs_no_probe() -> None:
    machine = Machine({1: 5.3})
    machine.train(machine.threads(), 100)
    assert (machine.probes, machine.used) == ([], [])


def test_omp_num_threads_takes_precedence(monkeypatch: pytest.MonkeyPatch, torch_threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ThreadTuner.for_training("cpu").keep_up()
    assert torch.get_num_threads() == torch_threads


def test_measure_times_every_number_of_threads(torch_threads: int) -> None:
    seconds = measure((2, 1))
    assert set(seconds) == {1, 2}
    assert all(0 < taken < 10 for taken in seconds.values())


class DecodeMachine:
    """A clock that each token advances by its time with the threads in use."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.threads = 0
        self.now = 0.0

    def use(self, threads: int) -> None:
        self.threads = threads

    def tuner(self) -> DecodeThreadTuner:
        return DecodeThreadTuner(max(self.seconds), self.use, lambda: self.now)

    def answer(self, tuner: DecodeThreadTuner, tokens: int) -> list[int]:
        """Return the threads that each token was generated with; the first token uses the prompt's."""
        tuner.prompt()
        used = []
        for _ in range(tokens):
            used.append(self.threads)
            self.now += self.seconds[self.threads]
            tuner.token()
        return used


@pytest.mark.parametrize(("seconds", "best"), [({4: 0.03, 1: 0.05}, 4), ({4: 0.12, 1: 0.05}, 1)])
def test_decoding_keeps_the_faster_number_of_threads(seconds: dict[int, float], best: int) -> None:
    machine = DecodeMachine(seconds)
    used = machine.answer(machine.tuner(), PERIOD_TOKENS)
    assert used[: 1 + TRIAL_TOKENS] == [4] * (1 + TRIAL_TOKENS)
    assert used[1 + TRIAL_TOKENS : 1 + 2 * TRIAL_TOKENS] == [1] * TRIAL_TOKENS
    assert set(used[1 + 2 * TRIAL_TOKENS :]) == {best}


def test_decoding_adapts_when_the_machine_becomes_busy() -> None:
    machine = DecodeMachine({2: 0.03, 1: 0.05})
    tuner = machine.tuner()
    assert machine.answer(tuner, PERIOD_TOKENS)[-1] == 2
    machine.seconds = {2: 0.12, 1: 0.06}
    assert machine.answer(tuner, PERIOD_TOKENS)[-1] == 1
    machine.seconds = {2: 0.03, 1: 0.05}
    assert machine.answer(tuner, PERIOD_TOKENS)[-1] == 2


def test_short_answers_share_trials_and_prompts_use_all_cores() -> None:
    machine = DecodeMachine({2: 0.12, 1: 0.05})
    tuner = machine.tuner()
    machine.answer(tuner, 2 * TRIAL_TOKENS + 1)
    assert machine.answer(tuner, 10) == [2] + [1] * 9


def test_decoding_on_one_core_runs_no_trial() -> None:
    machine = DecodeMachine({1: 0.05})
    assert machine.answer(machine.tuner(), 10) == [1] * 10
