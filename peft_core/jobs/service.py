"""Training jobs as the rest of the house uses them: submit, look, watch, cancel, resume.

Everything here blocks for milliseconds at most, apart from `watch`; the manager calls it in threads.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from peft_core.adapters.registry import Registry
from peft_core.bases import resolve
from peft_core.config import Settings
from peft_core.data import inspect, write_records
from peft_core.errors import InvalidArgument, JobStateError, StorageError
from peft_core.estimate import estimate, expected_device, lora_parameters, smallest_memory_bytes
from peft_core.events import JobResumed
from peft_core.jobs.lock import WorkLock
from peft_core.jobs.model import RESUMABLE, Job, JobRequest
from peft_core.jobs.recovery import recover
from peft_core.jobs.report import not_started, status_of
from peft_core.jobs.store import Store, unwritable
from peft_core.spec import Base, Estimate, SourceSummary, Status, TrainingConfig, TrainingStatus

RUNNER = [sys.executable, "-P", "-m", "peft_core.jobs.runner"]
MARGIN_BYTES = 200 << 20  # disk space that is left to others


class JobService:
    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._paths = settings.paths
        self._store = Store(self._paths.database, time.time)
        self._registry = Registry(self._paths)
        self._runner: subprocess.Popen[bytes] | None = None
        self._seen_by_runner: set[str] = set()  # jobs that were queued before our runner was spawned
        self._spawning = threading.Lock()

    def submit(
        self, project_id: str, training_data: str | Sequence[Mapping[str, Any]], config: TrainingConfig
    ) -> TrainingStatus:
        """Check everything that can be checked without a model, queue the job, see that a runner works.

        Raises:
            InvalidArgument, DataError, BaseModelError, StorageError: nothing was queued.
        """
        base = resolve(config.base_model, self._settings)
        found = inspect(training_data, held_out_fraction=config.held_out_fraction)
        if found.needs_chat_template and not base.has_chat_template:
            raise InvalidArgument(
                "training_data",
                "records with messages",
                f"the base {base.name} has no chat template, so conversations cannot be written in its form",
                suggestions=["Use an instruct model as base_model, or records of the form {prompt, completion}"],
            )
        device = self._device(config)
        planned = estimate(config, base.shape, found, device, self._measured_speed(base, device))
        self._check_memory(config, base, device, planned)
        self._check_disk(config, base, found)

        self._store.create()
        now = time.time()
        job_id = f"{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        source = found.path
        if source is None:
            source = self._paths.job(job_id).records
            try:
                source.parent.mkdir(parents=True)
                write_records(training_data, source)  # type: ignore[arg-type] -- a path has a source
            except OSError as error:
                raise unwritable(self._paths.root, error) from error
        request = JobRequest(
            source=source,
            source_kind=found.kind,
            config=config,
            base=base,
            found=found,
            device=device,
            estimate=planned,
        )
        self._store.insert(Job(job_id=job_id, project_id=project_id, request=request, created_at=now, updated_at=now))
        self._see_to_queue()
        return self.status(project_id, job_id)

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
            self._see_to_queue()
            job = self._store.get(job.job_id)
        return self._report(job)

    def revision(self, job_id: str) -> int:
        return self._store.revision(job_id)

    def changed_since(self, event_id: int) -> tuple[int, list[str]]:
        """(newest event id, ids of the jobs that have newer events than `event_id`)."""
        return self._store.changed_since(event_id) if self._store.exists else (0, [])

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
                f"Nothing to cancel: no training was started for project {project_id!r}.", code="nothing_to_cancel"
            )
        self._see_to_queue()
        self._store.request_cancel(job.job_id)
        return self.status(project_id, job.job_id)

    def resume(self, job_id: str) -> TrainingStatus:
        """Queue a job that ended early again; it goes on from its last checkpoint.

        Raises:
            JobStateError: it is running, waiting or completed.
        """
        self._require_database(job_id)
        job = self._store.get(job_id)
        if job.status not in RESUMABLE:
            raise JobStateError(
                f"Job {job_id} cannot be resumed: it is {job.status}; only interrupted, failed and cancelled jobs can.",
                code="not_resumable",
                suggestions=[
                    "Call get_training_status to watch it" if not job.status.is_final else "Call train_adapter"
                ],
            )
        if not job.request.source.exists():
            raise InvalidArgument("job_id", job_id, f"its training data {job.request.source} is gone")
        self._store.requeue(job_id, JobResumed())
        self._see_to_queue()
        return self.status(job.project_id, job_id)

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

    def _see_to_queue(self) -> None:
        """Find out jobs that nobody works on any more, and have a runner for those that wait."""
        with self._spawning:
            lock = WorkLock(self._paths.runner_lock)
            if not lock.acquire():
                return  # somebody works, and looks at the queue again after giving the lock up
            with lock:
                recover(self._store, self._registry)
            waiting = {job.job_id for job in self._store.in_state(Status.QUEUED)}
            starting = self._runner is not None and self._runner.poll() is None and waiting <= self._seen_by_runner
            if waiting and not starting:
                self._seen_by_runner = waiting
                self._runner = self._spawn_runner()

    def _spawn_runner(self) -> subprocess.Popen[bytes]:
        """A process of its own session: it outlives this one, and whatever kills this one's process group."""
        self._paths.logs.mkdir(parents=True, exist_ok=True)
        with (self._paths.logs / "runner.log").open("ab") as log:
            runner = subprocess.Popen(  # noqa: S603 -- our own module, by absolute interpreter
                [*RUNNER, str(self._paths.root)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._paths.root,
                start_new_session=True,
            )
        threading.Thread(target=runner.wait, daemon=True).start()  # reaps it, should we live longer
        return runner

    def _device(self, config: TrainingConfig) -> str:
        if config.device == "mps" and sys.platform != "darwin":
            raise InvalidArgument(
                "config.device", "mps", "MPS is there on Apple silicon only; allowed here: auto, cuda, cpu"
            )
        if config.device == "cuda" and sys.platform == "darwin":
            raise InvalidArgument("config.device", "cuda", "there is no CUDA on macOS; allowed here: auto, mps, cpu")
        return expected_device(config.device)

    def _measured_speed(self, base: Base, device: str) -> float | None:
        if not self._store.exists:
            return None
        for job in reversed(self._store.in_state(Status.COMPLETED)):
            same = job.request.base.fingerprint == base.fingerprint and job.device == device
            if same and job.metrics and job.metrics.tokens_per_second:
                return job.metrics.tokens_per_second
        return None

    def _check_memory(self, config: TrainingConfig, base: Base, device: str, planned: Estimate) -> None:
        budget_mb = config.max_memory_mb or self._settings.max_memory_mb
        if budget_mb is None or planned.memory_bytes <= budget_mb << 20:
            return
        smallest = smallest_memory_bytes(base.shape, device)
        advice = (
            f"Allow at least {_mb(planned.memory_bytes)} MB, or lower max_length"
            if smallest <= budget_mb << 20
            else f"Training {base.name} takes at least {_mb(smallest)} MB whatever the settings: use a smaller base_model"
        )
        raise InvalidArgument(
            "config.max_memory_mb",
            budget_mb,
            f"training {base.name} with max_length {config.max_length} is estimated to take {_mb(planned.memory_bytes)} MB",
            suggestions=[advice],
        )

    def _check_disk(self, config: TrainingConfig, base: Base, found: SourceSummary) -> None:
        needed = (
            (4 * base.shape.parameters if base.format == "gguf" else 0)  # the converted base, if not there yet
            + 16 * lora_parameters(config.rank, base.shape) * 2  # adapter and two checkpoints with optimiser state
            + 12 * found.estimated_tokens  # the dataset as JSON
            + MARGIN_BYTES
        )
        place = self._paths.root
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < needed:
            raise StorageError(
                f"Not enough disk space for this training: it needs about {_mb(needed)} MB in {self._paths.root}, "
                f"{_mb(free)} MB are free.",
                code="disk_full",
                suggestions=[
                    "Free some space, or set CODEBASE_GARDENER_DATA_DIR to a larger disk and restart the server"
                ],
                details={"needed_bytes": needed, "free_bytes": free, "path": str(self._paths.root)},
            )


def _mb(size: int) -> int:
    return round(size / (1 << 20))
