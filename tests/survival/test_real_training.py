"""Kills of a training with torch, and that none of them changes what it computes."""

from __future__ import annotations

import time
from itertools import cycle
from pathlib import Path

import pytest

from peft_core.jobs.store import Store
from peft_core.schemas.events import HeldOutMeasured, JobResumed, StepCompleted
from peft_core.schemas.results import Status
from tests.survival.life import Kill, Life, until
from tests.survival.points import REAL_CHILD
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
FEW = 3  # kills by default: each starts torch twice
ENDS = [("child", "SIGKILL"), ("runner", "SIGKILL"), ("child", "SIGTERM")]


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture
def real(tmp_path: Path, source: Path, tiny_base: Path) -> Life:
    return Life(tmp_path, source, tiny_base, project="real", config=CONFIG)


def curve(life: Life) -> list[tuple[str, int, float]]:
    """Every loss that the job has told, in order; a step that was done again after a kill as often as it was done."""
    events = Store(life.paths.database, time.time).events(life.current)
    return [(e.kind, e.step, e.loss) for e in events if isinstance(e, (StepCompleted, HeldOutMeasured))]


@pytest.mark.timeout(1200)
def test_a_training_that_is_killed_everywhere_computes_what_an_undisturbed_one_does(real: Life) -> None:
    real.job_id = real.submit("real")
    until(lambda: real.status().status.is_final, "the undisturbed run")
    assert real.status().status is Status.COMPLETED, real.status()
    undisturbed = set(curve(real))
    assert len([loss for loss in undisturbed if loss[0] == "step_completed"]) == 6

    real.job_id = None
    ends = cycle(ENDS)
    kills = [Kill(point, *next(ends)) for point in REAL_CHILD]
    kills = shuffled(kills, "real")
    if ROUNDS < 1:
        kills = kills[:FEW]
    for number, kill in enumerate(kills, 1):
        status = real.suffer(kill)
        print(f"{number:3} of {len(kills)}: {kill}\n      {status.status}, step {status.step}", flush=True)
        assert set(curve(real)) <= undisturbed
    real.finish()
    assert set(curve(real)) == undisturbed  # bit by bit: float32 on a CPU
    events = Store(real.paths.database, time.time).events(real.current)
    if status.status is not Status.COMPLETED:  # as it may be after a kill at its very end
        assert any(isinstance(event, JobResumed) for event in events)
    real.expect_nobody()


@pytest.mark.parametrize("what", ["base loaded", "in a step, gradients there", "about to write the adapter"])
def test_a_training_that_runs_out_of_memory_says_so_and_resumes(real: Life, what: str) -> None:
    point = next(point for point in REAL_CHILD if point.what == what)
    status = real.suffer(Kill(point, "child", "memory"))
    print(status.status, status.error)
    if status.status is not Status.COMPLETED:  # as it may be where the limit came late
        assert status.error is not None
        assert status.error.code in ("out_of_memory", "killed")
    real.finish()
    real.expect_nobody()
