"""Threads for writing: judged by what tokens take, again and again."""

from __future__ import annotations

import pytest

from peft_core.modeling.threads import PERIOD, TRIAL, DecodeThreadTuner


class Machine:
    """A clock that a token moves on by what it takes with the threads in use."""

    def __init__(self, seconds: dict[int, float]) -> None:
        self.seconds = seconds
        self.threads = 0
        self.now = 0.0

    def use(self, threads: int) -> None:
        self.threads = threads

    def pace(self) -> DecodeThreadTuner:
        return DecodeThreadTuner(max(self.seconds), self.use, lambda: self.now)

    def answer(self, pace: DecodeThreadTuner, tokens: int) -> list[int]:
        """Threads that each token was written with; the first one's are the prompt's."""
        pace.prompt()
        used = []
        for _ in range(tokens):
            used.append(self.threads)
            self.now += self.seconds[self.threads]
            pace.token()
        return used


@pytest.mark.parametrize(("seconds", "best"), [({4: 0.03, 1: 0.05}, 4), ({4: 0.12, 1: 0.05}, 1)])
def test_the_faster_is_kept(seconds: dict[int, float], best: int) -> None:
    machine = Machine(seconds)
    used = machine.answer(machine.pace(), PERIOD)
    assert used[: 1 + TRIAL] == [4] * (1 + TRIAL)
    assert used[1 + TRIAL : 1 + 2 * TRIAL] == [1] * TRIAL
    assert set(used[1 + 2 * TRIAL :]) == {best}


def test_a_machine_that_becomes_busy_is_noticed() -> None:
    machine = Machine({2: 0.03, 1: 0.05})
    pace = machine.pace()
    assert machine.answer(pace, PERIOD)[-1] == 2
    machine.seconds = {2: 0.12, 1: 0.06}
    assert machine.answer(pace, PERIOD)[-1] == 1
    machine.seconds = {2: 0.03, 1: 0.05}
    assert machine.answer(pace, PERIOD)[-1] == 2


def test_short_answers_share_what_was_learned_and_prompts_take_every_core() -> None:
    machine = Machine({2: 0.12, 1: 0.05})
    pace = machine.pace()
    machine.answer(pace, 2 * TRIAL + 1)
    assert machine.answer(pace, 10) == [2] + [1] * 9


def test_one_core_needs_no_trial() -> None:
    machine = Machine({1: 0.05})
    assert machine.answer(machine.pace(), 10) == [1] * 10
