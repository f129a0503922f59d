"""PEFTManager: every verb of the product, async. A thin front; it delegates.

Verbs take milliseconds: what computes runs in processes of its own. Their blocking parts run in threads, so that the
caller's event loop stays free.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

import anyio
from anyio.to_thread import run_sync
from pydantic import TypeAdapter, ValidationError

from peft_core.adapters.info import AdapterInfo, read_info
from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.jobs.service import JobService
from peft_core.results import AdapterList, TrainingStatus
from peft_core.spec import ProjectId, TrainingConfig
from peft_core.validation import parse_config

LOOK_S = 0.25  # how often a watched job is looked up

PROJECT_ID: TypeAdapter[str] = TypeAdapter(ProjectId)


class PEFTManager:
    """Train adapters and ask for them.

    Each verb raises a `peft_core.errors.ModelError` for what a user can mend.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._jobs = JobService(self.settings)
        self._registry = Registry(self.settings.paths)

    async def train_adapter(
        self,
        project_id: str,
        training_data: str | Sequence[Mapping[str, Any]],
        config: TrainingConfig | Mapping[str, Any] | None = None,
    ) -> TrainingStatus:
        """Queue a training run in the background and answer at once.

        Args:
            project_id: names the project; its adapters are kept together.
            training_data: a repository directory, a `.jsonl` file, or records.
            config: `TrainingConfig` or its fields.
        """
        project_id, parsed = _project_id(project_id), parse_config(config)
        return await run_sync(partial(self._jobs.submit, project_id, training_data, parsed))

    async def get_training_status(self, project_id: str, job_id: str | None = None) -> TrainingStatus:
        """The truth about the named job, or the project's latest one."""
        return await run_sync(self._jobs.status, _project_id(project_id), job_id)

    async def watch_training(
        self, project_id: str, job_id: str | None = None, *, timeout_s: float | None = None
    ) -> AsyncIterator[TrainingStatus]:
        """Yield the status now and after each change, until the job has ended or `timeout_s` seconds have passed."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        status = await self.get_training_status(project_id, job_id)
        yield status
        while status.job_id is not None and not status.status.is_final:
            if deadline is not None and time.monotonic() >= deadline:
                return
            await anyio.sleep(LOOK_S)
            newer = await self.get_training_status(project_id, status.job_id)
            if newer != status:
                status = newer
                yield status

    async def get_job(self, job_id: str) -> TrainingStatus:
        """The status of a job whose project need not be known."""
        return await run_sync(self._jobs.by_id, job_id)

    async def changed_jobs(self, since: int | None) -> tuple[int, list[str]]:
        """(cursor for the next call, ids of the jobs that changed since the cursor `since`; None: from now on)."""
        return await run_sync(self._jobs.changed_since, since)

    async def tend(self) -> None:
        """Find out jobs whose process is gone, and see that somebody works on those that wait. Cheap; call it often."""
        await run_sync(self._jobs.tend)

    async def cancel_training(self, project_id: str, job_id: str | None = None) -> TrainingStatus:
        """Stop a waiting job at once, a running one within seconds; its checkpoint is kept."""
        return await run_sync(self._jobs.cancel, _project_id(project_id), job_id)

    async def resume_training(self, job_id: str) -> TrainingStatus:
        """Queue a job that was interrupted, cancelled or failed again; it goes on from its last checkpoint."""
        return await run_sync(self._jobs.resume, job_id)

    async def list_adapters(self, project_id: str | None = None) -> AdapterList:
        """Published adapters, newest first."""
        adapters = await run_sync(self._registry.adapters, None if project_id is None else _project_id(project_id))
        return AdapterList(
            adapters=adapters,
            next="Call get_adapter_info(adapter_path=...) for what was measured."
            if adapters
            else "There is no adapter yet: call train_adapter(project_id=..., training_data=...).",
        )

    async def get_adapter_info(self, adapter_path: str) -> AdapterInfo:
        """What is known of an adapter; `adapter_path` is a directory or a project id (its current adapter)."""
        return await run_sync(lambda: read_info(self._registry.locate(adapter_path)))


def _project_id(value: str) -> str:
    try:
        return PROJECT_ID.validate_python(value)
    except ValidationError as error:
        raise InvalidArgument(
            "project_id",
            value,
            "letters, digits, '-', '_' and single dots, starting with a letter or digit, at most 64 characters",
            suggestions=["Choose a short name, for instance the name of the repository's directory"],
        ) from error
