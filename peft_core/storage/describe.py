"""Say what an item is, what is lost with it, and why it cannot be freed now."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from peft_core.adapters.registry import Registry
from peft_core.errors import AdapterInUse, PeftMcpError, StorageError, sanitize
from peft_core.jobs.state import RESUMABLE, Job
from peft_core.jobs.store import Store
from peft_core.paths import DataPaths
from peft_core.schemas.results import AdapterSummary, Status
from peft_core.schemas.storage import DiskItem
from peft_core.storage.items import ABANDONED_S, Item, is_locked
from peft_core.system import in_use
from peft_core.system.files import read_small

EXPORT_MANIFEST = "export.json"
F16_SUFFIX = ".f16.gguf"
MAX_CONFIG_BYTES = 1 << 20
MAX_DESCRIPTION = 300  # characters
_WORDS = {
    "logs": "Logs of the runner, the inference process, exports and the endpoint.",
    "leftovers": "Temporary files that killed processes left behind.",
    "database": "The history of all jobs.",
    "other": "Settings, locks, temporary files in use, and files that peft-mcp does not know.",
}
_LOST = {
    "converted_base": "It is converted again at the next use, from the model's own file if that still exists.",
    "adapter": "The adapter is gone for good; it would have to be trained again.",
    "export": "export_adapter writes it again; programs that read these files no longer find them.",
    "logs": "What was logged so far.",
    "leftovers": "Nothing that is used.",
}
_NEVER = {
    "database": "It is needed; the setting CODEBASE_GARDENER_KEEP_RUNS limits the history.",
    "other": "It is in use, or not known to peft-mcp.",
}
_UNREADABLE = "Some of its files cannot be read: their owner or permissions are not those of this process."


@dataclass(frozen=True)
class Surroundings:
    """What decides whether an item may be freed. `require_unused` raises `AdapterInUse` if this process uses an adapter."""

    paths: DataPaths
    registry: Registry
    store: Store
    require_unused: Callable[[Path], None]

    def describe(self, item: Item) -> DiskItem:
        description, lost = self._words(item)
        reason = self._why_not(item) or ("" if item.complete else _UNREADABLE)
        return DiskItem(
            name=item.name,
            kind=item.kind,
            bytes=item.bytes,
            description=sanitize(description, limit=MAX_DESCRIPTION),
            can_free=not reason,
            reason=reason,
            lost="" if reason else lost,
        )

    # -- words ---------------------------------------------------------------------------------------------------------

    def _words(self, item: Item) -> tuple[str, str]:
        """Return what an item is, and what is lost with it."""
        match item.kind:
            case "converted_base":
                return _describe_base(item), _LOST["converted_base"]
            case "adapter":
                return self._describe_adapter(item), _LOST["adapter"]
            case "job":
                return self._describe_job(item)
            case "export":
                project, adapter, target = item.names
                return f"Adapter {adapter} of project {project}, exported as {target}.", _LOST["export"]
            case kind:
                return _WORDS[kind], _LOST.get(kind, "")

    def _describe_adapter(self, item: Item) -> str:
        summary = self._adapters.get(item.names)
        if summary is None:
            return f"An adapter of project {item.names[0]} without a readable manifest."
        current = "the current adapter" if summary.current else "an earlier adapter"
        verdict = f", verdict {summary.verdict}" if summary.verdict else ""
        made = f"on {sanitize(summary.base_model)}, of {summary.created_at[:10]}"
        return f"It is {current} of project {item.names[0]}, {made}{verdict}."

    def _describe_job(self, item: Item) -> tuple[str, str]:
        job = self._jobs.get(item.names[0])
        if job is None:
            return "Files of a job without a readable record.", "All of its files."
        when = datetime.fromtimestamp(job.updated_at, UTC).strftime("%Y-%m-%d")
        words = f"{job.request.noun.capitalize()} of project {job.project_id}, {_state(job)} ({when})."
        if job.status in RESUMABLE:
            return words, _lost_with_resumable(job, item.path)
        if job.request.evaluated is not None:
            return words, "Its HTML report, its data and its log; the results are kept."
        kept = (
            "the adapter that it published and its results are kept, but generate(retrieve=true) finds no code any more"
        )
        return words, f"Its prepared data and its log; {kept}."

    # -- reasons -------------------------------------------------------------------------------------------------------

    def _why_not(self, item: Item) -> str:
        """Return why an item cannot be freed now; "" if it can."""
        match item.kind:
            case "converted_base":
                return self._why_not_base(item)
            case "adapter":
                return self._why_not_adapter(item)
            case "job":
                return self._why_not_job(item)
            case "export":
                return self._why_not_export(item)
            case kind:
                return _NEVER.get(kind, "")

    def _why_not_base(self, item: Item) -> str:
        return f"It is in use. {self._users}" if in_use.is_in_use(item.path) else ""

    def _why_not_adapter(self, item: Item) -> str:
        try:
            self.require_unused(item.path)
        except AdapterInUse as error:
            return str(error)
        summary = self._adapters.get(item.names)
        if summary is not None and summary.current and self._endpoint_runs:
            return "The endpoint serves it. Call stop_serving first."
        for job in self._unfinished:
            if job.request.evaluated is not None and item.path in job.request.evaluated.paths.values():
                return f"Job {job.job_id} evaluates it. Wait for its end, or call cancel_training."
        return f"It is in use. {self._users}" if in_use.is_in_use(item.path) else ""

    def _why_not_job(self, item: Item) -> str:
        job_id = item.names[0]
        if self._job_ids is None:
            return "The database of jobs cannot be read, so it is unknown whether the job has ended."
        if job_id not in self._job_ids and time.time() - item.changed_at < ABANDONED_S:
            return "A request may just be writing it. Try again in an hour."
        job = self._jobs.get(job_id)
        if job is not None and not job.status.is_final:
            return f"The job is {_state(job)}. Wait for its end, or call cancel_training."
        return "An export is reading it. Wait for its end." if in_use.is_in_use(item.path) else ""

    def _why_not_export(self, item: Item) -> str:
        if not (item.path / EXPORT_MANIFEST).is_file():
            return f"It has no {EXPORT_MANIFEST}, so peft-mcp did not write it."
        return "An export is running. Wait for its end." if self._export_runs else ""

    # -- facts, each read at most once ---------------------------------------------------------------------------------

    @cached_property
    def _adapters(self) -> Mapping[tuple[str, ...], AdapterSummary]:
        return {(summary.project_id, summary.adapter_id): summary for summary in self.registry.adapters()}

    @cached_property
    def _job_ids(self) -> set[str] | None:
        """The ids of all jobs; None if the database cannot be read."""
        try:
            return self.store.job_ids() if self.store.exists else set()
        except StorageError:
            return None

    @cached_property
    def _jobs(self) -> Mapping[str, Job]:
        """The jobs whose record can be read."""
        try:
            return {job.job_id: job for job in self.store.in_state(*Status)} if self.store.exists else {}
        except StorageError:
            return {}

    @cached_property
    def _unfinished(self) -> list[Job]:
        return [job for job in self._jobs.values() if job.status in (Status.QUEUED, Status.IN_PROGRESS)]

    @cached_property
    def _endpoint_runs(self) -> bool:
        return is_locked(self.paths.serving_lock)

    @cached_property
    def _export_runs(self) -> bool:
        return is_locked(self.paths.exports_lock)

    @cached_property
    def _users(self) -> str:
        """Who may use a base model or an adapter, and what ends that."""
        running = [job.job_id for job in self._unfinished if job.status is Status.IN_PROGRESS]
        possible = [
            *(f"job {job_id} runs (cancel_training)" for job_id in running[:1]),
            *(["the endpoint runs (stop_serving)"] if self._endpoint_runs else []),
            *(["an export runs"] if self._export_runs else []),
        ]
        loaded = "call unload_adapter in the session that has loaded it"
        return (
            f"Possible reasons: {', '.join(possible)}; otherwise {loaded}." if possible else f"{loaded.capitalize()}."
        )


def _describe_base(item: Item) -> str:
    """Name the base model, as its conversion recorded it."""
    if item.path.name.endswith(F16_SUFFIX):
        converted = item.path.with_name(item.path.name.removesuffix(F16_SUFFIX))  # has the same key
        name, parameters, form = _name_in(converted) or _name_in_gguf(item.path), item.bytes / 2, "in F16 for llama.cpp"
    else:
        name, parameters, form = _name_in(item.path), item.bytes / 4, "converted from GGUF for torch"
    return f"{sanitize(name) or f'A base model of about {parameters / 1e6:.0f}M parameters'}, {form}."


def _name_in(directory: Path) -> str:
    try:
        config = json.loads(read_small(directory / "config.json", MAX_CONFIG_BYTES))
    except (PeftMcpError, ValueError, RecursionError):
        return ""
    name = config.get("_name_or_path") if isinstance(config, dict) else None
    return name if isinstance(name, str) else ""


def _name_in_gguf(path: Path) -> str:
    from peft_core.base_models.gguf import read_gguf_header  # noqa: PLC0415 -- not at the server's start

    try:
        return read_gguf_header(path).text("general.name") or ""
    except PeftMcpError:
        return ""


def _state(job: Job) -> str:
    return "running" if job.status is Status.IN_PROGRESS else job.status.value


def _lost_with_resumable(job: Job, directory: Path) -> str:
    sources = [job.request.source, *(source.path for source in job.request.more_sources)]
    if any(source.is_relative_to(directory) for source in sources):
        return "Its records and its checkpoint are lost: it cannot be resumed any more."
    if (directory / "checkpoint").is_dir():
        return f"Its checkpoint is lost: resume_training then begins again at step 0, not {job.checkpoint_step or 0}."
    return "Its prepared data and its log; it can still be resumed, from the beginning."
