"""The kill matrix: every process, killed by every method, at every point of a job's scenario."""

from __future__ import annotations

import math
import os
import random
import signal

import pytest

from peft_core.schemas.results import Status
from tests.survival.kill_points import RUNNER, SERVER, SMALL_WORKER
from tests.survival.scenario import MEMORY, Kill, Scenario, gone, until
from tests.survival.wire import server

pytestmark = pytest.mark.survival

SEED = int(os.environ.get("PEFT_SURVIVAL_SEED", random.SystemRandom().randrange(10**6)))
# Below 1: a part of the kills, which depends on the seed.
ROUNDS = float(os.environ.get("PEFT_SURVIVAL_ROUNDS", "0.25"))


def shuffled(kills: list[Kill], salt: str) -> list[Kill]:
    order = kills * math.ceil(ROUNDS)
    random.Random(f"{SEED} {salt}").shuffle(order)  # noqa: S311 -- not for cryptography
    return order[: math.ceil(len(kills) * ROUNDS)]


def expect_survival_of(scenario: Scenario, kills: list[Kill]) -> None:
    print(f"PEFT_SURVIVAL_SEED={SEED}")
    for number, kill in enumerate(kills, 1):
        print(f"{number:3} of {len(kills)}: {kill}", flush=True)
        status = scenario.kill(kill)
        print(f"      {status.status}, step {status.step}: {status.error.message if status.error else ''}")
        scenario.expect_queue_continues()
        if number % 5 == 0 or number == len(kills):
            scenario.finish()  # the next kill starts with a new job
            scenario.expect_queue_continues()
    scenario.expect_no_processes()


@pytest.mark.parametrize("method", ["SIGKILL", "SIGTERM", "memory"])
def test_the_job_survives_the_death_of_its_worker(scenario: Scenario, method: str) -> None:
    expect_survival_of(
        scenario, shuffled([Kill(point, "worker", method) for point in SMALL_WORKER], f"worker {method}")
    )


@pytest.mark.parametrize("method", ["SIGKILL", "SIGTERM", "memory"])
def test_the_job_survives_the_death_of_the_runner(scenario: Scenario, method: str) -> None:
    expect_survival_of(scenario, shuffled([Kill(point, "runner", method) for point in RUNNER], f"runner {method}"))


@pytest.mark.parametrize("method", ["SIGKILL", "SIGTERM", "memory"])
def test_the_next_server_finishes_a_job_whose_server_died_while_queuing_it(scenario: Scenario, method: str) -> None:
    """A server without any memory may succeed, fail or stop answering; this test ends it then, as a client would."""
    kills = shuffled([Kill(point, "server", method) for point in SERVER], f"server {method}")
    for number, kill in enumerate(kills, 1):
        print(f"{number:3} of {len(kills)}: {kill}", flush=True)
        mark = scenario.arm(kill.point, kill.method)
        with server(scenario.paths.root, cwd=scenario.root) as victim:
            config = {"base_model": str(scenario.base), **scenario.config}
            arguments = {"project_id": "small", "training_data": str(scenario.source), "config": config}
            victim.send("tools/call", {"name": "train_adapter", "arguments": arguments})
            until(mark.exists, f"the point ({kill})")
            if method != MEMORY:
                until(lambda killed=victim.process.pid: gone(killed), "the server to die", 2.0)
        scenario.disarm()
        scenario.job_id = scenario.latest("small")  # None: the job was not queued yet
        if scenario.job_id is not None:
            scenario.finish()
        scenario.expect_no_processes()


@pytest.mark.parametrize("method", ["SIGKILL", "SIGTERM"])
def test_a_running_job_survives_the_death_of_the_server(scenario: Scenario, method: str) -> None:
    kills = shuffled([Kill(point, "server", method) for point in SMALL_WORKER], f"busy server {method}")
    for number, kill in enumerate(kills, 1):
        print(f"{number:3} of {len(kills)}: {kill}", flush=True)
        mark = scenario.arm(kill.point, "SIGSTOP")
        child = scenario.reach(kill, mark)
        with server(scenario.paths.root, cwd=scenario.root) as victim:
            victim.call("get_training_status", project_id="small", wait_s=0)
            victim.process.send_signal(signal.Signals[method])
            victim.process.wait(2.0)
        assert scenario.status().status is Status.IN_PROGRESS
        scenario.disarm()
        os.kill(child, signal.SIGCONT)
        scenario.finish()
        scenario.expect_no_processes()


@pytest.mark.parametrize("method", ["SIGKILL", "SIGTERM"])
def test_the_job_survives_the_death_of_the_runner_while_its_worker_is_busy(scenario: Scenario, method: str) -> None:
    expect_survival_of(scenario, shuffled([Kill(point, "runner", method) for point in SMALL_WORKER], f"over {method}"))
