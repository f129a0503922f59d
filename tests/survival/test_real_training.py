"""Kills of a real training with torch, none of which may change its results."""

from __future__ import annotations

import time
from itertools import cycle
from pathlib import Path

import pytest

from peft_core.jobs.store import Store
from peft_core.schemas.events import HeldOutMeasured, JobResumed, StepCompleted
from peft_core.schemas.results import Status
from tests.survival.kill_points import REAL_WORKER, point_named
from tests.survival.scenario import Kill, Scenario, until
from tests.survival.test_kill_matrix import ROUNDS, shuffled
from tests.tiny_models import write_tiny_base

pytestmark = pytest.mark.survival

CONFIG = {
    "device": "cpu",
    "precision": "float32",
    "rank": 4,
    "batch_size": 2,
    "max_steps": 6,
    "max_length": 256,
    "allow_little_data": True,
}
DEFAULT_KILLS = 3  # few, because each starts torch twice
ENDS = [("worker", "SIGKILL"), ("runner", "SIGKILL"), ("worker", "SIGTERM")]


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture
def real(tmp_path: Path, source: Path, tiny_base: Path) -> Scenario:
    return Scenario(tmp_path, source, tiny_base, project="real", config=CONFIG)


def curve(scenario: Scenario) -> list[tuple[str, int, float]]:
    """Return every recorded loss in order; a step that was repeated after a kill occurs several times."""
    events = Store(scenario.paths.database, time.time).events(scenario.current)
    return [(e.kind, e.step, e.loss) for e in events if isinstance(e, (StepCompleted, HeldOutMeasured))]


@pytest.mark.timeout(1200)
def test_a_killed_and_resumed_training_gives_the_losses_of_an_undisturbed_run(real: Scenario) -> None:
    real.job_id = real.submit("real")
    until(lambda: real.status().status.is_final, "the undisturbed run")
    assert real.status().status is Status.COMPLETED, real.status()
    undisturbed = set(curve(real))
    assert len([loss for loss in undisturbed if loss[0] == "step_completed"]) == 6

    real.job_id = None
    ends = cycle(ENDS)
    kills = [Kill(point, *next(ends)) for point in REAL_WORKER]
    kills = shuffled(kills, "real")
    if ROUNDS < 1:
        kills = kills[:DEFAULT_KILLS]
    for number, kill in enumerate(kills, 1):
        status = real.kill(kill)
        print(f"{number:3} of {len(kills)}: {kill}\n      {status.status}, step {status.step}", flush=True)
        assert set(curve(real)) <= undisturbed
    real.finish()
    assert set(curve(real)) == undisturbed  # bit-identical: float32 on a CPU
    events = Store(real.paths.database, time.time).events(real.current)
    if status.status is not Status.COMPLETED:  # it can complete if the kill came at the very end
        assert any(isinstance(event, JobResumed) for event in events)
    real.expect_no_processes()


STARVED = ["the base model is loaded", "the gradients of a step are computed", "the adapter is about to be written"]


@pytest.mark.timeout(1200)
def test_a_training_that_runs_out_of_memory_reports_it_and_can_be_resumed(real: Scenario) -> None:
    for state in STARVED:  # each time the resumed job comes further
        status = real.kill(Kill(point_named(REAL_WORKER, state), "worker", "memory"))
        print(state, status.status, status.error)
        if status.status is not Status.COMPLETED:  # it can complete if the limit came late
            assert status.error is not None
            assert status.error.code in ("out_of_memory", "killed")
    real.finish()
    real.expect_no_processes()
