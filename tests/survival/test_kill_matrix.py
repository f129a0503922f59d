"""The kill matrix: every process, in every way, at every point of a job's life."""

from __future__ import annotations

import math
import os
import random
import signal

import pytest

from peft_core.schemas.results import Status
from tests.survival.life import MEMORY, Kill, Life, gone, until
from tests.survival.points import RUNNER, SERVER, SMALL_CHILD
from tests.survival.wire import server

pytestmark = pytest.mark.survival

SEED = int(os.environ.get("PEFT_SURVIVAL_SEED", random.SystemRandom().randrange(10**6)))
ROUNDS = float(os.environ.get("PEFT_SURVIVAL_ROUNDS", "0.25"))  # below 1: some of the kills, others with each seed


def shuffled(kills: list[Kill], salt: str) -> list[Kill]:
    order = kills * math.ceil(ROUNDS)
    random.Random(f"{SEED} {salt}").shuffle(order)  # noqa: S311 -- an order, no secret
    return order[: math.ceil(len(kills) * ROUNDS)]


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


@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM", "memory"])
def test_the_server_is_killed_while_it_is_asked_to_train(life: Life, way: str) -> None:
    """Whatever it had begun is found and finished by the next one.

    One without any memory may get by, fail or fall silent: its client ends it then, as this test does.
    """
    kills = shuffled([Kill(point, "server", way) for point in SERVER], f"server {way}")
    for number, kill in enumerate(kills, 1):
        print(f"{number:3} of {len(kills)}: {kill}", flush=True)
        mark = life.arm(kill.point, kill.way)
        with server(life.paths.root, cwd=life.root) as victim:
            config = {"base_model": str(life.base), **life.config}
            asked = {"project_id": "small", "training_data": str(life.source), "config": config}
            victim.send("tools/call", {"name": "train_adapter", "arguments": asked})
            until(mark.exists, f"the point ({kill})")
            if way != MEMORY:
                until(lambda killed=victim.process.pid: gone(killed), "the server to die", 2.0)
        life.disarm()
        life.job_id = life.jobs.status_and_ensure_runner("small").job_id  # None: it had not come so far
        if life.job_id is not None:
            life.finish()
        life.expect_nobody()


@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM"])
def test_the_server_is_killed_while_a_job_goes_on(life: Life, way: str) -> None:
    kills = shuffled([Kill(point, "server", way) for point in SMALL_CHILD], f"busy server {way}")
    for number, kill in enumerate(kills, 1):
        print(f"{number:3} of {len(kills)}: {kill}", flush=True)
        mark = life.arm(kill.point, "SIGSTOP")
        child = life.reach(kill, mark)
        with server(life.paths.root, cwd=life.root) as victim:
            victim.call("get_training_status", project_id="small", wait_s=0)
            victim.process.send_signal(signal.Signals[way])
            victim.process.wait(2.0)
        assert life.status().status is Status.IN_PROGRESS
        life.disarm()
        os.kill(child, signal.SIGCONT)
        life.finish()
        life.expect_nobody()


@pytest.mark.parametrize("way", ["SIGKILL", "SIGTERM"])
def test_the_runner_is_killed_over_its_child(life: Life, way: str) -> None:
    survive(life, shuffled([Kill(point, "runner", way) for point in SMALL_CHILD], f"over {way}"))
