"""Threads for writing: judged by what tokens take, again and again."""

from __future__ import annotations

import pytest

from peft_core.inference.host.pace import PERIOD, TRIAL, Pace


class Machine:
    """A clock that a token moves on by what it takes with the threads in use."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.threads: list[int] = []
        self.now = 0.0

    def write(self, pace: Pace, tokens: int) -> list[int]:
        """Threads that each token was written with."""
        used = []
        for _ in range(tokens):
            used.append(self.threads[-1])
            self.now += self.seconds[self.threads[-1]]
            pace.token()
        return used


@pytest.mark.parametrize(("seconds", "best"), [({4: 0.03, 1: 0.05}, 4), ({4: 0.12, 1: 0.05}, 1)])
def test_the_faster_is_kept(seconds: dict[int, float], best: int) -> None:
    machine = Machine(seconds)
    pace = Pace(4, machine.threads.append, lambda: machine.now)
    pace.prompt()
    used = machine.write(pace, PERIOD)
    assert used[: 1 + TRIAL] == [4] * (1 + TRIAL)  # the prompt, then the trial
    assert used[1 + TRIAL : 1 + 2 * TRIAL] == [1] * TRIAL
    assert set(used[1 + 2 * TRIAL :]) == {best}


def test_a_machine_that_becomes_busy_is_noticed() -> None:
    machine = Machine({2: 0.03, 1: 0.05})
    pace = Pace(2, machine.threads.append, lambda: machine.now)
    pace.prompt()
    assert machine.write(pace, PERIOD)[-1] == 2
    machine.seconds = {2: 0.12, 1: 0.06}
    assert machine.write(pace, PERIOD)[-1] == 1
    machine.seconds = {2: 0.03, 1: 0.05}
    assert machine.write(pace, PERIOD)[-1] == 2


def test_one_core_needs_no_trial() -> None:
    machine = Machine({1: 0.05})
    pace = Pace(1, machine.threads.append, lambda: machine.now)
    pace.prompt()
    machine.write(pace, 10)
    assert machine.threads == [1]
