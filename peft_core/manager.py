"""`PEFTManager`, the async Python API: a thin layer over the services of jobs, adapters, exports and inference.

Training and inference run in child processes, so most calls take milliseconds; those that use a model wait for it.
Blocking code runs in threads and keeps the caller's event loop free.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Self

import anyio
from anyio.to_thread import run_sync
from pydantic import TypeAdapter, ValidationError

from peft_core.adapters.info import AdapterDocument, AdapterInfo
from peft_core.adapters.registry import Registry
from peft_core.adapters.service import AdapterService, list_of
from peft_core.config import Settings
from peft_core.errors import InvalidArgument, StorageError
from peft_core.export.service import ExportService
from peft_core.gardener.chunks import Records, plain_records
from peft_core.gardener.names import PipelineOptions, parse_names, refuse
from peft_core.gardener.registry import ProjectRegistry
from peft_core.inference.client import ProgressCallback, TextCallback
from peft_core.inference.service import InferenceService, TrainingNeed
from peft_core.jobs.handle import OnProgress, TrainingJob
from peft_core.jobs.service import JobService
from peft_core.jobs.sweep import of_all_runs
from peft_core.projects.check import DueCheck
from peft_core.projects.service import ProjectService
from peft_core.retrieval.service import RetrievalService
from peft_core.schemas.export import ExportOptions, ExportReport
from peft_core.schemas.generation import EngineChoice, Generation, GenerationRequest
from peft_core.schemas.job_report import JobReport
from peft_core.schemas.local_bases import LocalBases
from peft_core.schemas.project import Refreshed, Registration, RetrainWhen
from peft_core.schemas.recommendation import BaseRecommendation
from peft_core.schemas.results import (
    AdapterList,
    AdapterSummary,
    Compatibility,
    DeletedAdapter,
    Estimate,
    JobSummary,
    LoadedAdapter,
    TrainingDataReport,
    TrainingStatus,
    UnloadedAdapter,
)
from peft_core.schemas.serving import Serving, ServingStopped
from peft_core.schemas.storage import DiskUsage
from peft_core.schemas.study import StudyPlan
from peft_core.schemas.training import DataSelection, EvaluatedAdapter, ProjectId, TrainingConfig
from peft_core.schemas.validation import parse_export_options, parse_generation, parse_retrain_when, parse_selection
from peft_core.serving.service import ServingService
from peft_core.staleness.service import COMPARE_WAIT_S, StalenessService
from peft_core.storage.service import StorageService

POLL_INTERVAL_S = 0.25  # how often `watch_training` reads the status
STOP_WAIT_S = 8.0  # how long `cancel_training` waits for the end of a running job

PROJECT_ID: TypeAdapter[str] = TypeAdapter(ProjectId)


class PEFTManager:
    """Train, inspect, load and use adapters.

    Every method raises a subclass of `peft_core.errors.PeftMcpError` for problems that a user can fix.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        registry = Registry(self.settings.paths, self.settings.allowed_roots)
        self._projects = ProjectRegistry(self.settings.paths)
        self._jobs = JobService(self.settings, registry, self._projects)
        self._adapters = AdapterService(self.settings, registry, self._jobs.base_of)
        self._staleness = StalenessService(self.settings, self._jobs.dataset_of)
        self._exports = ExportService(self.settings, self._adapters)
        retrieval = RetrievalService(self.settings.paths, partial(self._staleness.within, COMPARE_WAIT_S))
        self._inference = InferenceService(self.settings, self._adapters, self._training_need, retrieval)
        self._serving = ServingService(self.settings, registry)
        self._refreshes = ProjectService(self.settings, registry, self._jobs, self._staleness.of)
        self._due_check = DueCheck(self.settings)
        self._storage = StorageService(self.settings, registry)

    async def train_adapter(
        self,
        project_id: str,
        training_data: str | Records | None = None,
        config: TrainingConfig | Mapping[str, Any] | None = None,
        *,
        approve: Callable[[Estimate], Awaitable[None]] | None = None,
    ) -> TrainingStatus:
        """Queue a training run in the background and return immediately.

        Args:
            project_id: the project that the adapter belongs to.
            training_data: a repository directory, a file of records, a LanceDB table (`NAME.lance`), records, or objects like
                Codebase Gardener's `CodeChunk`. It may be omitted for a project that was added in Codebase Gardener.
            config: `TrainingConfig` or its fields; also by the names of Codebase Gardener, such as `lora_rank`.
            approve: awaited with the estimate before anything is written; what it raises ends the call.
        """
        project_id, (parsed, options) = _project_id(project_id), parse_names(config)
        refuse(options, "progress_update_interval", "start_training")
        given = None if training_data is None else plain_records(training_data)
        data = await run_sync(self._projects.data_of, project_id, given)
        drafts = await run_sync(self._jobs.plan_runs, project_id, data, parsed, options)
        await run_sync(self._refreshes.require_same_repository, project_id, drafts[0])
        if approve is not None:
            await approve(of_all_runs(drafts))
        better_base = await run_sync(self._jobs.better_base, drafts[0], parsed)
        status = await run_sync(self._jobs.queue_runs, project_id, drafts, data)
        await run_sync(self._refreshes.register, project_id, drafts[0], data, parsed)
        return status.model_copy(update={"better_base": better_base}) if better_base else status

    async def refresh_project(
        self,
        project_id: str,
        retrain_when: RetrainWhen | Mapping[str, Any] | None = None,
        *,
        approve: Callable[[Estimate], Awaitable[None]] | None = None,
    ) -> Refreshed:
        """Bring a project's adapter up to date in the background: train on what its latest training read, as it is now.

        If nothing has changed, nothing is queued, and the result says so.

        Args:
            project_id: a project that was trained here.
            retrain_when: when to do so by itself from now on: "never", {"units": 10} (percent of the code units that have
                changed) or {"commits": 20}. Nothing else is done then, unless that is due.
            approve: awaited with the estimate before anything is queued; what it raises ends the call.
        """
        project_id, rule = _project_id(project_id), parse_retrain_when(retrain_when)
        planned = await run_sync(self._refreshes.plan_refresh, project_id, rule)
        if isinstance(planned, Refreshed):
            return planned
        if approve is not None and not planned.only_while_free:
            await approve(planned.draft.estimate)
        return await run_sync(self._refreshes.start, planned)

    async def refresh_due(self, project_ids: Sequence[str] | None = None) -> list[Refreshed]:
        """Queue a training for each project that is due by its `retrain_when`; it runs only while the machine is free.

        `project_ids`: the projects to look at; None: all that are retrained by themselves.
        """
        named = None if project_ids is None else [_project_id(project_id) for project_id in project_ids]
        return await run_sync(self._refreshes.refresh_due, named)

    async def registered_projects(self, project_ids: Sequence[str] | None = None) -> list[Registration]:
        """Return what projects are trained on, and when they are retrained; of all that are registered if none is named."""
        named = None if project_ids is None else [_project_id(project_id) for project_id in project_ids]
        return await run_sync(self._refreshes.registrations, named)

    def check_due(self, project_id: str | None = None) -> None:
        """Have another process do `refresh_due`, at most once in some minutes. Returns immediately."""
        self._due_check.start(project_id)

    async def start_training(
        self,
        project_id: str,
        training_data: str | Records | None = None,
        config: TrainingConfig | Mapping[str, Any] | None = None,
        *,
        on_progress: OnProgress | None = None,
        progress_update_interval: float = 0.0,
    ) -> TrainingJob:
        """Queue a training run as `train_adapter` does, and return a handle: `await job` waits for its end.

        Args:
            project_id: as for `train_adapter`.
            training_data: as for `train_adapter`.
            config: as for `train_adapter`; it may also have `progress_update_interval`.
            on_progress: a function or coroutine function, called with the status while the job is awaited.
            progress_update_interval: least number of seconds between two of its calls, except for the last.
        """
        parsed, options = parse_names(config)
        if parsed.sweep is not None:
            raise InvalidArgument("config.sweep", None, "a handle follows one training; train_adapter takes it")
        if isinstance(config, Mapping) and "progress_update_interval" in config:
            progress_update_interval = options.progress_update_interval or 0.0
            config = {name: value for name, value in config.items() if name != "progress_update_interval"}
        status = await self.train_adapter(project_id, training_data, config)
        return TrainingJob(
            status,
            watch=lambda timeout_s: self.watch_training(project_id, status.job_id, timeout_s=timeout_s),
            cancel=partial(self.cancel_training, project_id, status.job_id),
            on_progress=on_progress,
            interval_s=progress_update_interval,
        )

    async def inspect_training_data(
        self, training_data: str | Records, config: TrainingConfig | Mapping[str, Any] | None = None
    ) -> TrainingDataReport:
        """Do a dry run of `train_adapter`: return the dataset's size, samples, exclusions and settings. Takes seconds."""
        parsed, options = parse_names(config)
        for name in PipelineOptions.model_fields:
            refuse(options, name, "start_training")
        return await run_sync(partial(self._jobs.inspect, plain_records(training_data), parsed))

    async def list_base_models(self) -> LocalBases:
        """List the base models on this machine, also those of Ollama, LM Studio and llama.cpp. Takes seconds at most."""
        return await run_sync(self._jobs.list_base_models)

    async def recommend_base(
        self, project_id: str | None = None, training_data: str | Records | None = None
    ) -> BaseRecommendation:
        """Return up to three base models on this machine, the best for code first; what cannot be trained; what to download.

        Nothing is downloaded. Takes seconds at most.

        Args:
            project_id: estimate for what this project was trained on, or for its code in Codebase Gardener.
            training_data: estimate for this data, as for `train_adapter`. Without both, for 1000 examples.
        """
        project = None if project_id is None else _project_id(project_id)
        data = None if training_data is None else plain_records(training_data)
        return await run_sync(self._jobs.recommend_base, project, data, self._refreshes.data_of)

    async def propose_study_plan(self, project_id: str, training_data: str | None = None) -> StudyPlan:
        """Return what of a project's API is most worth study items. `training_data`: its directory, unless it is known."""
        data_of = self._refreshes.data_of
        return await run_sync(self._jobs.propose_study_plan, _project_id(project_id), training_data, data_of)

    async def would_download(self, base_model: str | None, *, unless_in_memory: bool = False) -> str | None:
        """Return the hub id of the model that a request with this base model would download first; None: it would not.

        `unless_in_memory`: the request uses the base model in memory if there is one.
        """
        if unless_in_memory and self._inference.resident.base_path is not None:
            return None
        return await run_sync(self._adapters.would_download, base_model)

    async def get_training_status(self, project_id: str, job_id: str | None = None) -> TrainingStatus:
        """Return the state of the named job, or of the project's latest training.

        Also records jobs whose process is dead and starts a runner if jobs are waiting, so polling it is enough.
        """
        return await run_sync(self._jobs.status_and_ensure_runner, _project_id(project_id), job_id)

    async def watch_training(
        self, project_id: str, job_id: str | None = None, *, timeout_s: float | None = None
    ) -> AsyncIterator[TrainingStatus]:
        """Yield the status now and after each change, until the job ends or `timeout_s` seconds have passed."""
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

    async def draw_training(self, project_id: str, job_id: str | None = None, *, title: str = "") -> bytes | None:
        """Draw the loss curve of a job so far as PNG; return None before the first step."""
        return await run_sync(self._jobs.draw_loss_curve, _project_id(project_id), job_id, title or project_id)

    async def read_report(self, job_id: str) -> JobReport:
        """Return the points of a job's loss curve and quoted completions."""
        return await run_sync(self._jobs.report, job_id)

    async def get_job(self, job_id: str) -> TrainingStatus:
        """Return the status of a job whose project is not known."""
        return await run_sync(self._jobs.status_by_id, job_id)

    async def changed_jobs(self, since: int | None) -> tuple[int, list[str]]:
        """Return (cursor for the next call, ids of the jobs that changed since the cursor `since`; none for None)."""
        return await run_sync(self._jobs.changed_since, since)

    async def ensure_runner(self) -> None:
        """Record jobs whose process is dead, and start a runner if jobs are waiting. Cheap; call it often."""
        await run_sync(self._jobs.ensure_runner)

    async def cancel_training(
        self, project_id: str, job_id: str | None = None, *, wait_s: float = STOP_WAIT_S
    ) -> TrainingStatus:
        """Stop a queued job immediately, a running one within seconds; its last checkpoint is kept.

        Waits up to `wait_s` seconds for the end of the job. If it is still running then, `cancel_requested` is true.
        """
        status = await run_sync(self._jobs.cancel, _project_id(project_id), job_id)
        async for latest in self.watch_training(status.project_id, status.job_id, timeout_s=wait_s):
            status = latest
        return status

    async def resume_training(self, job_id: str) -> TrainingStatus:
        """Queue an interrupted, cancelled or failed job again; it continues from its last checkpoint."""
        return await run_sync(self._jobs.resume, job_id)

    async def list_adapters(
        self, project_id: str | None = None, *, compare_for_s: float = COMPARE_WAIT_S
    ) -> AdapterList:
        """List the published adapters, newest first, and which of them are in memory.

        Args:
            project_id: omit to list those of all projects.
            compare_for_s: how long the current adapters are compared with their code; 0: they are not.
        """
        published = await run_sync(self._adapters.adapters, None if project_id is None else _project_id(project_id))
        compared = await self._staleness.of_current(published, compare_for_s)
        await self._inference.sync()
        return list_of(published, self._inference.resident, compared)

    async def current_adapters(self, count: int) -> list[AdapterSummary]:
        """Return the projects' current adapters, newest first."""
        return await run_sync(self._adapters.current_adapters, count)

    async def newest_jobs(self, count: int) -> list[JobSummary]:
        """Return the jobs that were queued last, newest first."""
        return await run_sync(self._jobs.newest, count)

    async def unfinished_jobs(self) -> set[str]:
        """Return the ids of the jobs that are queued or running."""
        return await run_sync(self._jobs.unfinished_ids)

    async def job_ids(self) -> list[str]:
        """Return the ids of all jobs, newest first."""
        return sorted(await run_sync(self._jobs.job_ids), reverse=True)

    async def project_ids(self) -> list[str]:
        """Return the ids of the projects that have jobs or adapters, those with the latest jobs first."""
        return await run_sync(self._jobs.project_ids)

    async def get_adapter_info(self, adapter_path: str, *, compare_for_s: float = 2 * COMPARE_WAIT_S) -> AdapterInfo:
        """Return all that is recorded about an adapter, and how far its code has moved on.

        Args:
            adapter_path: a directory, or a project id (its current adapter).
            compare_for_s: how long it is compared with its code; 0: it is not.
        """
        info = await run_sync(self._adapters.info, adapter_path)
        return info.model_copy(update={"staleness": await self._staleness.within(compare_for_s, info.adapter_path)})

    async def read_card(self, project_id: str) -> AdapterDocument:
        """Return manifest and model card of a project's current adapter."""
        return await run_sync(self._adapters.document, _project_id(project_id))

    async def delete_adapter(
        self, project_id: str, adapter_id: str, *, approve: Callable[[], Awaitable[None]] | None = None
    ) -> DeletedAdapter:
        """Delete an adapter that was trained on this machine; raises `AdapterInUse` while it is loaded.

        `approve` is awaited before anything is deleted, if the adapter can be deleted; what it raises ends the call.
        """
        project_id = _project_id(project_id)
        await self._inference.sync()
        if approve is not None:
            await run_sync(self._adapters.require_deletable, project_id, adapter_id, self._inference.require_unused)
            await approve()
        deleted = await run_sync(self._adapters.delete, project_id, adapter_id, self._inference.require_unused)
        await run_sync(self._jobs.show_status, project_id)
        return deleted

    async def verify_adapter_compatibility(
        self, adapter_path: str, base_model: str | None = None, *, scan_weights: bool = False
    ) -> Compatibility:
        """Check whether an adapter matches a base model. Reads only headers and configuration: milliseconds.

        Args:
            adapter_path: a directory, or a project id (its current adapter).
            base_model: omit to use the base model that the adapter was trained on, if it is on this machine.
            scan_weights: also scan the weights for NaN, Inf and all-zero B matrices.
        """
        return await run_sync(partial(self._adapters.verify, adapter_path, base_model, scan_weights=scan_weights))

    async def load_adapter(
        self,
        adapter_path: str,
        base_model: str | None = None,
        *,
        accept_unproven_base: bool = False,
        engine: EngineChoice | None = None,
        compare_for_s: float = COMPARE_WAIT_S,
        on_progress: ProgressCallback | None = None,
    ) -> LoadedAdapter:
        """Verify an adapter, load it with its base model and activate it: seconds, less if the base model is in memory.

        If it cannot be loaded, the result's status is 'fallback': the active adapter stays active, or else the base model
        answers without one.

        Args:
            adapter_path: a directory, or a project id (its current adapter).
            base_model: omit to use the base model that the adapter was trained on, if it is on this machine.
            accept_unproven_base: load although only the shapes fit (verdict 'shape_only').
            engine: "torch", or "llamacpp", which is faster on a CPU; omit to use the setting `engine`.
            compare_for_s: how long it is compared with its code after it was loaded; 0: it is not.
            on_progress: awaited with (done, total, message) during a long load.
        """
        loaded = await self._inference.load(
            adapter_path,
            base_model,
            accept_unproven_base=accept_unproven_base,
            engine=engine,
            on_progress=on_progress,
        )
        staleness = await self._staleness.within(
            compare_for_s, loaded.adapter_path if loaded.status == "loaded" else None
        )
        return loaded.model_copy(update={"staleness": staleness})

    async def switch_project(self, project_id: str, *, on_progress: ProgressCallback | None = None) -> LoadedAdapter:
        """Activate the current adapter of a project: milliseconds if it is in memory, else as long as `load_adapter`.

        If it cannot be activated, this raises an error with the reason, and the adapter that was active stays active. In
        Codebase Gardener, if it is used and has the project, the project becomes the active one.
        """
        project_id = _project_id(project_id)
        loaded = await self._inference.switch(project_id, on_progress)
        await run_sync(self._projects.activate, project_id)
        return loaded

    async def evaluate_adapter(
        self,
        adapter_path: str,
        evaluation_data: str | Records,
        base_model: str | None = None,
        *,
        config: DataSelection | Mapping[str, Any] | None = None,
        accept_unproven_base: bool = False,
    ) -> TrainingStatus:
        """Queue a comparison of base model and adapter in the background and return immediately; follow it like a training.

        Args:
            adapter_path: a directory, or a project id (its current adapter).
            evaluation_data: a repository directory, a file of records, or records. Text that the adapter was trained on is
                left out, if recorded.
            base_model: omit to use the base model that the adapter was trained on, if it is on this machine.
            config: a DataSelection or its fields: include, exclude, more_sources, skip_unusable_records.
            accept_unproven_base: evaluate although only the shapes fit (verdict 'shape_only').
        """
        return await self._evaluate(
            [adapter_path],
            evaluation_data,
            base_model,
            parse_selection(config),
            accept_unproven_base=accept_unproven_base,
        )

    async def compare_adapters(
        self,
        adapter_a: str,
        adapter_b: str,
        evaluation_data: str | Records | None = None,
        base_model: str | None = None,
        *,
        config: DataSelection | Mapping[str, Any] | None = None,
        accept_unproven_base: bool = False,
    ) -> TrainingStatus:
        """Queue a comparison of two adapters and their base model on the same text; follow it like a training.

        The status of the completed job has `comparison`: which one to keep, and the measurements.

        Args:
            adapter_a: a directory, or a project id (its current adapter).
            adapter_b: another one of the same base model.
            evaluation_data: as for `evaluate_adapter`. Omit to use the source that the newer of the two was trained on. Text
                that either adapter was trained on is left out, if recorded.
            base_model: omit to use the base model that the adapters were trained on, if it is on this machine.
            config: as for `evaluate_adapter`.
            accept_unproven_base: compare although only the shapes fit (verdict 'shape_only').
        """
        return await self._evaluate(
            [adapter_a, adapter_b],
            evaluation_data,
            base_model,
            parse_selection(config),
            accept_unproven_base=accept_unproven_base,
        )

    async def _evaluate(
        self,
        adapters: Sequence[str],
        evaluation_data: str | Records | None,
        base_model: str | None,
        selection: DataSelection,
        *,
        accept_unproven_base: bool,
    ) -> TrainingStatus:
        def queue() -> TrainingStatus:
            directories, base = self._adapters.adapters_and_base(adapters, base_model)
            evaluated = EvaluatedAdapter(
                adapter_path=directories[0],
                compared_with=directories[1] if len(directories) > 1 else None,
                accept_unproven_base=accept_unproven_base,
            )
            data = None if evaluation_data is None else plain_records(evaluation_data)
            return self._jobs.evaluate(evaluated, base, data, selection)

        return await run_sync(queue)

    async def unload_adapter(self, adapter_path: str | None = None) -> UnloadedAdapter:
        """Unload the active adapter, or the named one. Unloading the last one also unloads the base model."""
        return await self._inference.unload(adapter_path)

    async def generate(
        self,
        request: GenerationRequest | Mapping[str, Any],
        *,
        adapter_path: str | None = None,
        use_base: bool = False,
        on_progress: ProgressCallback | None = None,
        on_text: TextCallback | None = None,
    ) -> Generation:
        """Generate text with the active adapter, the named one in memory, or the base model without one (`use_base`).

        Args:
            request: `GenerationRequest` or its fields.
            adapter_path: omit to use the active adapter.
            use_base: use no adapter; loads the default base model if none is in memory.
            on_progress: awaited with (tokens so far, limit, message).
            on_text: awaited with the text so far, several times a second.
        """
        return await self._inference.generate(
            parse_generation(request), adapter_path, use_base=use_base, on_progress=on_progress, on_text=on_text
        )

    async def export_adapter(
        self,
        adapter_path: str,
        to: str,
        options: ExportOptions | Mapping[str, Any] | None = None,
        *,
        on_progress: ProgressCallback | None = None,
    ) -> ExportReport:
        """Write an adapter in the form of another runtime, and compare what the written file computes there with PEFT.

        Takes seconds to minutes. If it is cancelled or fails, nothing is left behind.

        Args:
            adapter_path: a directory, or a project id (its current adapter).
            to: 'gguf-lora', 'merged', 'ollama', 'vllm', 'mlx', 'hub' or 'editors'.
            options: `ExportOptions` or its fields; without output_path the files are in `projects/ID/exports/ADAPTER/`.
            on_progress: awaited with (done, total, message).
        """
        return await self._exports.export(adapter_path, to, parse_export_options(options), on_progress)

    async def serve_adapter(self, project_id: str | None = None, port: int | None = None) -> Serving:
        """Start an OpenAI-compatible endpoint for the current adapters of all projects, or find the running one.

        It is a process of its own, and runs until `stop_serving`.

        Args:
            project_id: whose adapter answers requests that name no model; omit to use the newest.
            port: of 127.0.0.1; 0: a free one. Omit to use 8012, or the running endpoint's.
        """
        project = None if project_id is None else _project_id(project_id)
        return await run_sync(partial(self._serving.serve, project, port))

    async def stop_serving(self) -> ServingStopped:
        """End the endpoint after the requests that it is answering."""
        return await run_sync(self._serving.stop)

    async def disk_usage(self, free: Sequence[str] = ()) -> DiskUsage:
        """List what is kept in the data directory with its size, and free the items that `free` names.

        What is in use is kept; the result says why. An item's `lost` says what is lost with it.
        """
        await self._inference.sync()
        with suppress(StorageError):  # a full disk must not prevent that space is freed
            await run_sync(self._jobs.ensure_runner)
        return await run_sync(self._storage.usage, free, self._inference.require_unused)

    async def aclose(self) -> None:
        """Stop the inference worker if one runs. Jobs keep running."""
        await self._inference.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def _training_need(self) -> TrainingNeed | None:
        """Return the memory that the running job is still expected to allocate, or None if no job runs."""
        status = self._jobs.running_job()
        if status is not None and status.only_while_free:
            status = self._jobs.make_way()
        if status is None or status.estimate is None:
            return None
        allocated = status.peak_memory_bytes or 0
        return TrainingNeed(status.project_id, max(0, status.estimate.memory_bytes - allocated))


def _project_id(value: str) -> str:
    try:
        return PROJECT_ID.validate_python(value)
    except ValidationError as error:
        raise InvalidArgument(
            "project_id",
            value,
            "letters, digits, '-', '_' and single dots, starting with a letter or digit, at most 64 characters",
            suggestions=["Choose a short name, for instance that of the directory"],
        ) from error
