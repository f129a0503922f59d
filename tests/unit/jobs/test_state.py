"""The state machine of a job: which events it accepts, and what they change."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.jobs.state import RESUMABLE, IllegalTransition, Job, apply, in_turn, progress_percent
from peft_core.schemas.device_check import Outcome
from peft_core.schemas.events import (
    CheckpointSaved,
    DeviceChecked,
    Evaluated,
    Event,
    HeldOutMeasured,
    JobAskedFor,
    JobCancelled,
    JobCompleted,
    JobFailed,
    JobInterrupted,
    JobPostponed,
    JobResumed,
    JobStarted,
    MemorySaved,
    PhaseStarted,
    RateLowered,
    RunPlanned,
    StepCompleted,
    StoppedEarly,
)
from peft_core.schemas.results import ErrorInfo, Metrics, Phase, Status
from peft_core.schemas.training import ContinuedAdapter, EvaluatedAdapter
from tests.factories import make_device_check, make_evaluation, make_job, make_request


def step(number: int, loss: float = 2.0) -> StepCompleted:
    return StepCompleted(
        step=number,
        loss=loss,
        learning_rate=1e-3,
        tokens=100 * number,
        tokens_per_second=50.0,
        eta_s=1.0,
        memory_bytes=1,
    )


PROBLEM = ErrorInfo(code="x", message="x")
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(JobStarted),
    st.builds(PhaseStarted, phase=st.sampled_from(Phase)),
    st.builds(RunPlanned, device=st.just("cpu"), total_steps=st.just(5), start_step=st.integers(0, 5)),
    st.integers(1, 6).map(step),
    st.builds(HeldOutMeasured, step=st.integers(0, 5), loss=st.floats(0, 9), whole_set=st.booleans()),
    st.builds(CheckpointSaved, step=st.integers(0, 6)),
    st.builds(StoppedEarly, step=st.integers(1, 5), best_step=st.integers(1, 5)),
    st.builds(
        RateLowered,
        step=st.integers(1, 5),
        back_to_step=st.integers(0, 5),
        factor=st.just(0.25),
        reason=st.just("the loss is nan"),
    ),
    st.builds(
        MemorySaved,
        step=st.integers(1, 5),
        tokens_at_once=st.integers(0, 512),
        layers_computed_twice=st.booleans(),
        reason=st.just("cannot allocate"),
    ),
    st.builds(DeviceChecked, check=st.just(make_device_check())),
    st.builds(Evaluated, evaluation=st.just(make_evaluation())),
    st.builds(JobCompleted, adapter_path=st.just("/a"), metrics=st.just(Metrics())),
    st.builds(JobFailed, error=st.just(PROBLEM)),
    st.builds(JobCancelled),
    st.builds(JobInterrupted, reason=st.just("killed")),
    st.builds(JobResumed),
    st.builds(JobPostponed, reason=st.just("busy")),
    st.builds(JobAskedFor),
)


def after(job: Job, *events: Event) -> Job:
    for event in events:
        job = apply(job, event, at=1.0)
    return job


@given(st.lists(EVENTS, max_size=40), st.booleans())
def test_no_sequence_of_events_leads_to_a_contradictory_job(events: list[Event], only_while_free: bool) -> None:
    job = make_job(only_while_free=only_while_free)
    for number, event in enumerate(events):
        before = job
        try:
            job = apply(job, event, at=float(number))
        except IllegalTransition:
            continue
        assert (job.adapter_path is not None) == (job.status is Status.COMPLETED)
        assert job.error is None or job.status in (Status.FAILED, Status.INTERRUPTED)
        assert job.step <= (job.total_steps or 0) or job.total_steps is None
        assert not job.waits_for or (job.status is Status.QUEUED and job.only_while_free)
        assert job.only_while_free <= before.only_while_free
        if before.status is Status.IN_PROGRESS and job.status is Status.QUEUED:
            assert isinstance(event, JobPostponed)
            assert job.step == (job.checkpoint_step or 0)
        if before.status.is_final:
            assert isinstance(event, JobResumed)
            assert before.status in RESUMABLE
        if job.status is Status.IN_PROGRESS and before.status is Status.IN_PROGRESS:
            assert progress_percent(job) >= progress_percent(before) or isinstance(event, RunPlanned | RateLowered)


def test_a_run_goes_from_the_queue_to_a_published_adapter() -> None:
    job = after(
        make_job(),
        JobStarted(),
        PhaseStarted(phase=Phase.PREPARING_DATA),
        PhaseStarted(phase=Phase.LOADING_MODEL),
        HeldOutMeasured(step=0, loss=2.5),
        HeldOutMeasured(step=0, loss=2.4, whole_set=True),
        RunPlanned(device="cpu", total_steps=2),
        PhaseStarted(phase=Phase.TRAINING),
        step(1),
        step(2, loss=1.5),
    )
    assert (job.status, job.step, job.loss, job.held_out_loss) == (Status.IN_PROGRESS, 2, 1.5, 2.5)
    assert progress_percent(job) == 94.0
    job = after(job, JobCompleted(adapter_path="/a", metrics=Metrics(adapter_loss=2.0)))
    assert (job.status, job.adapter_path, job.held_out_loss) == (Status.COMPLETED, "/a", 2.0)
    assert progress_percent(job) == 100.0


def test_the_progress_of_an_evaluation_follows_the_share_of_its_phase() -> None:
    evaluated = EvaluatedAdapter(adapter_path=Path("/a"), compared_with=Path("/b"))
    job = after(make_job(request=make_request(evaluated=evaluated)), JobStarted())
    percents = []
    for phase, done in (
        (Phase.EVALUATING_BASE, 0.0),
        (Phase.EVALUATING_ADAPTER, 0.0),
        (Phase.EVALUATING_ADAPTER, 0.4),
        (Phase.EVALUATING_ADAPTER, 0.2),
    ):
        job = after(job, PhaseStarted(phase=phase, done=done))
        percents.append(progress_percent(job))
    assert percents == [10, 30, 57.2, 57.2], "it never goes back"


def test_a_completed_job_accepts_no_event() -> None:
    job = after(make_job(), JobStarted(), JobCompleted(adapter_path="/a", metrics=Metrics()))
    for event in (
        JobStarted(),
        JobCancelled(),
        JobFailed(error=PROBLEM),
        JobInterrupted(reason="x"),
        JobResumed(),
        step(1),
    ):
        with pytest.raises(IllegalTransition, match="completed"):
            apply(job, event, at=2.0)


def test_a_step_cannot_be_repeated_without_a_rollback() -> None:
    job = after(make_job(), JobStarted(), RunPlanned(device="cpu", total_steps=5), step(3))
    with pytest.raises(IllegalTransition):
        apply(job, step(3), at=2.0)


def test_a_rollback_resets_the_step_and_leaves_a_note() -> None:
    once = RateLowered(step=4, back_to_step=1, factor=0.25, reason="the loss is nan")
    twice = RateLowered(step=3, back_to_step=0, factor=0.0625, reason="the gradient norm is inf")
    job = after(make_job(), JobStarted(), RunPlanned(device="cpu", total_steps=5), step(3), once)
    assert (job.status, job.step) == (Status.IN_PROGRESS, 1)
    assert job.note == "at step 4 the loss is nan: rolled back to step 1, continued with 1/4 of the learning rate"
    job = after(job, step(2), twice, step(1))
    assert (job.step, job.note.count("rolled back to step")) == (1, 2)
    assert "rolled back to step 0, continued with 1/16 of the learning rate" in job.note

    again = after(job, step(2), CheckpointSaved(step=2), JobInterrupted(reason="x"), JobResumed(), JobStarted())
    assert after(again, twice).note == job.note  # the same rollback, repeated after the checkpoint
    stopped = after(again, StoppedEarly(step=5, best_step=2))
    assert stopped.note == f"{job.note}; stopped early at step 5: the adapter is that of step 2"


def test_an_update_that_stopped_early_is_said_to_be_averaged_with_its_parent() -> None:
    continued = ContinuedAdapter(adapter_id="a-01", adapter_path=Path("/a-01"), weights_sha256="0")
    job = after(
        make_job(request=make_request(continued=continued)), JobStarted(), RunPlanned(device="cpu", total_steps=5)
    )
    note = after(job, StoppedEarly(step=5, best_step=2)).note
    assert note == "stopped early at step 5: the adapter is that of step 2, averaged with the one that it continues"


def test_a_rollback_to_a_step_that_was_not_reached_is_illegal() -> None:
    job = after(make_job(), JobStarted(), RunPlanned(device="cpu", total_steps=5), step(3))
    with pytest.raises(IllegalTransition):
        apply(job, RateLowered(step=5, back_to_step=4, factor=0.25, reason="x"), at=2.0)


def test_a_resumed_job_is_queued_and_continues_from_its_checkpoint() -> None:
    job = after(
        make_job(),
        JobStarted(),
        RunPlanned(device="cpu", total_steps=9),
        step(4),
        CheckpointSaved(step=4),
        step(5),
        JobInterrupted(reason="killed"),
        JobResumed(),
    )
    assert (job.status, job.step, job.error) == (Status.QUEUED, 4, None)
    assert after(job, JobStarted(), step(5)).step == 5


def test_the_end_of_a_job_is_expected_by_the_estimate_and_then_by_the_measured_speed() -> None:
    started = apply(make_job(), JobStarted(), 1000.0)
    assert started.ends_at == 1000.0 + 200.0  # the estimate of `make_request`
    planned = after(started, RunPlanned(device="cpu", total_steps=5))
    trained = apply(planned, step(1).model_copy(update={"eta_s": 40.0}), 1100.0)
    assert trained.ends_at == 1140.0
    evaluating = apply(trained, PhaseStarted(phase=Phase.EVALUATING_ADAPTER), 1120.0)
    assert evaluating.ends_at == 1140.0
    assert apply(evaluating, JobInterrupted(reason="x"), 1130.0).ends_at is None


def test_a_paused_job_continues_from_its_checkpoint() -> None:
    begun = (JobStarted(), PhaseStarted(phase=Phase.TRAINING), RunPlanned(device="cpu", total_steps=5))
    job = after(make_job(only_while_free=True), *begun, step(1), CheckpointSaved(step=1), step(2))
    paused = after(job, JobPostponed(reason="the machine runs on its battery"))
    assert (paused.status, paused.phase, paused.step, paused.ends_at) == (Status.QUEUED, None, 1, None)
    assert paused.waits_for == "the machine runs on its battery"
    again = after(paused, JobStarted())
    assert (again.status, again.waits_for) == (Status.IN_PROGRESS, "")


def test_a_job_that_a_user_asked_for_neither_waits_nor_stays_behind_others() -> None:
    with pytest.raises(IllegalTransition):
        after(make_job(), JobPostponed(reason="busy"))
    with pytest.raises(IllegalTransition):
        after(make_job(), JobAskedFor())
    waiting = after(make_job("a", only_while_free=True), JobPostponed(reason="busy"))
    assert [job.job_id for job in in_turn([waiting, make_job("b"), make_job("c")])] == ["b", "c", "a"]
    asked_for = after(waiting, JobAskedFor())
    assert asked_for.waits_for == ""
    assert [job.job_id for job in in_turn([asked_for, make_job("b")])] == ["a", "b"]


def test_a_job_that_is_asked_for_while_it_is_being_paused_is_next() -> None:
    job = after(make_job(only_while_free=True), JobStarted(), JobAskedFor(), JobPostponed(reason="busy"))
    assert (job.status, job.waits_for) == (Status.QUEUED, "")


@pytest.mark.parametrize(
    ("outcome", "note"),
    [
        (Outcome.AGREES, ""),
        (Outcome.SKIPPED, "cuda was not checked against the CPU: why"),
        (Outcome.DIFFERS, "cuda computes something else than the CPU: why; continued on the CPU"),
        (Outcome.OUT_OF_MEMORY, "cuda ran out of memory when it was checked: why; continued on the CPU"),
    ],
)
def test_the_status_says_once_what_the_check_of_the_device_found(outcome: Outcome, note: str) -> None:
    event = DeviceChecked(check=make_device_check(outcome=outcome, reason="why"))
    assert after(make_job(), JobStarted(), event, event).note == note
