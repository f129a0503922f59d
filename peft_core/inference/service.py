"""Adapters in memory: load, unload and generate in the inference worker, if there is enough memory for it."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anyio.to_thread import run_sync

from peft_core.adapters.service import AdapterService
from peft_core.config import Settings
from peft_core.errors import (
    AdapterInUse,
    AdapterNotFound,
    AdapterNotLoaded,
    InferenceError,
    InvalidArgument,
    PeftMcpError,
)
from peft_core.inference.client import InferenceClient, ProgressCallback, TextCallback
from peft_core.inference.protocol import Generate, Load, Unload, WorkerConfig
from peft_core.retrieval.service import RetrievalService
from peft_core.schemas.base_model import Base
from peft_core.schemas.generation import EngineChoice, Generation, GenerationRequest
from peft_core.schemas.results import LoadedAdapter, MemoryState, ResidentAdapter, UnloadedAdapter, nothing_was_loaded
from peft_core.schemas.retrieval import UnitSource
from peft_core.system.machine import available_memory_bytes, expected_device

log = logging.getLogger(__name__)  # structlog would slow the server's start down by 0.1 s


@dataclass(frozen=True)
class TrainingNeed:
    """Memory that a running job is still expected to allocate."""

    project_id: str
    bytes: int


class InferenceService:
    """`training` returns the memory that a running job still needs, or None."""

    def __init__(
        self,
        settings: Settings,
        adapters: AdapterService,
        training: Callable[[], TrainingNeed | None],
        retrieval: RetrievalService,
    ) -> None:
        self._settings = settings
        self._adapters = adapters
        self._training = training
        self._retrieval = retrieval
        self._loading: Counter[Path] = Counter()  # adapters with a load in progress
        config = WorkerConfig(
            data_dir=settings.data_dir,
            base_models_dir=settings.paths.base_models,
            projects_dir=settings.paths.projects,
            activity_file=settings.paths.model_activity,
            max_resident_adapters=settings.max_resident_adapters,
            idle_s=settings.idle_unload_s,
            engine=settings.engine,
            log_level=settings.log_level,
        )
        self._client = InferenceClient(config, settings.paths.logs / "inference.log")

    @property
    def resident(self) -> MemoryState:
        return self._client.resident

    async def sync(self) -> None:
        """Update `resident` with the outcome of cancelled calls."""
        await self._client.sync()

    async def aclose(self) -> None:
        await self._client.aclose()

    async def load(
        self,
        adapter_path: str,
        base_model: str | None,
        *,
        accept_unproven_base: bool,
        engine: EngineChoice | None = None,
        on_progress: ProgressCallback | None,
    ) -> LoadedAdapter:
        """Load an adapter. The base model is resolved and memory checked here; the worker verifies the bytes that it loads.

        Raises:
            AdapterNotFound, InvalidArgument, BaseCheckpointError, HeaderError: as `AdapterService.adapter_and_base`.
            InferenceError: there is not enough memory, or the worker died.
        """
        request = await run_sync(
            partial(self._load_request, adapter_path, base_model, insist=accept_unproven_base, engine=engine)
        )
        path = request.adapter_path
        self._loading[path] += 1
        try:
            return await self._client.ask(request, LoadedAdapter, on_progress)
        finally:
            self._loading[path] -= 1

    async def switch(self, adapter_path: str, on_progress: ProgressCallback | None = None) -> LoadedAdapter:
        """Load an adapter; if that fails, the adapter that was active before is active again.

        Raises:
            PeftMcpError: as for `load`, or the adapter was not loaded ('not_switched').
        """
        await self.sync()
        before = self.resident
        try:
            loaded = await self.load(adapter_path, None, accept_unproven_base=False, on_progress=on_progress)
        except PeftMcpError:
            await self._reactivate(before)
            raise
        if loaded.status == "loaded":
            return loaded
        await self._reactivate(before)
        raise InferenceError(
            f"{adapter_path!r} was not switched to: {loaded.reason}",
            code="not_switched",
            suggestions=[loaded.next],
            details={"reasons": [reason.model_dump(mode="json") for reason in loaded.reasons]},
        )

    async def _reactivate(self, before: MemoryState) -> None:
        """Activate the adapter that was active in `before`, with its base model, if the worker died since."""
        await self.sync()
        active = next((adapter.adapter_path for adapter in before.adapters if adapter.active), None)
        if active is None or ResidentAdapter(adapter_path=active, active=True) in self.resident.adapters:
            return
        try:
            await self.load(active, before.base_path, accept_unproven_base=True, engine=before.engine, on_progress=None)
        except PeftMcpError as error:  # the caller raises why the switch failed, which comes first
            log.warning("%s is not active again: %s", active, error)

    async def unload(self, adapter_path: str | None) -> UnloadedAdapter:
        """Unload the named adapter, or the active one.

        Raises:
            AdapterNotLoaded: the named one is not in memory.
        """
        path = None if adapter_path is None else self._loaded_path(adapter_path)
        try:
            return await self._client.ask(Unload(adapter_path=path), UnloadedAdapter)
        except AdapterNotLoaded:
            if adapter_path is not None:
                raise self._client.nothing_loaded(
                    f"{adapter_path!r} is not in memory: no adapter is, so there is nothing to unload", needed=False
                ) from None
            return nothing_was_loaded(memory_bytes=0)

    async def generate(
        self,
        request: GenerationRequest,
        adapter_path: str | None,
        *,
        use_base: bool,
        on_progress: ProgressCallback | None,
        on_text: TextCallback | None = None,
    ) -> Generation:
        """Generate text with the active adapter, the named resident one, or the base model alone.

        Raises:
            AdapterNotLoaded: no adapter is active, or the named one is not in memory.
            InvalidArgument: the prompt is too long, its file is in no repository, the base model does not support its form, or
                there is no code to retrieve from.
        """
        if use_base and adapter_path is not None and not request.retrieve:
            raise InvalidArgument("use_base", use_base, f"adapter_path = {adapter_path!r} asks for an adapter")
        path = None if adapter_path is None or use_base else self._loaded_path(adapter_path)
        units = await self._units(adapter_path if use_base else path) if request.retrieve else None
        base = await run_sync(self._base_without_adapter) if use_base else None
        request = await run_sync(_with_path_header, request)
        return await self._client.ask(
            Generate(request=request, adapter_path=path, without_adapter=base, stream=on_text is not None, units=units),
            Generation,
            on_progress,
            on_text,
        )

    def require_unused(self, adapter: Path) -> None:
        """Raise AdapterInUse if this adapter is loaded or being loaded."""
        directory = adapter.resolve()  # the path under which it was loaded
        if self._loading[directory] or self._client.is_still_loading(directory):
            raise AdapterInUse(
                f"Adapter {adapter.name} is being loaded, so it was not deleted.",
                suggestions=[
                    "Wait for load_adapter to return; a cancelled call may take as long to end",
                    f"Then call unload_adapter(adapter_path={str(adapter)!r}), and delete_adapter again",
                ],
            )
        if str(directory) in {resident.adapter_path for resident in self.resident.adapters}:
            raise AdapterInUse(
                f"Adapter {adapter.name} is loaded, so it was not deleted.",
                suggestions=[f"Call unload_adapter(adapter_path={str(adapter)!r}) first"],
            )

    async def _units(self, adapter: str | Path | None) -> UnitSource:
        """Return where to retrieve code from: that of the named adapter, or of the active one.

        Raises:
            AdapterNotFound: there is no such adapter.
            InvalidArgument: none is named and none is active, or its code is not kept.
        """
        if isinstance(adapter, str):
            adapter = await run_sync(self._adapters.resolve, adapter)
        if adapter is None:
            adapter = next((Path(each.adapter_path) for each in self.resident.adapters if each.active), None)
        if adapter is None:
            raise InvalidArgument(
                "retrieve",
                True,
                "no adapter is active, so it is not known whose code to search",
                suggestions=["Set adapter_path to the project whose code is searched", "Or call load_adapter first"],
            )
        return await self._retrieval.source_of(adapter)

    # -- preconditions -------------------------------------------------------------------------------------------------

    def _load_request(
        self, adapter_path: str, base_model: str | None, *, insist: bool, engine: EngineChoice | None = None
    ) -> Load:
        directory, base = self._adapters.adapter_and_base(adapter_path, base_model)
        self._require_memory(base, engine or self._settings.engine)
        return Load(adapter_path=directory, base=base, insist=insist, engine=engine)

    def _base_without_adapter(self) -> Base:
        """Return the resident base model, or the default one if none is resident."""
        from peft_core.base_models.resolve import resolve  # noqa: PLC0415 -- not at the server's start

        base = resolve(self.resident.base_path, self._settings)
        self._require_memory(base, self._settings.engine)
        return base

    def _require_memory(self, base: Base, engine: EngineChoice) -> None:
        """Check that the base model fits into free memory, minus what a running job will need.

        Where the engine is chosen when the model is loaded, what torch needs must be free: it is more.

        Raises:
            InferenceError: it does not fit, or the settings forbid loading during a training.
        """
        rule = self._settings.load_during_training
        if self.resident.base_path == str(base.path) or rule == "always":
            return
        training = self._training()
        if training is not None and rule == "never":
            raise InferenceError(
                f"Project {training.project_id!r} is training, and the setting load_during_training = 'never' forbids loading "
                "a model meanwhile.",
                code="training_runs",
                suggestions=[_wait_for(training), "Or set CODEBASE_GARDENER_LOAD_DURING_TRAINING=if_it_fits"],
            )
        from peft_core.planning.cost_model import inference_memory_bytes  # noqa: PLC0415 -- not at the server's start

        needed = inference_memory_bytes(base.shape, expected_device("auto"), in_float16=engine == "llamacpp")
        free = available_memory_bytes()
        reserved = training.bytes if training is not None else 0
        if needed <= free - reserved:
            return
        reserve = f", of which the training of {training.project_id!r} will need {_gb(reserved)}" if training else ""
        resident = f"; {self.resident.base_model} is in memory" if self.resident.base_model else ""
        raise InferenceError(
            f"Not enough memory to load {base.name}: it takes about {_gb(needed)}, {_gb(free)} are free{reserve}{resident}.",
            code="not_enough_memory",
            suggestions=[
                *([_wait_for(training)] if training else []),
                *(["Call unload_adapter first"] if self.resident.base_model else []),
                "Close other programs, or use a smaller base_model",
                "Or set CODEBASE_GARDENER_LOAD_DURING_TRAINING=always to skip this check",
            ],
            details={"needed_bytes": needed, "free_bytes": free, "training_bytes": reserved},
        )

    def _loaded_path(self, adapter_path: str) -> Path:
        """Return the directory of the resident adapter that a path or project id refers to."""
        loaded = [Path(adapter.adapter_path) for adapter in self.resident.adapters]
        try:
            directory = self._adapters.resolve(adapter_path)
        except AdapterNotFound:
            directory = Path(adapter_path)  # it may have been deleted while it was loaded
        if directory in loaded or os.sep in adapter_path:
            return directory
        # The project's current adapter changed after one of its adapters was loaded: the loaded one is meant.
        of_project = [path for path in loaded if path.parent == self._settings.paths.adapters(adapter_path)]
        return of_project[0] if len(of_project) == 1 else directory


def _wait_for(training: TrainingNeed) -> str:
    status = f"get_training_status(project_id={training.project_id!r})"
    return f"Wait until the training ends ({status}), or stop it with cancel_training"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _with_path_header(request: GenerationRequest) -> GenerationRequest:
    """Return the request with the header of its file in front of the code, unless it is there already."""
    if request.file_path is None:
        return request
    from peft_core.data.path_header import prompt_header  # noqa: PLC0415 -- not at the server's start

    field = "prompt" if request.prompt is not None else "prefix"
    code = getattr(request, field) or ""
    header = prompt_header(request.file_path, code)
    return request.model_copy(update={field: code if code.startswith(header) else header + code, "file_path": None})
