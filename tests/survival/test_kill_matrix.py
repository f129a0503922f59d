"""The kill matrix: every process, in every way, at every point of a job's life."""

from __future__ import annotations

import os
import random

import pytest

from tests.survival.life import Kill, Life
from tests.survival.points import RUNNER, SMALL_CHILD

SEED = int(os.environ.get("PEFT_SURVIVAL_SEED", random.SystemRandom().randrange(10**6)))
ROUNDS = int(os.environ.get("PEFT_SURVIVAL_ROUNDS", "1"))


def shuffled(kills: list[Kill], salt: str) -> list[Kill]:
    order = kills * ROUNDS
    random.Random(f"{SEED} {salt}").shuffle(order)  # noqa: S311 -- an order, no secret
    return order


def survive(life: Life, kills: list[Kill]) -> None:
    print(f"PEFT_SURVIVAL_SEED={SEED}")
    for number, kill in enumerate(kills, 1):
        print(f"{number:3} of {len(kills)}: {kill}", flush=True)
        status = life.suffer(kill)
        print(f"      {status.status}, step {status.step}: {status.error.message if status.error else ''}")
        life.expect_the_queue_goes_on()
        if number % 5 == 0 or number == len(kills):
            life.finish()  # the same job; the next kill begins with a new one
            life.expect_the_queue_goes_on()
    life.expect_nobody()


@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM", "memory"])
def test_the_child_is_killed(life: Life, way: str) -> None:
    survive(life, shuffled([Kill(point, "child", way) for point in SMALL_CHILD], f"child {way}"))


@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM", "memory"])
def test_the_runner_is_killed(life: Life, way: str) -> None:
    survive(life, shuffled([Kill(point, "runner", way) for point in RUNNER], f"runner {way}"))


@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM"])
def test_the_runner_is_killed_over_its_child(life: Life, way: str) -> None:
    survive(life, shuffled([Kill(point, "runner", way) for point in SMALL_CHILD], f"over {way}"))
