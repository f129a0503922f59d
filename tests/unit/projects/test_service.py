"""Bringing projects up to date: what is registered, what is queued and why, and what is refused."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from peft_core.errors import InvalidArgument, JobNotFound, StorageError
from peft_core.schemas.events import JobCancelled, JobFailed, JobInterrupted, JobPostponed, JobStarted
from peft_core.schemas.project import RetrainThreshold, RetrainWhen
from peft_core.schemas.results import ErrorInfo, Status
from peft_core.schemas.staleness import Staleness
from peft_core.schemas.training import TrainingConfig
from peft_core.schemas.validation import parse_retrain_when
from peft_core.system.activity import idle_seconds
from tests.unit.projects.conftest import CHANGED, UP_TO_DATE, World, end, git, make_repository

TENTH = RetrainThreshold(units=10)
RECORDS = [{"text": f"def add_{n}(a, b):\n    return a + {n} * b\n"} for n in range(60)]


# -- registration ------------------------------------------------------------------------------------------------------


def test_a_training_registers_its_source_its_settings_and_its_base_model(trained: World, repository: Path) -> None:
    registration = trained.projects.registered("web")
    assert registration.source == str(repository)
    assert registration.config.model_dump(exclude_unset=True) == {
        "base_model": trained.config.base_model,
        "max_length": 128,
        "max_steps": 2,
    }
    assert registration.first_commits == tuple(git(repository, "rev-list", "--max-parents=0", "HEAD").split())
    assert registration.retrain_when == "never"


def test_the_base_model_stays_the_same_if_the_default_changes(world: World, repository: Path) -> None:
    default = str(world.config.base_model)
    world.config = TrainingConfig(max_length=128, max_steps=2)
    settings = world.settings.model_copy(update={"default_base_model": default})
    other = World(settings, world.config)
    other.train(str(repository))
    assert other.projects.registered("web").config.base_model == default


def test_another_training_changes_what_is_registered_but_not_the_rule(trained: World, tmp_path: Path) -> None:
    trained.refresh(retrain_when=TENTH)
    other = make_repository(tmp_path / "code" / "more", "multiply")
    trained.config = trained.config.model_copy(update={"more_sources": [str(other)], "max_steps": 3})
    trained.train(str(tmp_path / "code" / "web"))
    registration = trained.projects.registered("web")
    assert (registration.config.more_sources, registration.config.max_steps) == ([str(other)], 3)
    assert registration.retrain_when == TENTH


def test_a_training_succeeds_although_it_cannot_be_registered(
    world: World, repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = world.paths.registration("web")
    path.parent.mkdir(parents=True)
    path.write_text('{"schema_version": 2}')
    assert world.train(str(repository)).status is Status.QUEUED
    assert "Project web is not registered" in caplog.text
    assert path.read_text() == '{"schema_version": 2}'


# -- a user asks -------------------------------------------------------------------------------------------------------


def test_nothing_is_queued_if_nothing_has_changed(trained: World) -> None:
    refreshed = trained.refresh()
    assert (refreshed.outcome, refreshed.job) == ("nothing_changed", None)
    assert refreshed.reason == "Up to date: none of its 12 files has changed since the training"
    assert len(trained.jobs.trainings("web")) == 1


def test_a_pattern_whose_files_were_deleted_does_not_stop_a_project_from_being_retrained(
    world: World, repository: Path
) -> None:
    (repository / "legacy").mkdir()
    (repository / "legacy" / "old.py").write_text("def old(value):\n    return value\n")
    selected = {"exclude": ["legacy/"], "include": ["add_*.py", "legacy/"]}
    world.config = TrainingConfig.model_validate({**world.config.model_dump(exclude_unset=True), **selected})
    job_id = world.train(str(repository)).job_id
    assert job_id is not None
    end(world, job_id)
    shutil.rmtree(repository / "legacy")
    world.staleness = CHANGED
    refreshed = world.refresh()
    assert refreshed.outcome == "queued"
    assert "config.exclude = 'legacy/' matches no file any more" in refreshed.reason
    config = world.jobs.trainings("web")[0].request.config
    assert (config.include, config.exclude) == (["add_*.py"], [])
    assert world.projects.registered("web").config.exclude == ["legacy/"], "it may come back"


def test_a_project_of_which_nothing_that_was_included_is_left_is_not_trained_on_everything(
    world: World, repository: Path
) -> None:
    world.config = world.config.model_copy(update={"include": ["add_*.py"]})
    job_id = world.train(str(repository)).job_id
    assert job_id is not None
    end(world, job_id)
    for file in repository.glob("add_*.py"):
        file.rename(file.with_name(file.name.replace("add", "sum")))
    git(repository, "add", "--all")
    world.staleness = CHANGED
    with pytest.raises(InvalidArgument, match=r"config.include = 'add_\*.py' cannot be used: it matches no file"):
        world.refresh()


def test_a_project_that_has_changed_is_trained_with_the_same_settings_and_says_why(
    trained: World, repository: Path
) -> None:
    trained.staleness = CHANGED
    refreshed = trained.refresh()
    job = trained.jobs.trainings("web")[0]
    assert (refreshed.outcome, job.request.source, job.request.config.max_steps) == ("queued", repository, 2)
    assert job.started_because == "started to catch up: 3 commits behind: 4 of 12 files changed, 20 % of the units"
    assert not job.only_while_free
    assert refreshed.job is not None
    assert refreshed.job.started_because == job.started_because


def test_a_project_whose_changes_are_not_known_is_trained(trained: World) -> None:
    trained.staleness = Staleness(text="It is not known how far the code has moved on: no record.")
    assert trained.refresh().outcome == "queued"
    assert trained.jobs.trainings("web")[0].started_because == "started to catch up"


def test_a_training_that_waits_by_itself_is_the_one_that_is_asked_for(trained: World) -> None:
    trained.staleness = CHANGED
    trained.refresh(retrain_when=TENTH)
    waiting = trained.jobs.trainings("web")[0]
    trained.store.append(waiting.job_id, JobPostponed(reason="a loaded model is in use"))
    refreshed = trained.refresh()
    assert refreshed.outcome == "already_training"
    assert refreshed.job is not None
    assert (refreshed.job.job_id, refreshed.job.waits_for) == (waiting.job_id, "")
    assert not trained.store.get(waiting.job_id).only_while_free
    assert trained.refresh().outcome == "already_training"  # asking once more changes nothing
    assert len(trained.jobs.trainings("web")) == 2


def test_a_training_that_is_asked_for_replaces_one_that_waits_by_itself(trained: World, repository: Path) -> None:
    trained.staleness = CHANGED
    trained.refresh(retrain_when=TENTH)
    waiting = trained.jobs.trainings("web")[0].job_id
    trained.train(str(repository))
    assert trained.store.get(waiting).status is Status.CANCELLED


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_an_unknown_project_is_refused_with_those_that_exist(trained: World) -> None:
    with pytest.raises(JobNotFound, match=r"no project 'wbe'.*web"):
        trained.refresh("wbe")
    with pytest.raises(JobNotFound, match="no project 'wbe'"):
        trained.projects.refresh_due(["wbe"])


def test_a_project_that_was_not_trained_here_is_refused_with_the_call_that_registers_it(trained: World) -> None:
    trained.publish("adapter-02", "copied")
    with pytest.raises(InvalidArgument, match=r"nothing is registered.*train_adapter") as caught:
        trained.refresh("copied", TENTH)
    assert caught.value.code == "not_registered"


def test_a_project_whose_source_is_gone_is_refused_with_its_path(trained: World, repository: Path) -> None:
    trained.refresh(retrain_when=RetrainThreshold(units=20))
    shutil.rmtree(repository)
    with pytest.raises(InvalidArgument, match="does not exist any more") as caught:
        trained.refresh()
    assert str(repository) in str(caught.value)
    assert caught.value.code == "source_gone"
    trained.staleness = CHANGED
    with pytest.raises(InvalidArgument):
        trained.refresh(retrain_when=TENTH)
    assert trained.projects.registered("web").retrain_when == RetrainThreshold(units=20)
    assert trained.check().outcome == "not_possible"
    assert "does not exist any more" in trained.check().reason
    assert trained.refresh(retrain_when="never").outcome == "registered"


def test_a_project_that_was_trained_on_records_of_a_call_is_refused(world: World) -> None:
    status = world.train(RECORDS, "chats")
    assert status.job_id is not None
    end(world, status.job_id)
    assert world.projects.registered("chats").source is None
    with pytest.raises(InvalidArgument, match="records that the call gave"):
        world.refresh("chats")


def test_a_rule_that_could_never_have_an_effect_is_refused(world: World, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    without_git = make_repository(tmp_path / "plain")
    shutil.rmtree(without_git / ".git")
    for project, data in (("call", RECORDS), ("file", str(file)), ("plain", str(without_git))):
        world.train(data, project)
    for project, rule, reason in (
        ("call", TENTH, "records that the call gave"),
        ("file", TENTH, "trained on records, whose changes are not known"),
        ("plain", RetrainThreshold(commits=2), "needs the commits of a git repository, and .*plain has none"),
    ):
        with pytest.raises(InvalidArgument, match=reason):
            world.refresh(project, rule)
        assert world.projects.registered(project).retrain_when == "never"
    assert world.refresh("plain", TENTH).retrain_when == TENTH


def test_another_repository_at_the_same_path_is_refused(trained: World, repository: Path, tmp_path: Path) -> None:
    shutil.rmtree(repository)
    make_repository(repository, "other")
    with pytest.raises(InvalidArgument, match="another repository at this path") as caught:
        trained.refresh()
    assert caught.value.code == "another_repository"
    trained.train(str(repository))  # the way on if its history was rewritten
    assert trained.projects.registered("web").first_commits == tuple(
        git(repository, "rev-list", "--max-parents=0", "HEAD").split()
    )


def test_another_repository_for_a_project_with_an_adapter_is_refused_with_both_paths(
    trained: World, repository: Path, tmp_path: Path
) -> None:
    other = make_repository(tmp_path / "code" / "other", "other")
    with pytest.raises(InvalidArgument, match="no commit in common") as caught:
        trained.train(str(other))
    assert caught.value.code == "another_repository"
    assert str(repository) in str(caught.value)
    assert str(other) in str(caught.value)
    assert trained.train(str(other), "other").status is Status.QUEUED
    shutil.rmtree(trained.paths.adapters("web"))
    assert trained.train(str(other)).status is Status.QUEUED  # without an adapter there is nothing to confuse


def test_a_clone_and_a_repository_that_was_moved_are_the_same_repository(
    trained: World, repository: Path, tmp_path: Path
) -> None:
    git(tmp_path, "clone", "-q", str(repository), "clone")
    assert trained.train(str(tmp_path / "clone")).status is Status.QUEUED
    moved = repository.rename(tmp_path / "moved")
    assert trained.train(str(moved)).status is Status.QUEUED
    assert trained.projects.registered("web").source == str(moved)


def test_a_damaged_registration_is_refused_and_written_anew_by_the_next_training(
    trained: World, repository: Path
) -> None:
    trained.paths.registration("web").write_text("{")
    with pytest.raises(StorageError, match="is not JSON"):
        trained.refresh()
    trained.train(str(repository))
    assert trained.projects.registered("web").source == str(repository)


@pytest.mark.parametrize(
    "rule",
    [
        *({"units": 0}, {"units": 101}, {"units": "many"}, {"units": -5}, {"units": 2.5}, {"commits": 0}),
        *({}, {"units": 5, "commits": 5}, {"percent": 5}, "often", "", 10, ["never"]),
    ],
)
def test_a_rule_that_is_none_is_refused_with_those_that_there_are(rule: Any) -> None:
    with pytest.raises(InvalidArgument, match="retrain_when") as caught:
        parse_retrain_when(rule)
    assert '{"units": N}' in str(caught.value)
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        *(("never", "never"), ({"units": 10}, TENTH), ({"commits": 20}, RetrainThreshold(commits=20)), (None, None)),
        *((TENTH, TENTH), ({"units": 1}, RetrainThreshold(units=1)), ({"units": 100}, RetrainThreshold(units=100))),
    ],
)
def test_a_rule_is_taken_as_a_client_writes_it(given: Any, rule: RetrainWhen | None) -> None:
    assert parse_retrain_when(given) == rule


# -- by itself ---------------------------------------------------------------------------------------------------------


def test_a_project_is_not_retrained_by_itself_unless_that_was_set(trained: World) -> None:
    trained.staleness = CHANGED
    assert trained.check().outcome == "not_due"
    assert trained.projects.refresh_due() == []


@pytest.mark.parametrize(
    ("rule", "due"),
    [
        (RetrainThreshold(units=20), True),
        (RetrainThreshold(units=21), False),
        (RetrainThreshold(commits=3), True),
        (RetrainThreshold(commits=4), False),
    ],
)
def test_a_training_starts_by_itself_when_its_rule_demands_it(
    trained: World, rule: RetrainThreshold, due: bool
) -> None:
    trained.refresh(retrain_when=rule)
    assert len(trained.jobs.trainings("web")) == 1
    trained.staleness = CHANGED
    (refreshed,) = trained.projects.refresh_due()
    assert refreshed.outcome == ("queued" if due else "not_due")
    jobs = trained.jobs.trainings("web")
    assert len(jobs) == (2 if due else 1)
    if due:
        assert jobs[0].only_while_free
        assert jobs[0].started_because.startswith("started by itself: 3 commits behind: 4 of 12 files")
    else:
        assert refreshed.reason.startswith("3 commits behind: 4 of 12 files")
        assert refreshed.retrain_when == rule


@pytest.mark.parametrize(("units", "due"), [(33, True), (34, False)])
def test_where_no_units_were_recorded_a_file_that_has_changed_counts_as_a_whole(
    trained: World, units: int, due: bool
) -> None:
    trained.refresh(retrain_when=RetrainThreshold(units=units))
    trained.staleness = CHANGED.model_copy(update={"units_changed_percent": None, "files_changed": 3, "files_new": 1})
    assert trained.check().outcome == ("queued" if due else "not_due")


def test_commits_that_change_nothing_that_is_read_are_no_reason(trained: World) -> None:
    trained.refresh(retrain_when=RetrainThreshold(commits=1))
    trained.staleness = UP_TO_DATE.model_copy(update={"commits_behind": 50})
    assert trained.check().outcome == "not_due"


def test_a_rule_that_is_set_is_followed_immediately_if_it_is_due(trained: World) -> None:
    trained.staleness = CHANGED
    refreshed = trained.refresh(retrain_when=TENTH)
    assert refreshed.outcome == "queued"
    assert trained.jobs.trainings("web")[0].only_while_free
    assert trained.refresh(retrain_when="never").outcome == "registered"


def test_nothing_is_queued_while_a_training_of_the_project_is_not_over(trained: World) -> None:
    trained.staleness = CHANGED
    trained.refresh(retrain_when=TENTH)
    assert trained.check().outcome == "already_training"
    assert len(trained.jobs.trainings("web")) == 2


def hours_after(trained: World, hours: float, *events: JobStarted | JobCancelled | JobFailed) -> str:
    """Let a training that started by itself end, and return what a check says so many hours later."""
    world = World(trained.settings.model_copy(update={"refresh_interval_s": 3600.0}), trained.config, CHANGED)
    assert world.refresh(retrain_when=TENTH).outcome == "queued"  # the first training ended long ago
    world.ended_at = time.time() - hours * 3600
    job = world.jobs.trainings("web")[0].job_id
    for event in events:
        world.store.append(job, event)
    if not events:
        end(world, job)
    return world.check().outcome


@pytest.mark.parametrize(("hours", "outcome"), [(0.9, "not_due"), (1.1, "queued")])
def test_trainings_that_start_by_themselves_keep_their_distance(trained: World, hours: float, outcome: str) -> None:
    assert hours_after(trained, hours) == outcome


@pytest.mark.parametrize("event", [JobCancelled(), JobFailed(error=ErrorInfo(code="x", message="x"))])
@pytest.mark.parametrize(("hours", "outcome"), [(23, "not_due"), (25, "queued")])
def test_a_training_that_was_cancelled_or_failed_is_not_repeated_for_a_day(
    trained: World, event: JobCancelled | JobFailed, hours: float, outcome: str
) -> None:
    assert hours_after(trained, hours, event) == outcome


def test_a_training_that_was_interrupted_is_continued_and_not_begun_again(trained: World) -> None:
    trained.staleness = CHANGED
    trained.refresh(retrain_when=TENTH)
    job = trained.jobs.trainings("web")[0].job_id
    for event in (JobStarted(), JobInterrupted(reason="The machine went down.")):
        trained.store.append(job, event)
    refreshed = trained.check()
    assert refreshed.outcome == "queued"
    (newest, _) = trained.jobs.trainings("web")
    assert (newest.job_id, newest.status, newest.only_while_free) == (job, Status.QUEUED, True)


def test_a_training_that_a_user_asked_for_and_that_was_interrupted_stays_so(trained: World) -> None:
    trained.staleness = CHANGED
    trained.refresh()
    job = trained.jobs.trainings("web")[0].job_id
    for event in (JobStarted(), JobInterrupted(reason="The machine went down.")):
        trained.store.append(job, event)
    trained.refresh(retrain_when=RetrainThreshold(units=50))
    assert trained.store.get(job).status is Status.INTERRUPTED


def test_what_the_newest_adapter_was_trained_on_counts_even_if_it_is_not_current(
    trained: World, tmp_path: Path
) -> None:
    asked: list[str] = []
    trained.publish("adapter-02", current=False)
    trained.projects._staleness_of = lambda adapter: asked.append(adapter.name) or UP_TO_DATE  # type: ignore[func-returns-value]
    trained.refresh(retrain_when=TENTH)
    assert asked == ["adapter-02"]


def test_unknown_changes_are_no_reason_to_retrain_by_itself(trained: World) -> None:
    trained.staleness = None
    assert trained.refresh(retrain_when=TENTH).outcome == "not_due"


def test_a_check_of_all_projects_continues_after_one_that_is_not_possible(
    trained: World, repository: Path, tmp_path: Path
) -> None:
    other = make_repository(tmp_path / "code" / "other", "other")
    status = trained.train(str(other), "a-first")
    assert status.job_id is not None
    end(trained, status.job_id)
    trained.publish("adapter-03", "a-first")
    for project_id in ("a-first", "web"):
        trained.refresh(project_id, retrain_when=TENTH)
    shutil.rmtree(other)
    trained.staleness = CHANGED
    outcomes = {refreshed.project_id: refreshed.outcome for refreshed in trained.projects.refresh_due()}
    assert outcomes == {"a-first": "not_possible", "web": "queued"}


def test_of_two_that_decide_on_the_same_state_one_queues_a_job(trained: World) -> None:
    trained.staleness = CHANGED
    trained.refresh(retrain_when=RetrainThreshold(units=50))
    first, second = (trained.projects.plan_refresh("web", None) for _ in range(2))
    assert trained.projects.start(first).outcome == "queued"  # type: ignore[arg-type]
    job = trained.jobs.trainings("web")[0].job_id
    end(trained, job)  # even if it has ended before the other one comes
    refreshed = trained.projects.start(second)  # type: ignore[arg-type]
    assert refreshed.job is not None
    assert refreshed.job.job_id == job
    assert len(trained.jobs.trainings("web")) == 2
    leftovers = [path.name for path in (trained.paths.root / "jobs").glob("*")]
    assert len(leftovers) <= 2


def test_the_registration_is_json_that_people_can_read(trained: World, repository: Path) -> None:
    document = json.loads(trained.paths.registration("web").read_text())
    assert document["source"] == str(repository)
    assert document["retrain_when"] == "never"


def test_a_training_that_a_user_resumes_does_not_wait_for_a_free_machine(trained: World) -> None:
    trained.staleness = CHANGED
    trained.refresh(retrain_when=TENTH)
    job = trained.jobs.trainings("web")[0].job_id
    trained.store.append(job, JobCancelled())
    trained.jobs.resume(job)
    assert not trained.store.get(job).only_while_free


def test_a_training_that_started_by_itself_makes_way_for_a_model(
    trained: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.staleness = CHANGED
    trained.refresh(retrain_when=TENTH)
    job = trained.jobs.trainings("web")[0].job_id
    trained.store.append(job, JobStarted())
    asked: list[float | None] = []

    def pause(_: float) -> None:  # what the runner does when it sees that a model is in use
        asked.append(idle_seconds(trained.paths.model_activity, time.time()))
        trained.store.append(job, JobPostponed(reason="a loaded model is in use"))

    monkeypatch.setattr("peft_core.jobs.service.time.sleep", pause)
    assert trained.jobs.make_way() is None
    assert asked == [0.0]
