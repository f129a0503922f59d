"""Which events of a remote run are recorded already, when a bridge repeats all of them."""

from __future__ import annotations

from peft_core.jobs.cluster_job import RecordedEvents
from peft_core.schemas.events import (
    Event,
    HeldOutMeasured,
    JobInterrupted,
    JobResumed,
    JobStarted,
    PhaseStarted,
    RunPlanned,
)
from peft_core.schemas.results import Phase
from tests.integration.scripted_worker import step_completed

PLANNED = RunPlanned(device="cuda", total_steps=100, node="gpu-1")
MOVED = RunPlanned(device="cuda", total_steps=100, start_step=2, node="gpu-2")
TRAINING = PhaseStarted(phase=Phase.TRAINING)
STEPS = [step_completed(step) for step in range(1, 5)]


def new(recorded: list[Event], repeated: list[Event]) -> list[Event]:
    events = RecordedEvents(recorded)
    return [event for event in repeated if not events.has(event)]


def test_what_is_recorded_is_not_recorded_again_and_what_the_runner_missed_is() -> None:
    remote = [TRAINING, PLANNED, *STEPS, TRAINING]
    ours = PhaseStarted(phase=Phase.STARTING, detail="connecting to the cluster")
    assert new([JobStarted(), ours, *remote[:4]], remote) == remote[4:]
    assert new([JobStarted(), ours, *remote], remote) == []


def test_an_event_that_happens_again_is_recorded_again() -> None:
    measured = HeldOutMeasured(step=2, loss=1.5)
    remote = [PLANNED, *STEPS[:2], measured, MOVED, *STEPS[2:], MOVED, measured]
    for known in range(len(remote) + 1):
        assert new([JobStarted(), *remote[:known]], remote) == remote[known:]


def test_a_resumed_job_passes_through_the_phases_of_its_run_again() -> None:
    remote: list[Event] = [TRAINING, PLANNED, *STEPS]
    recorded = [JobStarted(), *remote[:3], JobInterrupted(reason="gone"), JobResumed(), JobStarted()]
    assert new(recorded, remote) == [TRAINING, *STEPS[1:]]
