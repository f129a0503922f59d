"""Training and evaluation jobs: plan, queue, inspect, follow, cancel, resume.

Every method blocks, `plan` for up to a second on a large repository; the manager calls them in threads.
"""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import InvalidArgument, JobNotFound, JobStateError, PeftMcpError, StorageError
from peft_core.gardener.names import PipelineOptions
from peft_core.gardener.registry import ProjectRegistry
from peft_core.jobs.state import IllegalTransition, Job
from peft_core.jobs.status import not_started, status_of, summary_of
from peft_core.jobs.store import Store
from peft_core.jobs.supervisor import RunnerSupervisor
from peft_core.jobs.sweep import shown, status_of_sweep
from peft_core.schemas.base_model import Base
from peft_core.schemas.counts import counted
from peft_core.schemas.dataset import DatasetSpec, SourceKind, TrainingData
from peft_core.schemas.events import AdaptersCompared, Evaluated, JobAskedFor, JobResumed
from peft_core.schemas.job_report import JobReport
from peft_core.schemas.local_bases import LocalBases
from peft_core.schemas.recommendation import BaseRecommendation
from peft_core.schemas.results import JobSummary, Status, TrainingDataReport, TrainingStatus
from peft_core.schemas.study import StudyPlan
from peft_core.schemas.task import JobRequest
from peft_core.schemas.training import DataSelection, EvaluatedAdapter, SweepRun, TrainingConfig, project_id_from
from peft_core.system.activity import active

if TYPE_CHECKING:
    from peft_core.jobs.measured_speeds import MeasuredSpeeds

MAX_NAMED_PROJECTS = 10  # in an error
MAKE_WAY_S = 15.0  # how long a call that needs the memory waits for the pause of a job
POLL_INTERVAL_S = 0.25
SPEED_HISTORY = 50  # newest completed jobs that are searched for a measured speed on the same base model and device

log = logging.getLogger(__name__)  # structlog would slow the server's start down by 0.1 s


