"""The event that ends a job, for every combination of what its worker wrote, its exit code, and the requests to stop."""

from __future__ import annotations

import signal
from itertools import product
from pathlib import Path

import pytest

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.jobs.free_machine import FreeMachine, Limits
from peft_core.jobs.running_job import RunnerState, RunningJob
from peft_core.jobs.store import Store
from peft_core.schemas.events import Event, JobCancelled, JobFailed, JobInterrupted, JobPostponed, JobStarted
from peft_core.schemas.results import ErrorInfo, Status
from peft_core.schemas.training import ContinuedAdapter, EvaluatedAdapter, TrainingConfig
from peft_core.system.cancellation import CANCELLED_EXIT_CODE
from peft_core.system.lock import FileLock
from peft_core.system.machine_use import MachineUse
from tests.factories import make_job, make_request

FAILED = JobFailed(error=ErrorInfo(code="too_few_examples", message="Too few examples.", suggestions=()))


class Ended:
    """A job that has started and whose worker is about to be reported as ended."""

    def __init__(self, root: Path, **request: object) -> None:
        settings = Settings(data_dir=root)
        self.paths = settings.paths
        self.store = Store(self.paths.database, lambda: 0.0)
        self.store.create()
        self.job = make_job(request=make_request(**request))
        self.store.insert(self.job)
        self.store.append(self.job.job_id, JobStarted())
        self.runner = RunnerState(
            self.store,
            Registry(self.paths),
            settings,
            FileLock(self.paths.runner_lock),
            FreeMachine(Limits()),
            lambda: MachineUse(load=0.0),
        )
        self.running = RunningJob(self.job, self.runner)

    def outcome(self, last_event: Event | None, code: int) -> Event | None:
        return self.running._outcome(last_event, code)


def test_the_task_of_an_update_has_the_training_examples_of_its_parent(tmp_path: Path) -> None:
    continued = ContinuedAdapter(adapter_id="a-01", adapter_path=tmp_path / "a-01", weights_sha256="0")
    ended = Ended(tmp_path, continued=continued)
    assert ended.running._task().earlier_examples == ()  # they were deleted
    examples = ended.paths.job("a-01").dataset / "train.jsonl"
    examples.parent.mkdir(parents=True)
    examples.touch()
    assert ended.running._task().earlier_examples == (examples,)
    assert Ended(tmp_path / "scratch").running._task().earlier_examples == ()


@pytest.mark.parametrize(("last_event", "code"), list(product((None, FAILED), (0, 1, -9, CANCELLED_EXIT_CODE))))
def test_a_requested_cancellation_ends_the_job_as_cancelled_whatever_the_worker_did(
    tmp_path: Path, last_event: Event | None, code: int
) -> None:
    ended = Ended(tmp_path)
    ended.store.request_cancel(ended.job.job_id)
    assert ended.outcome(last_event, code) == JobCancelled()


@pytest.mark.parametrize("last_event", [None, FAILED])
@pytest.mark.parametrize(("is_stopping", "code"), [(True, 1), (True, -signal.SIGTERM), (False, CANCELLED_EXIT_CODE)])
def test_a_worker_that_was_asked_to_stop_is_interrupted_even_if_it_reports_an_error(
    tmp_path: Path, last_event: Event | None, is_stopping: bool, code: int
) -> None:
    ended = Ended(tmp_path)
    if is_stopping:
        ended.runner.is_stopping = True
    outcome = ended.outcome(last_event, code)
    assert isinstance(outcome, JobInterrupted)
    assert outcome.reason.startswith("The training was asked to stop")


@pytest.mark.parametrize("last_event", [None, FAILED])
@pytest.mark.parametrize("code", [CANCELLED_EXIT_CODE, 1, -signal.SIGKILL])
def test_a_paused_job_returns_to_the_queue_however_its_worker_ended(
    tmp_path: Path, last_event: Event | None, code: int
) -> None:
    ended = Ended(tmp_path)
    ended.running._pause = "the machine runs on its battery"
    assert ended.outcome(last_event, code) == JobPostponed(reason="the machine runs on its battery")
    ended.runner.is_stopping = True
    assert isinstance(ended.outcome(last_event, code), JobInterrupted)


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_error_that_a_worker_reports_is_the_error_of_the_job(tmp_path: Path, code: int) -> None:
    assert Ended(tmp_path).outcome(FAILED, code) == FAILED


@pytest.mark.parametrize(
    ("code", "error_code", "message"),
    [
        (-signal.SIGKILL, "killed", "The training process was killed"),
        (3, "died_silently", "The training process ended with exit code 3, without a result"),
    ],
)
def test_a_worker_that_ends_without_a_result_is_explained_by_its_exit_code(
    tmp_path: Path, code: int, error_code: str, message: str
) -> None:
    outcome = Ended(tmp_path).outcome(None, code)
    assert isinstance(outcome, JobFailed)
    assert outcome.error.code == error_code
    assert outcome.error.message.startswith(message)


def test_a_killed_evaluation_is_called_an_evaluation(tmp_path: Path) -> None:
    outcome = Ended(tmp_path, evaluated=EvaluatedAdapter(adapter_path=Path("/adapters/a-01"))).outcome(None, -9)
    assert isinstance(outcome, JobFailed)
    assert outcome.error.message.startswith("The evaluation process was killed")


@pytest.mark.parametrize("last_event", [None, FAILED])
@pytest.mark.parametrize("code", [CANCELLED_EXIT_CODE, 1, -signal.SIGKILL])
def test_a_job_whose_time_is_over_is_interrupted_with_its_limit(
    tmp_path: Path, last_event: Event | None, code: int
) -> None:
    ended = Ended(tmp_path, config=TrainingConfig(max_minutes=30))
    ended.running._ends_at = 0.0
    assert ended.outcome(last_event, code) == JobInterrupted(
        reason="The time limit was reached: config.max_minutes = 30."
    )


async def test_a_launcher_that_does_not_exist_fails_the_job_by_the_name_of_its_setting(tmp_path: Path) -> None:
    ended = Ended(tmp_path)
    ended.runner.settings = ended.runner.settings.model_copy(update={"launcher": "no-such-launcher launch"})
    with ended.runner.lock as lock:
        assert lock.acquire()
        await ended.running.run()
    job = ended.store.get(ended.job.job_id)
    assert job.error is not None
    assert job.error.code == "launcher_not_started"
    assert job.error.message == "The launcher no-such-launcher cannot be started: No such file or directory."
    assert "CODEBASE_GARDENER_LAUNCHER" in job.error.suggestions[0]
    assert job.status is Status.FAILED
