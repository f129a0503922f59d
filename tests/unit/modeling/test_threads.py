"""Threads of a training: decided by what a product takes with each number of them, again and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch

from peft_core.modeling.threads import ThreadTuner, candidates, decide, measure

QUIET = {2: 2.7, 1: 5.3}
BUSY = {2: 6.0, 1: 5.3}


class Machine:
    """A clock, and what a product takes at the moment."""

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
def test_all_cores_all_but_the_users_half_and_one_are_tried(cores: int, tried: tuple[int, ...]) -> None:
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
def test_the_fewest_that_are_nearly_the_fastest_are_chosen_and_more_only_for_a_clear_gain(
    current: int,
    seconds: dict[int, float],
    chosen: int,
) -> None:
    assert decide(current, seconds) == chosen


def test_a_machine_that_becomes_busy_and_quiet_again_is_noticed() -> None:
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
def test_probes_take_a_hundredth_of_the_time_at_most(probe_s: float) -> None:
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


def test_a_number_that_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch, torch_threads: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ThreadTuner.for_training("cpu").keep_up()
    assert torch.get_num_threads() == torch_threads


def test_products_are_measured_with_each_number(torch_threads: int) -> None:
    seconds = measure((2, 1))
    assert set(seconds) == {1, 2}
    assert all(0 < taken < 10 for taken in seconds.values())