class JobService:
    def __init__(self, settings: Settings, registry: Registry, projects: ProjectRegistry | None = None) -> None:
        self._settings = settings
        self._paths = settings.paths
        self._projects = projects or ProjectRegistry(self._paths)
        self._store = Store(self._paths.database, time.time, self._projects.show)
        self._registry = registry
        self._supervisor = RunnerSupervisor(settings, self._store, registry)

    # -- new jobs ------------------------------------------------------------------------------------------------------
    # The planners are imported with the first job: resolving base models and reading code would slow the server's start.

    def plan(
        self,
        project_id: str,
        training_data: TrainingData,
        config: TrainingConfig,
        options: PipelineOptions | None = None,
    ) -> JobRequest:
        """Check everything that can be checked without a model, and return what to pass to `queue`; nothing is written.

        Args:
            project_id: The project, from whose current adapter the training continues by default.
            training_data: What to train on.
            config: How.
            options: Limits on how many units or records are trained on.

        Raises:
            InvalidArgument, AdapterNotFound, DataError, BaseCheckpointError, ClusterError, StorageError: it cannot be run.
        """
        from peft_core.planning.continuation import Adapters  # noqa: PLC0415
        from peft_core.planning.planner import plan  # noqa: PLC0415

        # kill-point: server: asked to train
        adapters = Adapters(self._registry, project_id, self.base_of)
        speed = self._measured_speeds(config.run_on).of
        draft = plan(training_data, config, self._settings, speed, adapters)
        if options is None:
            return draft
        from peft_core.planning.defaults import count_units, too_little  # noqa: PLC0415

        minimum, maximum = options.min_training_chunks, options.max_training_chunks
        if minimum is not None and (units := count_units(draft.found)) < minimum:
            raise too_little(units, draft.found, minimum)
        batch_size = draft.config.batch_size
        if maximum is None or draft.estimate.steps * batch_size <= maximum:
            return draft
        steps = max(1, maximum // batch_size)
        limited = config.model_copy(update={"max_steps": steps, "num_epochs": None})
        draft = plan(training_data, limited, self._settings, speed, adapters)
        limit = f"{counted(steps, 'step')}, by config.max_training_chunks = {maximum}."
        chosen = f"{limit} {draft.estimate.chosen}".rstrip()
        return draft.model_copy(update={"estimate": draft.estimate.model_copy(update={"chosen": chosen})})

    def plan_runs(
        self,
        project_id: str,
        training_data: TrainingData,
        config: TrainingConfig,
        options: PipelineOptions | None = None,
    ) -> list[JobRequest]:
        """Plan each run of a sweep, as `plan`; without a sweep, one."""
        drafts = [self.plan(project_id, training_data, run, options) for run in config.runs]
        if config.sweep is None:
            return drafts
        sweep_id, setting = secrets.token_hex(6), config.sweep.setting
        return [
            draft.model_copy(update={"sweep": SweepRun(sweep_id=sweep_id, number=number, setting=setting)})
            for number, draft in enumerate(drafts, 1)
        ]

    def evaluate(
        self, evaluated: EvaluatedAdapter, base: Base, evaluation_data: TrainingData | None, selection: DataSelection
    ) -> TrainingStatus:
        """Queue a job that compares a base model with an adapter or with two. It belongs to the first one's project.

        Without `evaluation_data`, the source of the newer adapter's training is read: what it held out is left of it.

        Raises:
            InvalidArgument, DataError, StorageError: nothing was queued.
        """
        from peft_core.planning.evaluation import plan_evaluation  # noqa: PLC0415

        adapters = list(evaluated.paths.values())
        if evaluation_data is None:
            evaluation_data, trained_on = self._source_of_newest(adapters)
            selection = trained_on if selection == DataSelection() else selection
        draft = plan_evaluation(
            evaluated, evaluation_data, base, self._settings, self._measured_speeds().of, selection=selection
        )
        return self.queue(self._project_of(*adapters), draft, evaluation_data)

    def _source_of_newest(self, adapters: Sequence[Path]) -> tuple[str, DataSelection]:
        """Return the path that the newest of these adapters was trained on, and what was selected of it.

        Raises:
            InvalidArgument: no path is recorded for any of them.
        """
        known = {job.job_id: job for job in self._store.in_state(Status.COMPLETED)} if self._store.exists else {}
        trainings = [known[adapter.name] for adapter in adapters if adapter.name in known]
        for job in sorted(trainings, key=lambda job: job.created_at, reverse=True):
            if job.request.source_kind is not SourceKind.RECORDS:
                selected = job.request.config.model_dump(include=set(DataSelection.model_fields))
                return str(job.request.source), DataSelection(**selected)
        raise InvalidArgument(
            "evaluation_data",
            None,
            "it must be given, because the path of the code that the adapters were trained on is not recorded here",
            suggestions=["Give the path of a repository or a file, of which neither adapter was trained on all"],
        )

    def inspect(self, training_data: TrainingData, config: TrainingConfig) -> TrainingDataReport:
        """Do a dry run of a training, and describe the dataset and the settings.

        Raises:
            InvalidArgument, DataError, BaseCheckpointError, StorageError: `plan` would reject the request.
        """
        from peft_core.planning.continuation import Adapters  # noqa: PLC0415
        from peft_core.planning.inspection import inspect_training_data  # noqa: PLC0415

        adapters = Adapters(self._registry, None, self.base_of)
        speed, runs = self._measured_speeds(config.run_on).of, config.runs
        report = inspect_training_data(training_data, runs[0], self._settings, speed, adapters)
        if config.sweep is None:
            return report
        first = f"This is the first of the sweep's {len(runs)} runs, which differ in {config.sweep.setting} only."
        chosen = f"{report.estimate.chosen} {first}".strip()
        return report.model_copy(update={"estimate": report.estimate.model_copy(update={"chosen": chosen})})

    def list_base_models(self) -> LocalBases:
        """List the base models on this machine, with what training each would take. Only headers are read."""
        from peft_core.planning.local_bases import list_base_models  # noqa: PLC0415

        return list_base_models(self._settings, self._measured_speeds().of)

    def recommend_base(
        self,
        project_id: str | None,
        training_data: TrainingData | None,
        registered: Callable[[str], tuple[str, DataSelection]],
    ) -> BaseRecommendation:
        """Rank the base models on this machine for a training of this data, else of a project's, else of 1000 examples.

        `registered(project_id)` returns the path that a project was trained on, and what was selected of it.

        Raises:
            JobNotFound, InvalidArgument, DataError, StorageError: the data cannot be read, or `registered` raises it.
        """
        from peft_core.planning.recommend_base import recommend_base  # noqa: PLC0415

        selection, speeds = DataSelection(), self._measured_speeds()
        if project_id is not None and training_data is None and self._projects.find(project_id) is None:
            training_data, selection = registered(project_id)
        elif project_id is not None:
            training_data = self._projects.data_of(project_id, training_data)
        return recommend_base(training_data, selection, self._settings, speeds.of, speeds.newest)

    def propose_study_plan(
        self, project_id: str, training_data: str | None, registered: Callable[[str], tuple[str, DataSelection]]
    ) -> StudyPlan:
        """Rank the API of a project's code, or of the code in this directory; see `recommend_base` for `registered`.

        Raises:
            JobNotFound, InvalidArgument, DataError, StorageError: there is no code to read, or `registered` raises it.
        """
        from peft_core.planning.study_plan import propose_study_plan  # noqa: PLC0415

        selection, data = DataSelection(), training_data
        if data is None and self._projects.find(project_id) is None:
            try:
                data, selection = registered(project_id)
            except InvalidArgument as error:
                if error.code != "not_registered":
                    raise
                needed = f"the directory of the code is required, because project {project_id!r} was not trained here"
                raise InvalidArgument("training_data", None, needed) from error
        given = self._projects.data_of(project_id, data)
        return propose_study_plan(project_id, given, selection, self._settings, self._registry.current_path(project_id))

    def better_base(self, draft: JobRequest, config: TrainingConfig) -> str:
        """Return a sentence on a base model of this machine that suits code clearly better than the default, or nothing.

        `draft` is what `plan` made of `config`.
        """
        from peft_core.planning.recommend_base import better_base  # noqa: PLC0415

        speeds = self._measured_speeds()
        try:
            return better_base(draft, config, self._settings, speeds.of, speeds.newest)
        except (PeftMcpError, OSError) as error:  # a place of other programs' models must not prevent a training
            log.warning("No better base model was looked for: %s", error)
            return ""

    def queue(self, project_id: str, draft: JobRequest, data: TrainingData) -> TrainingStatus:
        """Queue one job; see `queue_runs`."""
        return self.queue_runs(project_id, [draft], data)

    def queue_runs(self, project_id: str, drafts: Sequence[JobRequest], data: TrainingData) -> TrainingStatus:
        """Queue the jobs that `plan_runs` has checked, with the same data, and make sure that a runner is alive.

        Return the status of the first one.

        A training replaces those of the project that started by themselves and have not ended.

        Raises:
            DataError, StorageError: nothing was queued.
        """
        jobs = [self._new_job(project_id, draft, data) for draft in drafts]
        replaced = self.trainings(project_id) if jobs[0].is_training else []
        # kill-point: server: the job is about to be queued
        self._store.insert(*jobs)
        # kill-point: server: the job is queued, no runner works on it
        for other in replaced:
            if other.only_while_free and not other.status.is_final:
                with suppress(JobStateError):  # it has ended meanwhile
                    self._store.request_cancel(other.job_id)
        return self._start(jobs[0].job_id)

    def queue_refresh(
        self,
        project_id: str,
        draft: JobRequest,
        source: str,
        *,
        because: str,
        only_while_free: bool,
        latest: str | None,
    ) -> TrainingStatus:
        """Queue a training that brings a project up to date, unless its latest training is not `latest` any more.

        Return the status of the training, or else of the one that another process has queued.

        Raises:
            DataError, StorageError: nothing was queued.
        """
        job = self._new_job(project_id, draft, source)
        job = job.model_copy(update={"started_because": because, "only_while_free": only_while_free})
        if not self._store.insert_next_training(job, latest):
            shutil.rmtree(self._paths.job(job.job_id).root, ignore_errors=True)
            job = self._store.trainings(project_id)[0]
        return self._start(job.job_id)

    def _new_job(self, project_id: str, draft: JobRequest, data: TrainingData) -> Job:
        """Return a job that is not in the queue yet; the records that the request gave are on disk.

        Raises:
            DataError, StorageError: it cannot be queued.
        """
        from peft_core.planning.planner import write_source  # noqa: PLC0415

        # kill-point: server: the request is planned, nothing is written
        self._store.create()
        # kill-point: server: the database exists
        self._supervisor.require_locks()
        now = time.time()
        job_id = f"{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        request = write_source(draft, data, self._paths.job(job_id).records)
        return Job(job_id=job_id, project_id=project_id, request=request, created_at=now, updated_at=now)

    def _start(self, job_id: str) -> TrainingStatus:
        """Try to start a runner for a job in the queue.

        If that fails for now, the job stays queued and the next call tries again: an error would suggest that it is not.
        """
        self._supervisor.ensure_runner_if_possible()
        return self._to_status(self._store.get(job_id))

    # -- existing jobs -------------------------------------------------------------------------------------------------

    def status_and_ensure_runner(self, project_id: str, job_id: str | None = None) -> TrainingStatus:
        """Return the state of the named job, or of the project's latest training.

        No daemon would notice a dead process. So this method does, for an unfinished job: it records the job as interrupted,
        and starts a runner if jobs are waiting. A client that only polls can rely on the answer.

        Raises:
            JobNotFound: no such job or project.
            InvalidArgument: the job belongs to another project.
        """
        job = self._find(project_id, job_id)
        if job is None:
            self.require_project(project_id)
            return not_started(project_id)
        if not job.status.is_final:
            self._supervisor.ensure_runner()
            job = self._store.get(job.job_id)
        if job.status.is_final and (job_id is None or job == self._store.latest(project_id)):
            self._show(
                job
            )  # the process that ended the job does this after recording it, unless it dies between the two
        return self._to_status(job)

    def show_status(self, project_id: str) -> None:
        """Show the state of a project in Codebase Gardener again, after its adapters have changed."""
        if (job := self._find(project_id, None)) is not None:
            self._show(job)

    def _show(self, job: Job) -> None:
        if job.is_training:
            self._projects.show(job.project_id, job.status)

    def status_by_id(self, job_id: str) -> TrainingStatus:
        """Do the same as `status_and_ensure_runner` for a job whose project is not known."""
        self._require_database(job_id)
        return self.status_and_ensure_runner(self._store.get(job_id).project_id, job_id)

    def trainings(self, project_id: str) -> list[Job]:
        """Return a project's trainings, the one that was queued last first."""
        return self._store.trainings(project_id) if self._store.exists else []

    def ask_for(self, job_id: str) -> TrainingStatus:
        """Let an unfinished job run whether the machine is free or not, and return its status."""
        with suppress(IllegalTransition):  # a user has asked for it already
            self._store.append(job_id, JobAskedFor())
        return self._start(job_id)

    def running_job(self) -> TrainingStatus | None:
        """Record dead jobs, then return the job that a runner is working on here, on no cluster, or None."""
        self.ensure_runner()
        jobs = self._store.in_state(Status.IN_PROGRESS) if self._store.exists else []
        running = [job for job in jobs if not job.on_cluster]
        return self._to_status(running[0]) if running else None

    def make_way(self) -> TrainingStatus | None:
        """Have a running job paused that started by itself, because a model is about to be used; return the job that runs then.

        Waits for seconds at most: the pause takes a step and a checkpoint.
        """
        deadline = time.monotonic() + MAKE_WAY_S
        with active(self._paths.model_activity):
            while (running := self.running_job()) is not None and running.only_while_free:
                if time.monotonic() >= deadline:
                    break
                time.sleep(POLL_INTERVAL_S)
        return running

    def newest(self, count: int) -> list[JobSummary]:
        """Return the jobs that were queued last, newest first."""
        return list(map(summary_of, self._store.newest(count))) if self._store.exists else []

    def unfinished_ids(self) -> set[str]:
        return self._store.unfinished_ids() if self._store.exists else set()

    def job_ids(self) -> set[str]:
        return self._store.job_ids() if self._store.exists else set()

    def project_ids(self) -> list[str]:
        """Return the projects that have jobs, the latest first, then the others that have adapters."""
        jobs = self._store.projects() if self._store.exists else []
        return list(dict.fromkeys([*jobs, *self._registry.projects()]))

    def draw_loss_curve(self, project_id: str, job_id: str | None, title: str) -> bytes | None:
        """Draw the loss curve so far as PNG; return None before the first step."""
        job = self._find(project_id, job_id)
        if job is None:
            return None
        from peft_core.evaluation.loss_curve import loss_curve, render_png  # noqa: PLC0415 -- not at the server's start

        curve = loss_curve(self._store.events(job.job_id))
        return None if curve.is_empty else render_png(curve, title)

    def report(self, job_id: str) -> JobReport:
        """Return the status, the loss curve so far, and completions once they are evaluated.

        Raises:
            JobNotFound: there is no such job.
        """
        self._require_database(job_id)
        from peft_core.evaluation.loss_curve import loss_curve  # noqa: PLC0415 -- not at the server's start

        status = self._to_status(self._store.get(job_id))
        events = self._store.events(job_id)
        curve = loss_curve(events).finite
        evaluation = next((event.evaluation for event in reversed(events) if isinstance(event, Evaluated)), None)
        comparison = next((event.comparison for event in reversed(events) if isinstance(event, AdaptersCompared)), None)
        return JobReport(
            status=status,
            steps=curve.steps,
            smooth=curve.smooth,
            held_out=curve.held_out,
            whole=curve.whole,
            caveats=evaluation.caveats if evaluation else comparison.cautions if comparison else (),
            gains=evaluation.gains if evaluation else (),
            losses=evaluation.losses if evaluation else (),
            differences=comparison.completions if comparison else (),
        )

    def changed_since(self, event_id: int | None) -> tuple[int, list[str]]:
        """Return (newest event id, ids of the jobs with events after `event_id`; no ids for None)."""
        if not self._store.exists:
            return 0, []
        return self._store.changed_since(event_id)

    def ensure_runner(self) -> None:
        """Record jobs whose process is dead, and start a runner if jobs are waiting."""
        if self._store.exists and self._store.in_state(Status.QUEUED, Status.IN_PROGRESS):
            self._supervisor.ensure_runner()

    def cancel(self, project_id: str, job_id: str | None) -> TrainingStatus:
        """Cancel a queued job immediately; ask the runner to cancel a running one, which takes seconds.

        Without a job id, all runs of a sweep are cancelled.

        Raises:
            JobStateError: there is nothing to cancel.
        """
        job = self._find(project_id, job_id)
        if job is None:
            self.require_project(project_id)
            raise JobStateError(
                f"Nothing to cancel: no training was started for project {project_id!r}.", code="nothing_to_cancel"
            )
        self._supervisor.ensure_runner_if_possible()
        if job.status.is_final and job_id is None:
            self._require_no_other(job)
        self._store.request_cancel(job.job_id)
        for run in self._store.runs_of_sweep(job) if job_id is None else []:
            if not run.status.is_final:
                with suppress(JobStateError):  # it has ended meanwhile, or is the one above
                    self._store.request_cancel(run.job_id)
        return self._to_status(self._store.get(job.job_id))

    def _require_no_other(self, latest: Job) -> None:
        """Raise JobStateError if a project's latest training has ended, but another job of it has not: an evaluation."""
        unfinished = self._store.in_state(Status.QUEUED, Status.IN_PROGRESS)
        others = [f"{job.request.noun} {job.job_id}" for job in unfinished if job.project_id == latest.project_id]
        if others:
            raise JobStateError(
                f"The latest training of project {latest.project_id!r}, {latest.job_id}, cannot be cancelled: it is "
                f"{latest.status}.",
                code="job_already_ended",
                suggestions=[f"To stop what has not ended, give its job_id: {', '.join(others)}"],
            )

    def resume(self, job_id: str, *, by_itself: bool = False) -> TrainingStatus:
        """Queue a job that ended early again; it continues from its last checkpoint.

        Unless this happens by itself, a job that started by itself does not wait for a free machine from now on.

        Raises:
            JobStateError: it is running, waiting or completed.
            InvalidArgument, BaseCheckpointError: its data or base model may no longer be read.
        """
        from peft_core.planning.planner import require_sources  # noqa: PLC0415 -- not at the server's start

        self._require_database(job_id)
        require_sources(self._store.get(job_id).request, self._settings)
        try:
            job = self._store.requeue(job_id, JobResumed())
        except IllegalTransition:  # decided inside the transaction: another server may have resumed it meanwhile
            status = self._store.get(job_id).status
            raise JobStateError(
                f"Job {job_id} cannot be resumed: it is {status}. Only interrupted, failed and cancelled jobs can.",
                code="not_resumable",
                suggestions=["Call train_adapter" if status.is_final else "Call get_training_status to follow it"],
            ) from None
        return self._start(job.job_id) if by_itself else self.ask_for(job.job_id)

    def base_of(self, job_id: str) -> str | None:
        """Return a reference to the base model that a job trained on, or None if no record of the job can be read."""
        request = self._request_of(job_id)
        return None if request is None else request.base.reference

    def dataset_of(self, job_id: str) -> DatasetSpec | None:
        """Return what a job was trained on, with its selection, or None if no record of the job can be read."""
        request = self._request_of(job_id)
        return None if request is None else request.dataset

    def _request_of(self, job_id: str) -> JobRequest | None:
        """Return what a job was asked to do; None if that is not known, which must not affect the adapter that it published."""
        try:
            return self._store.get(job_id).request if self._store.exists else None
        except JobNotFound:
            return None
        except StorageError as error:
            log.warning("What adapter %s was trained on is not known: %s", job_id, error.message)
            return None

    def _project_of(self, *adapters: Path) -> str:
        """Return the project of the first published adapter. One from another directory is a project named after that."""
        for project in (adapter.parent.parent for adapter in adapters):
            if project.parent == self._paths.projects:
                return project.name
        return project_id_from(adapters[0].name) or "adapter"

    def _find(self, project_id: str, job_id: str | None) -> Job | None:
        if job_id is None:
            latest = self._store.latest(project_id) if self._store.exists else None
            return latest and shown(self._store.runs_of_sweep(latest), latest)
        self._require_database(job_id)
        job = self._store.get(job_id)
        if job.project_id != project_id:
            raise InvalidArgument("job_id", job_id, f"it belongs to project {job.project_id!r}, not {project_id!r}")
        return job

    def require_project(self, project_id: str) -> None:
        """Raise JobNotFound for a project without jobs and adapters, if there are others: it may be misspelt.

        A project that was added in Codebase Gardener is known. Its name raises InvalidArgument, with its id.
        """
        known = self.project_ids()
        if project_id in known:
            return
        with suppress(StorageError):
            if self._projects.find(project_id) is not None or not known:
                return
        more = f" and {len(known) - MAX_NAMED_PROJECTS} more" if len(known) > MAX_NAMED_PROJECTS else ""
        raise JobNotFound(
            f"There is no project {project_id!r}. Projects: {', '.join(known[:MAX_NAMED_PROJECTS])}{more}.",
            code="unknown_project",
            suggestions=["Give one of these ids, or call train_adapter to start a new project"],
            details={"project_id": project_id, "known": known},
        )

    def _require_database(self, job_id: str) -> None:
        if not self._store.exists:
            raise self._store.unknown(job_id)

    def _to_status(self, job: Job) -> TrainingStatus:
        # kill-point: server: the answer is about to be composed
        position = self._store.queue_position(job.job_id) if job.status is Status.QUEUED else None
        return status_of(
            job,
            position,
            self._paths.job(job.job_id).log,
            now=time.time(),
            cancel_requested=job.status is Status.IN_PROGRESS and self._store.cancel_requested(job.job_id),
            sweep=status_of_sweep(self._store.runs_of_sweep(job)),
        )

    def _measured_speeds(self, place: Literal["here", "cluster"] = "here") -> MeasuredSpeeds:
        from peft_core.jobs.measured_speeds import MeasuredSpeeds  # noqa: PLC0415 -- not at the server's start

        jobs = self._store.last_completed(SPEED_HISTORY) if self._store.exists else ()
        return MeasuredSpeeds([job for job in jobs if job.on_cluster == (place == "cluster")])
