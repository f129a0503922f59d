"""Training jobs as the rest of the house uses them: submit, look, tend, cancel, resume.

Everything here blocks, `submit` for up to a second on a large repository; the manager calls it in threads.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import InvalidArgument, JobNotFound, JobStateError
from peft_core.jobs.state import IllegalTransition, Job
from peft_core.jobs.status import headline, not_started, status_of
from peft_core.jobs.store import Store
from peft_core.jobs.supervisor import RunnerSupervisor
from peft_core.schemas.base_model import BUNDLED, Base
from peft_core.schemas.events import JobResumed
from peft_core.schemas.results import Status, TrainingDataReport, TrainingStatus
from peft_core.schemas.task import JobRequest
from peft_core.schemas.training import EvaluatedAdapter, TrainingConfig

EXTERNAL_PROJECT = "elsewhere"  # the project of evaluations of adapters that were not trained here
SPEED_FROM = 50  # newest completed trainings among which one on the same base and device tells how fast this machine is


class JobService:
    def __init__(self, settings: Settings, registry: Registry) -> None:
        self._settings = settings
        self._paths = settings.paths
        self._store = Store(self._paths.database, time.time)
        self._tender = RunnerSupervisor(settings, self._store, registry)

    def submit(
        self,
        project_id: str,
        training_data: str | Sequence[Mapping[str, Any]],
        config: TrainingConfig,
    ) -> TrainingStatus:
        """Check everything that can be checked without a model, queue the job, see that a runner works.

        Raises:
            InvalidArgument, DataError, BaseModelError, StorageError: nothing was queued.
        """
        # Imported with the first job, not with the server: finding bases and reading code is of no use before.
        from peft_core.planning.planner import plan  # noqa: PLC0415

        draft = plan(training_data, config, self._settings, self._measured_speed)
        return self._queue(project_id, draft, training_data)

    def _queue(self, project_id: str, draft: JobRequest, data: str | Sequence[Mapping[str, Any]]) -> TrainingStatus:
        from peft_core.planning.planner import write_source  # noqa: PLC0415 -- see `submit`

        self._store.create()
        self._tender.require_locks()
        now = time.time()
        job_id = f"{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        request = write_source(draft, data, self._paths.job(job_id).records)
        self._store.insert(Job(job_id=job_id, project_id=project_id, request=request, created_at=now, updated_at=now))
        return self._queued(job_id)

    def _queued(self, job_id: str) -> TrainingStatus:
        """Its status, with a runner on its way. What is recorded will be done, and an error would say the opposite."""
        self._tender.tend_if_possible()
        return self._report(self._store.get(job_id))

    def inspect(self, training_data: str | Sequence[Mapping[str, Any]], config: TrainingConfig) -> TrainingDataReport:
        """What `submit` would do, without doing it.

        Raises:
            InvalidArgument, DataError, BaseModelError, StorageError: it would be refused.
        """
        from peft_core.planning.inspection import inspect_training_data  # noqa: PLC0415 -- as in submit

        return inspect_training_data(training_data, config, self._settings, self._measured_speed)

    def evaluate(
        self,
        evaluated: EvaluatedAdapter,
        base: Base,
        evaluation_data: str | Sequence[Mapping[str, Any]],
    ) -> TrainingStatus:
        """Queue a job that compares a base with and without an adapter. It belongs to the project of the adapter.

        Raises:
            InvalidArgument, DataError, StorageError: nothing was queued.
        """
        # Imported with the first job, as for `submit`.
        from peft_core.planning.evaluation import plan_evaluation  # noqa: PLC0415

        draft = plan_evaluation(evaluated, evaluation_data, base, self._settings, self._measured_speed)
        return self._queue(self._project_of(evaluated.adapter_path), draft, evaluation_data)

    def status(self, project_id: str, job_id: str | None = None) -> TrainingStatus:
        """The truth about the named job, or the project's latest. A job whose process is gone is found out here.

        Raises:
            JobNotFound: no such job.
            InvalidArgument: the job belongs to another project.
        """
        job = self._find(project_id, job_id)
        if job is None:
            return not_started(project_id)
        if not job.status.is_final:
            self._tender.ensure_runner()
            job = self._store.get(job.job_id)
        return self._report(job)

    def picture(self, project_id: str, job_id: str | None = None) -> bytes | None:
        """The loss curve so far as PNG; None where no step was made."""
        job = self._find(project_id, job_id)
        if job is None:
            return None
        from peft_core.evaluation.loss_curve import (  # noqa: PLC0415 -- likewise
            curve_of,
            draw,
        )

        curve = curve_of(self._store.events(job.job_id))
        return None if curve.is_empty else draw(curve, f"{project_id}: {headline(self._report(job))}")

    def changed_since(self, event_id: int | None) -> tuple[int, list[str]]:
        """(newest event id, ids of the jobs that have newer events than `event_id`; none for None)."""
        if not self._store.exists:
            return 0, []
        return self._store.changed_since(event_id)

    def ensure_runner(self) -> None:
        """Do what every look at an open job does: find out dead jobs, have a runner for waiting ones."""
        if self._store.exists and self._store.in_state(Status.QUEUED, Status.IN_PROGRESS):
            self._tender.ensure_runner()

    def by_id(self, job_id: str) -> TrainingStatus:
        self._require_database(job_id)
        return self.status(self._store.get(job_id).project_id, job_id)

    def cancel(self, project_id: str, job_id: str | None) -> TrainingStatus:
        """Queued: cancelled at once. Running: the runner is told, and the status follows within seconds.

        Raises:
            JobStateError: there is nothing to cancel.
        """
        job = self._find(project_id, job_id)
        if job is None:
            raise JobStateError(
                f"Nothing to cancel: no training was started for project {project_id!r}.",
                code="nothing_to_cancel",
            )
        self._tender.tend_if_possible()
        self._store.request_cancel(job.job_id)
        return self._report(self._store.get(job.job_id))

    def resume(self, job_id: str) -> TrainingStatus:
        """Queue a job that ended early again; it goes on from its last checkpoint.

        Raises:
            JobStateError: it is running, waiting or completed.
            InvalidArgument, BaseModelError: its data or base may not be read any more.
        """
        from peft_core.planning.planner import require_sources  # noqa: PLC0415 -- as in submit

        self._require_database(job_id)
        require_sources(self._store.get(job_id).request, self._settings)
        try:
            job = self._store.requeue(job_id, JobResumed())
        except IllegalTransition:  # asked of the database itself: another server may resume it at this moment
            status = self._store.get(job_id).status
            raise JobStateError(
                f"Job {job_id} cannot be resumed: it is {status}; only interrupted, failed and cancelled jobs can.",
                code="not_resumable",
                suggestions=["Call get_training_status to watch it" if not status.is_final else "Call train_adapter"],
            ) from None
        return self._queued(job.job_id)

    def at_work(self) -> TrainingStatus | None:
        """The job that is being worked on; None when nobody works."""
        self.ensure_runner()
        running = self._store.in_state(Status.IN_PROGRESS) if self._store.exists else []
        return self._report(running[0]) if running else None

    def base_of(self, job_id: str) -> str | None:
        """What to call the base that a job trained on; None where this data directory has no such job."""
        try:
            base = self._store.get(job_id).request.base if self._store.exists else None
        except JobNotFound:
            return None
        return None if base is None else base.ref if base.ref == BUNDLED else str(base.path)

    def _project_of(self, adapter: Path) -> str:
        """Where a published adapter lies; adapters from elsewhere share a name."""
        home = adapter.parent.parent
        return home.name if home.parent == self._paths.projects else EXTERNAL_PROJECT

    def _find(self, project_id: str, job_id: str | None) -> Job | None:
        if job_id is None:
            return self._store.latest(project_id) if self._store.exists else None
        self._require_database(job_id)
        job = self._store.get(job_id)
        if job.project_id != project_id:
            raise InvalidArgument("job_id", job_id, f"it belongs to project {job.project_id!r}, not {project_id!r}")
        return job

    def _require_database(self, job_id: str) -> None:
        if not self._store.exists:
            raise self._store.unknown(job_id)

    def _report(self, job: Job) -> TrainingStatus:
        position = self._store.queue_position(job.job_id) if job.status is Status.QUEUED else None
        return status_of(job, position, self._paths.job(job.job_id).log)

    def _measured_speed(self, base: Base, device: str) -> float | None:
        if not self._store.exists:
            return None
        for job in self._store.last_completed(SPEED_FROM):
            same = job.request.base.fingerprint.same_weights(base.fingerprint) and job.device == device
            if same and job.metrics and job.metrics.tokens_per_second:
                return job.metrics.tokens_per_second
        return None
