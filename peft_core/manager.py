"""PEFTManager: every verb of the product, async. A thin front; it delegates.

What computes runs in processes of its own: most verbs take milliseconds, those that use a model wait for it. Their
blocking parts run in threads, so that the caller's event loop stays free.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

import anyio
from anyio.to_thread import run_sync
from pydantic import TypeAdapter, ValidationError

from peft_core.adapters.info import AdapterDocument, AdapterInfo
from peft_core.adapters.registry import Registry
from peft_core.adapters.service import AdapterService
from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.inference.client import ProgressCallback
from peft_core.inference.service import InferenceService, TrainingNeed
from peft_core.jobs.service import JobService
from peft_core.schemas.generation import Generation, GenerationRequest
from peft_core.schemas.results import (
    AdapterList,
    Compatibility,
    DeletedAdapter,
    LoadedAdapter,
    TrainingDataReport,
    TrainingStatus,
    UnloadedAdapter,
)
from peft_core.schemas.training import EvaluatedAdapter, ProjectId, TrainingConfig
from peft_core.schemas.validation import parse_config, parse_generation

POLL_INTERVAL_S = 0.25  # how often a watched job is looked up

PROJECT_ID: TypeAdapter[str] = TypeAdapter(ProjectId)


class PEFTManager:
    """Train adapters and ask for them.

    Each verb raises a `peft_core.errors.ModelError` for what a user can mend.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        registry = Registry(self.settings.paths, self.settings.allowed_roots)
        self._jobs = JobService(self.settings, registry)
        self._adapters = AdapterService(self.settings, registry, self._jobs.base_of)
        self._inference = InferenceService(self.settings, self._adapters, self._training_need)

    async def train_adapter(
        self,
        project_id: str,
        training_data: str | Sequence[Mapping[str, Any]],
        config: TrainingConfig | Mapping[str, Any] | None = None,
    ) -> TrainingStatus:
        """Queue a training run in the background and answer at once.

        Args:
            project_id: names the project; its adapters are kept together.
            training_data: a repository directory, a `.jsonl` file, a LanceDB table (`NAME.lance`), or records.
            config: `TrainingConfig` or its fields.
        """
        project_id, parsed = _project_id(project_id), parse_config(config)
        return await run_sync(partial(self._jobs.submit, project_id, training_data, parsed))

    async def inspect_training_data(
        self,
        training_data: str | Sequence[Mapping[str, Any]],
        config: TrainingConfig | Mapping[str, Any] | None = None,
    ) -> TrainingDataReport:
        """What `train_adapter` would train on and do, with sample examples and reasons; nothing is trained. Seconds."""
        return await run_sync(partial(self._jobs.inspect, training_data, parse_config(config)))

    async def get_training_status(self, project_id: str, job_id: str | None = None) -> TrainingStatus:
        """The truth about the named job, or the project's latest one."""
        return await run_sync(self._jobs.status, _project_id(project_id), job_id)

    async def watch_training(
        self,
        project_id: str,
        job_id: str | None = None,
        *,
        timeout_s: float | None = None,
    ) -> AsyncIterator[TrainingStatus]:
        """Yield the status now and after each change, until the job has ended or `timeout_s` seconds have passed."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        status = await self.get_training_status(project_id, job_id)
        yield status
        while status.job_id is not None and not status.status.is_final:
            if deadline is not None and time.monotonic() >= deadline:
                return
            await anyio.sleep(POLL_INTERVAL_S)
            newer = await self.get_training_status(project_id, status.job_id)
            if newer != status:
                status = newer
                yield status

    async def draw_training(self, project_id: str, job_id: str | None = None) -> bytes | None:
        """The loss curve of a job so far, a PNG; None where it has none yet."""
        return await run_sync(self._jobs.picture, _project_id(project_id), job_id)

    async def get_job(self, job_id: str) -> TrainingStatus:
        """The status of a job whose project need not be known."""
        return await run_sync(self._jobs.by_id, job_id)

    async def changed_jobs(self, since: int | None) -> tuple[int, list[str]]:
        """(cursor for the next call, ids of the jobs that changed since the cursor `since`; None: from now on)."""
        return await run_sync(self._jobs.changed_since, since)

    async def ensure_runner(self) -> None:
        """Find out jobs whose process is gone, and see that somebody works on those that wait. Cheap; call it often."""
        await run_sync(self._jobs.ensure_runner)

    async def cancel_training(self, project_id: str, job_id: str | None = None) -> TrainingStatus:
        """Stop a waiting job at once, a running one within seconds; its checkpoint is kept."""
        return await run_sync(self._jobs.cancel, _project_id(project_id), job_id)

    async def resume_training(self, job_id: str) -> TrainingStatus:
        """Queue a job that was interrupted, cancelled or failed again; it goes on from its last checkpoint."""
        return await run_sync(self._jobs.resume, job_id)

    async def list_adapters(self, project_id: str | None = None) -> AdapterList:
        """Published adapters, newest first, and what of them is in memory."""
        found = await run_sync(self._adapters.adapters, None if project_id is None else _project_id(project_id))
        await self._inference.sync()
        loaded = self._inference.resident
        active = {adapter.adapter_path: adapter.active for adapter in loaded.adapters}
        adapters = [
            adapter.model_copy(
                update={"resident": adapter.adapter_path in active, "active": active.get(adapter.adapter_path, False)},
            )
            for adapter in found
        ]
        return AdapterList(
            adapters=adapters,
            loaded=loaded,
            next="Call get_adapter_info(adapter_path=...) for what was measured, load_adapter(adapter_path=...) to use one."
            if adapters
            else "There is no adapter yet: call train_adapter(project_id=..., training_data=...).",
        )

    async def get_adapter_info(self, adapter_path: str) -> AdapterInfo:
        """What is known of an adapter; `adapter_path` is a directory or a project id (its current adapter)."""
        return await run_sync(self._adapters.info, adapter_path)

    async def read_card(self, project_id: str) -> AdapterDocument:
        """Manifest and model card of a project's current adapter."""
        return await run_sync(self._adapters.document, _project_id(project_id))

    async def delete_adapter(self, project_id: str, adapter_id: str) -> DeletedAdapter:
        """Delete an adapter that was trained here; refused while it is loaded."""
        await self._inference.sync()
        return await run_sync(
            self._adapters.delete,
            _project_id(project_id),
            adapter_id,
            self._inference.require_unused,
        )

    async def verify_adapter_compatibility(
        self,
        adapter_path: str,
        base_model: str | None = None,
        *,
        scan_weights: bool = False,
    ) -> Compatibility:
        """Whether an adapter belongs to a base, by headers and configuration: milliseconds, nothing is loaded.

        Args:
            adapter_path: a directory, or a project id (its current adapter).
            base_model: None: the base it was trained on, where it is on this machine.
            scan_weights: read the weights too, for numbers that are none and adapters that do nothing.
        """
        return await run_sync(partial(self._adapters.verify, adapter_path, base_model, scan_weights=scan_weights))

    async def load_adapter(
        self,
        adapter_path: str,
        base_model: str | None = None,
        *,
        accept_unproven_base: bool = False,
        report: ProgressCallback | None = None,
    ) -> LoadedAdapter:
        """Verify an adapter, load it with its base (seconds; under one where the base is in memory), make it active.

        Where it cannot be loaded, the answer's status is 'fallback': what was active still is, else the base alone.

        Args:
            adapter_path: a directory, or a project id (its current adapter).
            base_model: None: the base it was trained on, where it is on this machine.
            accept_unproven_base: load although only the shapes fit (verdict 'shape_only').
            report: awaited with (done, total, message) while it takes long.
        """
        return await self._inference.load(
            adapter_path,
            base_model,
            accept_unproven_base=accept_unproven_base,
            report=report,
        )

    async def evaluate_adapter(
        self,
        adapter_path: str,
        evaluation_data: str | Sequence[Mapping[str, Any]],
        base_model: str | None = None,
        *,
        accept_unproven_base: bool = False,
    ) -> TrainingStatus:
        """Queue a comparison of base and adapter in the background and answer at once; follow it like a training.

        Args:
            adapter_path: a directory, or a project id (its current adapter).
            evaluation_data: a repository directory, a `.jsonl` file, or records. What an adapter of ours was trained on is
                left out.
            base_model: None: the base it was trained on, where it is on this machine.
            accept_unproven_base: measure although only the shapes fit (verdict 'shape_only').
        """

        def queue() -> TrainingStatus:
            directory, base = self._adapters.adapter_and_base(adapter_path, base_model)
            evaluated = EvaluatedAdapter(adapter_path=directory, accept_unproven_base=accept_unproven_base)
            return self._jobs.evaluate(evaluated, base, evaluation_data)

        return await run_sync(queue)

    async def unload_adapter(self, adapter_path: str | None = None) -> UnloadedAdapter:
        """Take the active adapter off, or the named one. With none left the base goes too, and the memory back."""
        return await self._inference.unload(adapter_path)

    async def generate(
        self,
        request: GenerationRequest | Mapping[str, Any],
        *,
        adapter_path: str | None = None,
        use_base: bool = False,
        report: ProgressCallback | None = None,
    ) -> Generation:
        """Write text with the active adapter, the named one of those in memory, or the base alone (`use_base`).

        Args:
            request: `GenerationRequest` or its fields.
            adapter_path: None: the active one.
            use_base: answer without adapter; loads the default base where none is in memory.
            report: awaited with (tokens so far, at most, message).
        """
        return await self._inference.generate(parse_generation(request), adapter_path, use_base=use_base, report=report)

    async def aclose(self) -> None:
        """End the inference process, if one runs. Trainings go on."""
        await self._inference.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _training_need(self) -> TrainingNeed | None:
        status = self._jobs.at_work()
        if status is None or status.estimate is None:
            return None
        taken = status.peak_memory_bytes or 0
        return TrainingNeed(status.project_id, max(0, status.estimate.memory_bytes - taken))


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
