"""What users read about a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.jobs.status import headline, in_words, not_started, status_of
from peft_core.schemas.evaluation import Verdict
from peft_core.schemas.results import ErrorInfo, Metrics, Phase, Status
from tests.factories import make_evaluation, make_job


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.2, "59 s"), (60, "1 min"), (130, "2 min 10 s"), (3900, "1 h 5 min")],
)
def test_durations_are_said_as_people_say_them(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_a_training_job_shows_step_loss_speed_and_time_left(tmp_path) -> None:
    job = make_job(
        status=Status.IN_PROGRESS,
        phase=Phase.TRAINING,
        step=120,
        total_steps=250,
        loss=1.834,
        held_out_loss=1.9,
        tokens_per_second=144.6,
        eta_s=130.0,
    )
    line = headline(status_of(job, None, tmp_path / "train.log"))
    assert line == "training: step 120/250, loss 1.834, held-out 1.900, 145 tokens/s, 2 min 10 s left"


def test_a_run_that_went_back_says_so_while_it_trains_and_afterwards(tmp_path) -> None:
    note = "at step 4 the loss is nan: back to step 1 with 1/4 of the learning rate"
    training = make_job(status=Status.IN_PROGRESS, phase=Phase.TRAINING, step=2, total_steps=9, note=note)
    status = status_of(training, None, tmp_path / "train.log")
    assert status.detail == note
    assert headline(status) == f"training: step 2/9, 3 min 20 s left, {note}"
    metrics = Metrics(base_perplexity=9.78, adapter_perplexity=5.1)
    completed = make_job(status=Status.COMPLETED, metrics=metrics, note=note)
    assert headline(status_of(completed, None, tmp_path / "train.log")).endswith(note)


def test_no_line_is_longer_than_clients_show(tmp_path) -> None:
    job = make_job(status=Status.FAILED, error=ErrorInfo(code="x", message="very long " * 100))
    assert len(headline(status_of(job, None, tmp_path / "train.log"))) == 200


@pytest.mark.parametrize("status", list(Status))
def test_every_status_says_what_to_call_next(status: Status, tmp_path) -> None:
    error = ErrorInfo(code="x", message="It broke.", suggestions=("Mend it",)) if status is Status.FAILED else None
    shown = (
        not_started("web")
        if status is Status.NOT_STARTED
        else status_of(
            make_job(status=status, error=error),
            1 if status is Status.QUEUED else None,
            tmp_path / "train.log",
        )
    )
    assert "(" in shown.next
    assert "web" in shown.next or "20260101-000000-abcdef" in shown.next
    assert headline(shown)


def test_an_adapter_that_was_deleted_since_is_not_named(tmp_path: Path) -> None:
    job = make_job(status=Status.COMPLETED, adapter_path=str(tmp_path))
    assert "load_adapter" in status_of(job, None, tmp_path / "train.log").next
    job = make_job(status=Status.COMPLETED, adapter_path=str(tmp_path / "gone"))
    shown = status_of(job, None, tmp_path / "train.log")
    assert shown.adapter_path is None
    assert "deleted" in shown.next


def test_a_completed_job_tells_base_against_adapter(tmp_path) -> None:
    job = make_job(
        status=Status.COMPLETED,
        adapter_path="/a",
        metrics=Metrics(base_perplexity=9.784, adapter_perplexity=5.1),
    )
    assert "9.78 (base) -> 5.10 (adapter)" in headline(status_of(job, None, tmp_path / "train.log"))


@pytest.mark.parametrize(
    ("verdict", "said", "advice"),
    [
        (Verdict.HELPS, "The adapter helps.", "load_adapter(adapter_path='web')"),
        (Verdict.NO_DIFFERENCE, "No difference could be shown", "more data"),
        (Verdict.HARMS, "The adapter HARMS", "was not made current"),
    ],
)
def test_a_completed_job_says_its_verdict_and_what_follows(
    verdict: Verdict,
    said: str,
    advice: str,
    tmp_path: Path,
) -> None:
    metrics = Metrics(base_perplexity=9.0, adapter_perplexity=6.0)
    evaluation = make_evaluation(verdict)
    adapter = tmp_path / "a-01"
    adapter.mkdir()
    (tmp_path / "current").symlink_to("a-01")
    job = make_job(status=Status.COMPLETED, adapter_path=str(adapter), metrics=metrics, evaluation=evaluation)
    shown = status_of(job, None, tmp_path / "train.log")
    assert said in shown.next
    assert advice in shown.next
    assert f"completed, {verdict.replace('_', ' ')}, held-out perplexity" in headline(shown)


def test_an_adapter_after_which_another_came_is_named_by_its_path(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "current").symlink_to("new")
    job = make_job(status=Status.COMPLETED, adapter_path=str(tmp_path / "old"), evaluation=make_evaluation())
    told = status_of(job, None, tmp_path / "train.log").next
    assert told.count(f"adapter_path={str(tmp_path / 'old')!r}") == 2
    assert "'web'" not in told
