"""The status that users see: what it shows of a job, and the call that it suggests next."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any

import pytest

from peft_core.jobs.recovery import completed_evaluation
from peft_core.jobs.running_job import RUNNER
from peft_core.jobs.state import Job, apply
from peft_core.jobs.status import not_started, status_of
from peft_core.manager import PEFTManager
from peft_core.schemas.evaluation import CatchUp, Keep, LossChange, Verdict
from peft_core.schemas.results import ErrorInfo, Metrics, NextStep, Phase, Status, TrainingStatus
from peft_core.schemas.training import EvaluatedAdapter
from peft_core.system.failures import error_info
from tests.factories import make_comparison, make_evaluation, make_job, make_request

ERROR = ErrorInfo(code="x", message="It broke.", suggestions=("Fix it",))


EVALUATED = (
    None,
    EvaluatedAdapter(adapter_path=Path("/a")),
    EvaluatedAdapter(adapter_path=Path("/a"), compared_with=Path("/b")),
)


def status_in(state: Status, *, evaluated: EvaluatedAdapter | None = None) -> TrainingStatus:
    if state is Status.NOT_STARTED:
        return not_started("web")
    job = make_job(status=state, error=ERROR if state is Status.FAILED else None)
    if evaluated is not None:
        request = job.request.model_copy(update={"evaluated": evaluated})
        job = job.model_copy(update={"request": request})
    return status_of(job, 1 if state is Status.QUEUED else None, Path("/none/train.log"), now=0.0)


@pytest.mark.parametrize("evaluated", EVALUATED)
@pytest.mark.parametrize("state", list(Status))
def test_every_status_suggests_a_call_that_the_python_api_accepts(
    state: Status, evaluated: EvaluatedAdapter | None
) -> None:
    status = status_in(state, evaluated=evaluated)
    step = status.next_step
    assert step is not None
    arguments = dict(step.arguments) | dict.fromkeys(step.missing)
    signature(getattr(PEFTManager, step.tool)).bind(None, **arguments)  # raises TypeError for others
    assert status.next == step.sentence
    assert f"Call {step.tool}" in status.next
    assert "web" in status.next or "20260101-000000-abcdef" in status.next or evaluated


@pytest.mark.parametrize(
    ("keep", "tool", "arguments"),
    [
        (Keep.ADAPTER_A, "load_adapter", {"adapter_path": "/data/projects/web/lora/a-01"}),
        (Keep.ADAPTER_B, "load_adapter", {"adapter_path": "/data/projects/web/lora/b-02"}),
        (Keep.EITHER, "load_adapter", {}),
        (Keep.BASE_MODEL, "list_adapters", {}),
    ],
)
def test_after_a_comparison_the_adapter_to_keep_is_suggested(
    keep: Keep, tool: str, arguments: dict[str, str], tmp_path: Path
) -> None:
    request = make_request(evaluated=EVALUATED[2])
    job = make_job(status=Status.IN_PROGRESS, request=request, comparison=make_comparison(keep=keep))
    completed = completed_evaluation(job)
    assert completed is not None
    assert completed.adapter_path == arguments.get("adapter_path")
    assert completed.metrics.base_loss == 2.2
    status = status_of(apply(job, completed, at=1.0), None, tmp_path / "train.log", now=0.0)
    step = status.next_step
    assert step is not None
    assert (step.tool, step.arguments, step.missing) == (
        tool,
        arguments,
        ("adapter_path",) if keep is Keep.EITHER else (),
    )
    assert status.compared_adapters == ["/a", "/b"]
    assert (status.kind, status.comparison) == ("evaluation", make_comparison(keep=keep))


def test_the_sentence_of_a_next_step_has_the_reason_and_the_call() -> None:
    step = NextStep(
        tool="train_adapter", arguments={"project_id": "web"}, missing=("training_data",), reason="Nothing yet."
    )
    assert step.sentence == "Nothing yet. Call train_adapter(project_id='web', training_data=...)."
    assert NextStep(tool="generate").sentence == "Call generate."


@pytest.mark.parametrize(("code", "tool"), [("disk_full", "resume_training"), ("x", "train_adapter")])
def test_a_failed_run_is_resumed_only_if_that_may_succeed(code: str, tool: str) -> None:
    error = ERROR.model_copy(update={"code": code})
    status = status_of(make_job(status=Status.FAILED, error=error), None, Path("/none/train.log"), now=0.0)
    assert status.next_step is not None
    assert status.next_step.tool == tool
    assert status.next.startswith("Fix it. ")


def test_a_job_whose_runner_ran_out_of_memory_can_be_resumed() -> None:
    error = error_info(OSError(12, "Cannot allocate memory"), RUNNER)
    status = status_of(make_job(status=Status.FAILED, error=error), None, Path("/none/train.log"), now=0.0)
    assert "ran out of memory" in error.message
    assert status.next_step is not None
    assert status.next_step.tool == "resume_training"


def test_a_run_that_was_rolled_back_shows_its_note_while_it_trains(tmp_path: Path) -> None:
    job = make_job(status=Status.IN_PROGRESS, phase=Phase.TRAINING, step=2, total_steps=9, note="rolled back")
    assert status_of(job, None, tmp_path / "train.log", now=0.0).detail == "rolled back"


def test_a_deleted_adapter_is_not_suggested(tmp_path: Path) -> None:
    job = make_job(status=Status.COMPLETED, adapter_path=str(tmp_path))
    assert "load_adapter" in status_of(job, None, tmp_path / "train.log", now=0.0).next
    job = make_job(status=Status.COMPLETED, adapter_path=str(tmp_path / "gone"))
    status = status_of(job, None, tmp_path / "train.log", now=0.0)
    assert status.adapter_path is None
    assert "deleted" in status.next


@pytest.mark.parametrize(
    ("verdict", "sentence", "advice"),
    [
        (Verdict.HELPS, "The adapter helps", "load_adapter(adapter_path='web')"),
        (Verdict.NO_DIFFERENCE, "No difference could be shown", "more data"),
        (Verdict.HARMS, "The adapter HARMS", "was not made current"),
    ],
)
def test_a_completed_job_states_its_verdict_and_the_consequence(
    verdict: Verdict, sentence: str, advice: str, tmp_path: Path
) -> None:
    metrics = Metrics(base_perplexity=9.0, adapter_perplexity=6.0)
    adapter = tmp_path / "a-01"
    adapter.mkdir()
    (tmp_path / "current").symlink_to("a-01")
    job = make_job(
        status=Status.COMPLETED, adapter_path=str(adapter), metrics=metrics, evaluation=make_evaluation(verdict)
    )
    text = status_of(job, None, tmp_path / "train.log", now=0.0).next
    assert sentence in text
    assert advice in text


def test_an_update_that_lost_what_its_parent_could_is_not_recommended(tmp_path: Path) -> None:
    for name in ("parent", "update"):
        (tmp_path / name).mkdir()
    (tmp_path / "current").symlink_to("parent")
    lost = LossChange(before=1.0, after=1.1, change=0.1, low=0.05, high=0.15, files=6, examples=12)
    evaluation = make_evaluation(catch_up=CatchUp(parent="parent", old=lost, loses=True))
    job = make_job(status=Status.COMPLETED, adapter_path=str(tmp_path / "update"), evaluation=evaluation)
    text = status_of(job, None, tmp_path / "train.log", now=0.0).next
    assert "predicts old held-out code worse than the adapter that it continues from. It was not made current" in text
    assert "load_adapter" not in text


def test_an_adapter_that_is_no_longer_current_is_suggested_by_its_path(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "current").symlink_to("new")
    job = make_job(status=Status.COMPLETED, adapter_path=str(tmp_path / "old"), evaluation=make_evaluation())
    text = status_of(job, None, tmp_path / "train.log", now=0.0).next
    assert f"adapter_path={str(tmp_path / 'old')!r}" in text
    assert "'web'" not in text


def running(**changes: Any) -> Job:
    return make_job(**{"status": Status.IN_PROGRESS, "phase": Phase.TRAINING, "step": 3, "ends_at": 500.0, **changes})


@pytest.mark.parametrize(
    ("changes", "now", "left"),
    [
        pytest.param({}, 260.4, 240.0, id="the expected end minus now"),
        pytest.param({"phase": Phase.EVALUATING_ADAPTER}, 490.0, 10.0, id="the evaluation after the last step counts"),
        pytest.param({}, 501.0, None, id="a job that takes longer than expected has no time left, not 0 s"),
        pytest.param({"step": 0}, 495.0, 160.0, id="before the first step, most of the estimate remains"),
        pytest.param({"ends_at": None}, 0.0, None, id="unknown"),
        pytest.param({"status": Status.QUEUED, "ends_at": None}, 0.0, 200.0, id="queued: the estimate"),
        pytest.param({"status": Status.CANCELLED}, 0.0, None, id="an ended job"),
    ],
)
def test_the_time_left_is_that_of_the_whole_job(changes: dict[str, Any], now: float, left: float | None) -> None:
    assert status_of(running(**changes), None, Path("/none/train.log"), now=now).eta_s == left


@pytest.mark.parametrize(("left", "when"), [(2400.0, "in about 40 min"), (30.0, "soon")])
def test_the_next_step_of_a_running_job_follows_the_time_left(left: float, when: str) -> None:
    status = status_of(running(ends_at=left), None, Path("/none/train.log"), now=0.0)
    assert f"Ask again {when}; cancel_training stops it." in status.next


@pytest.mark.parametrize(
    ("checkpoint", "kept"), [(None, "it has no checkpoint yet"), (2, "its last checkpoint is kept")]
)
def test_a_job_that_is_to_be_cancelled_is_stopping(checkpoint: int | None, kept: str) -> None:
    job = running(checkpoint_step=checkpoint)
    status = status_of(job, None, Path("/none/train.log"), now=0.0, cancel_requested=True)
    assert status.cancel_requested
    assert status.eta_s is None
    assert status.next.startswith(f"The training is stopping, which takes seconds; {kept}. ")


def test_a_job_without_a_checkpoint_is_not_said_to_continue_from_one(tmp_path: Path) -> None:
    def next_of(**changes: Any) -> str:
        return status_of(make_job(status=Status.CANCELLED, **changes), None, tmp_path / "train.log", now=0.0).next

    assert "from the start" in next_of()
    assert "from the start" in next_of(checkpoint_step=2)  # it was freed
    (tmp_path / "checkpoint").mkdir()
    assert "from its last checkpoint" in next_of(checkpoint_step=2)
