"""The state of a job in words for MCP clients."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.jobs.state import Job
from peft_core.jobs.status import status_of
from peft_core.schemas.evaluation import InFileMetric, Keep, Share, Verdict
from peft_core.schemas.project import Refreshed, RetrainThreshold
from peft_core.schemas.results import ErrorInfo, Metrics, Phase, Status, TrainingStatus
from peft_core.schemas.training import EvaluatedAdapter
from peft_core.system.durations import format_duration, rough_age, rough_duration
from server.status_text import (
    evaluation_text,
    for_client,
    headline,
    short_headline,
    subject,
    summarise,
    summarise_refresh,
)
from tests.factories import make_comparison, make_evaluation, make_job, make_request, make_source

NOTE = "at step 4 the loss is nan: rolled back to step 1, continued with 1/4 of the learning rate"
METRICS = Metrics(base_perplexity=9.784, adapter_perplexity=5.1)


def status(job: Job) -> TrainingStatus:
    return status_of(job, None, Path("/none/train.log"), now=0.0)


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (59.2, "59 s"), (60, "1 min"), (130, "2 min 10 s"), (3900, "1 h 5 min")]
)
def test_durations_are_formatted_for_people(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (3, "10 s"),
        (44, "40 s"),
        (56, "1 min"),
        (250, "4 min"),
        (2500, "40 min"),
        (3520, "1 h"),
        (7920, "2 h 10 min"),
        (108_000, "30 h"),
    ],
)
def test_estimated_durations_are_rounded(seconds: float, words: str) -> None:
    assert rough_duration(seconds) == words


@pytest.mark.parametrize(
    ("seconds", "words"), [(5, "1 min"), (3600, "1 hour"), (100_000, "1 day"), (950_000, "10 days"), (2e6, "3 weeks")]
)
def test_an_age_is_in_its_largest_unit(seconds: float, words: str) -> None:
    assert rough_age(seconds) == words


def test_the_time_left_is_shown_in_every_phase() -> None:
    job = make_job(status=Status.IN_PROGRESS, phase=Phase.EVALUATING_ADAPTER, step=9, total_steps=9, ends_at=250.0)
    assert headline(status(job)) == "evaluating the adapter on the same held-out files, about 4 min left"


def test_a_share_of_lines_is_given_with_their_number() -> None:
    share = Share(base=0.186, adapter=0.223, change=0.037, low=-0.007, high=0.094, positions=269, files=4)
    text = evaluation_text(make_evaluation(in_file={InFileMetric.LINES: share}))
    assert "exact lines in the file 18.6 -> 22.3 % of 269 (-0.7 to +9.4), edit similarity 40.0 -> 50.0 %, " in text
    assert "next lines exact" not in text


def test_an_evaluation_is_named_as_such(tmp_path: Path) -> None:
    evaluated = EvaluatedAdapter(adapter_path=tmp_path, accept_unproven_base=False)
    job = make_job(request=make_request(evaluated=evaluated, found=make_source(path=Path("/tools"))))
    assert subject(status(job)) == "web (evaluation on /tools)"


def test_a_comparison_names_both_adapters_and_says_what_to_keep() -> None:
    evaluated = EvaluatedAdapter(
        adapter_path=Path("/data/projects/web/lora/a-01"), compared_with=Path("/data/projects/web/lora/b-02")
    )
    request = make_request(evaluated=evaluated, found=make_source(path=Path("/tools")))
    assert subject(status(make_job(request=request))) == "web (comparison of web/a-01 and web/b-02 on /tools)"
    comparison = make_comparison(cautions=("They differ.",))
    completed = status(make_job(status=Status.COMPLETED, request=request, comparison=comparison))
    assert headline(completed) == "completed, keep web/b-02"
    text = summarise(completed)
    for expected in (
        "Keep web/b-02: its held-out loss is lower. ",
        "Base, A (web/a-01) and B (web/b-02): held-out loss 2.200 / 1.800 / 1.500 (B - A -0.400 to -0.200)",
        "next lines exact 10.0 / 15.0 / 16.0 % (B - A -2.0 to +4.0)",
        "edit similarity 40.0 / 50.0 / 60.0 %,",
        "6 files, 40 examples.",
        "Examples left out: 3 that only A was trained on, 12 that both were trained on.",
        "They differ.",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("keep", "words"), [(Keep.EITHER, "keep either adapter"), (Keep.BASE_MODEL, "keep the base model")]
)
def test_a_comparison_without_a_winner_says_so_in_its_headline(keep: Keep, words: str) -> None:
    job = make_job(status=Status.COMPLETED, comparison=make_comparison(keep=keep))
    assert headline(status(job)) == f"completed, {words}"


def test_the_headline_of_a_training_shows_step_loss_speed_and_time_left() -> None:
    job = make_job(
        status=Status.IN_PROGRESS,
        phase=Phase.TRAINING,
        step=120,
        total_steps=250,
        loss=1.834,
        held_out_loss=1.9,
        tokens_per_second=144.6,
        ends_at=130.0,
    )
    expected = "training: step 120/250, loss 1.834, held-out 1.900, 145 tokens/s, 2 min 10 s left"
    assert headline(status(job)) == expected


def test_the_headline_mentions_a_rollback_while_training_and_afterwards() -> None:
    training = make_job(status=Status.IN_PROGRESS, phase=Phase.TRAINING, step=2, total_steps=9, note=NOTE)
    assert headline(status(training)) == f"training: step 2/9, {NOTE}"
    completed = make_job(status=Status.COMPLETED, metrics=METRICS, note=NOTE)
    assert headline(status(completed)).endswith(NOTE)


def test_the_headline_is_truncated_to_what_clients_show() -> None:
    job = make_job(status=Status.FAILED, error=ErrorInfo(code="x", message="very long " * 100))
    assert len(headline(status(job))) == 200


@pytest.mark.parametrize("state", list(Status))
def test_every_state_has_a_headline(state: Status) -> None:
    assert headline(TrainingStatus(job_id="a", project_id="web", status=state))


@pytest.mark.parametrize("verdict", list(Verdict))
def test_the_headline_of_a_completed_job_has_verdict_and_perplexities(verdict: Verdict) -> None:
    job = make_job(status=Status.COMPLETED, metrics=METRICS, evaluation=make_evaluation(verdict))
    expected = f"completed, {verdict.replace('_', ' ')}, held-out perplexity 9.78 (base) -> 5.10 (adapter)"
    assert headline(status(job)) == expected


def test_the_title_of_a_picture_is_short() -> None:
    job = make_job(status=Status.COMPLETED, metrics=METRICS, evaluation=make_evaluation(Verdict.HELPS))
    assert short_headline(status(job)) == "helps, held-out perplexity 9.78 -> 5.10"
    assert short_headline(status(make_job(status=Status.CANCELLED))) == "cancelled"


def test_only_the_client_of_the_server_is_advised_to_pass_wait_s() -> None:
    core = status(make_job(status=Status.IN_PROGRESS, phase=Phase.TRAINING))
    assert "wait_s" not in core.model_dump_json()
    worded = for_client(core)
    assert worded.next.endswith("job_id='20260101-000000-abcdef', wait_s=20).")
    assert worded.next_step is not None
    assert worded.next_step.arguments["wait_s"] == 20


def test_other_next_steps_are_passed_on_unchanged() -> None:
    completed = status(make_job(status=Status.COMPLETED))
    assert for_client(completed) == completed


def test_a_project_that_is_not_retrained_now_says_why_and_when_it_will_be() -> None:
    refreshed = Refreshed(
        project_id="web",
        outcome="not_due",
        reason="Its latest training ended less than 1 h ago",
        retrain_when=RetrainThreshold(units=10),
    )
    assert summarise_refresh(refreshed) == (
        "web: Its latest training ended less than 1 h ago. It is retrained by itself when 10 % of the units have changed."
    )
