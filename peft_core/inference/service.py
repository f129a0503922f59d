"""Adapters in use, as the rest of the house asks for them: verify, load, unload, generate.

What only reads headers happens here; what computes, in the host.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anyio.to_thread import run_sync

from peft_core.adapters.service import AdapterService
from peft_core.config import Settings
from peft_core.errors import AdapterInUse, AdapterNotFound, AdapterNotLoaded, InferenceError, InvalidArgument
from peft_core.inference.client import InferenceClient, ProgressCallback
from peft_core.inference.protocol import Generate, HostConfig, Load, Unload
from peft_core.planning.cost_model import inference_memory_bytes
from peft_core.schemas.base_model import Base
from peft_core.schemas.generation import Generation, GenerationRequest
from peft_core.schemas.results import (
    LoadedAdapter,
    MemoryState,
    UnloadedAdapter,
    nothing_was_loaded,
)
from peft_core.system.machine import available_memory_bytes, expected_device


@dataclass(frozen=True)
class TrainingNeed:
    """Memory that a running training is still going to take."""

    project_id: str
    bytes: int


class InferenceService:
    """`training()` returns what a running training job still needs, if one is running."""

    def __init__(
        self,
        settings: Settings,
        adapters: AdapterService,
        training: Callable[[], TrainingNeed | None],
    ) -> None:
        self._settings = settings
        self._adapters = adapters
        self._training = training
        self._loading: Counter[Path] = Counter()  # being loaded now
        config = HostConfig(
            base_models_dir=settings.paths.base_models,
            max_resident_adapters=settings.max_resident_adapters,
            idle_s=settings.idle_unload_s,
            log_level=settings.log_level,
        )
        self._host = InferenceClient(config, settings.paths.logs / "inference.log")

    @property
    def resident(self) -> MemoryState:
        return self._host.resident

    async def sync(self) -> None:
        """Let `resident` take in what calls have done that were given up."""
        await self._host.sync()

    async def aclose(self) -> None:
        await self._host.aclose()

    async def load(
        self,
        adapter_path: str,
        base_model: str | None,
        *,
        accept_unproven_base: bool,
        on_progress: ProgressCallback | None,
    ) -> LoadedAdapter:
        """The host verifies the bytes that it loads; here the base is found and memory looked at.

        Raises:
            AdapterNotFound, InvalidArgument, BaseModelError, HeaderError: as `verify`.
            InferenceError: no memory for it, or the host died.
        """
        request = await run_sync(partial(self._load_request, adapter_path, base_model, insist=accept_unproven_base))
        path = request.adapter_path
        self._loading[path] += 1
        try:
            return await self._host.ask(request, LoadedAdapter, on_progress)
        finally:
            self._loading[path] -= 1

    async def unload(self, adapter_path: str | None) -> UnloadedAdapter:
        """Take off the named adapter, or the active one.

        Raises:
            AdapterNotLoaded: the named one is not in memory.
        """
        path = None if adapter_path is None else self._loaded_path(adapter_path)
        try:
            return await self._host.ask(Unload(adapter_path=path), UnloadedAdapter)
        except AdapterNotLoaded:
            if adapter_path is not None:
                raise self._host.nothing_loaded(
                    f"{adapter_path!r} is not in memory, nor is anything else: there is nothing to unload",
                    needed=False,
                ) from None
            return nothing_was_loaded(memory_bytes=0)

    async def generate(
        self,
        request: GenerationRequest,
        adapter_path: str | None,
        *,
        use_base: bool,
        on_progress: ProgressCallback | None,
    ) -> Generation:
        """Write with the active adapter, the named resident one, or the base alone.

        Raises:
            AdapterNotLoaded: nothing is active, or the named one is not in memory.
            InvalidArgument: the prompt is too long, or of a form that the base does not know.
        """
        if use_base and adapter_path is not None:
            raise InvalidArgument("use_base", use_base, f"adapter_path = {adapter_path!r} asks for an adapter")
        path = None if adapter_path is None else self._loaded_path(adapter_path)
        base = await run_sync(self._base_alone) if use_base else None
        return await self._host.ask(
            Generate(request=request, adapter_path=path, without_adapter=base),
            Generation,
            on_progress,
        )

    def require_unused(self, adapter: Path) -> None:
        """Raise AdapterInUse if this adapter is loaded or being loaded."""
        directory = adapter.resolve()  # the path under which it was loaded
        if self._loading[directory] or self._host.is_still_loading(directory):
            raise AdapterInUse(
                f"Adapter {adapter.name} is being loaded, and so is not deleted.",
                suggestions=[
                    "Wait for load_adapter to answer; a call that was cancelled may take as long to come to its end",
                    f"Then call unload_adapter(adapter_path={str(adapter)!r}), and delete_adapter again",
                ],
            )
        if str(directory) in {resident.adapter_path for resident in self.resident.adapters}:
            raise AdapterInUse(
                f"Adapter {adapter.name} is loaded, and so is not deleted.",
                suggestions=[f"Call unload_adapter(adapter_path={str(adapter)!r}) first"],
            )

    # -- what a request needs ------------------------------------------------------------------------------------------

    def _load_request(self, adapter_path: str, base_model: str | None, *, insist: bool) -> Load:
        directory, base = self._adapters.adapter_and_base(adapter_path, base_model)
        self._require_memory(base)
        return Load(adapter_path=directory, base=base, insist=insist)

    def _base_alone(self) -> Base:
        """For answers without an adapter, where no base is resident: the default one."""
        from peft_core.base_models.resolve import resolve  # noqa: PLC0415 -- not at the server's start

        base = resolve(self.resident.base_path, self._settings)
        self._require_memory(base)
        return base

    def _require_memory(self, base: Base) -> None:
        """That base and process fit beside what runs.

        Raises:
            InferenceError: with the figures.
        """
        rule = self._settings.load_during_training
        if self.resident.base_path == str(base.path) or rule == "always":
            return
        training = self._training()
        if training is not None and rule == "never":
            raise InferenceError(
                f"Project {training.project_id!r} is training, and the setting load_during_training = 'never' keeps models "
                "out of memory meanwhile.",
                code="training_runs",
                suggestions=[_wait_for(training), "Or set CODEBASE_GARDENER_LOAD_DURING_TRAINING=if_it_fits"],
            )
        needed = inference_memory_bytes(base.shape, expected_device("auto"))
        free = available_memory_bytes()
        reserved = training.bytes if training is not None else 0
        if needed <= free - reserved:
            return
        reserve = (
            f", of which the training of {training.project_id!r} is going to take {_gb(reserved)}" if training else ""
        )
        there = f"; {self.resident.base_model} is in memory" if self.resident.base_model else ""
        raise InferenceError(
            f"Not enough memory to load {base.name}: it takes about {_gb(needed)}, {_gb(free)} are free{reserve}{there}.",
            code="not_enough_memory",
            suggestions=[
                *([_wait_for(training)] if training else []),
                *(["Call unload_adapter first"] if self.resident.base_model else []),
                "Close other programs, or use a smaller base_model",
                "Or set CODEBASE_GARDENER_LOAD_DURING_TRAINING=always to load without looking at memory",
            ],
            details={"needed_bytes": needed, "free_bytes": free, "training_bytes": reserved},
        )

    def _loaded_path(self, adapter_path: str) -> Path:
        """The resident adapter that a path or a project id stands for."""
        loaded = [Path(adapter.adapter_path) for adapter in self.resident.adapters]
        try:
            directory = self._adapters.resolve(adapter_path)
        except AdapterNotFound:
            directory = Path(adapter_path)  # deleted since, perhaps
        if directory in loaded or os.sep in adapter_path:
            return directory
        # A project whose current adapter has changed since: the one of it that is loaded is meant.
        of_project = [path for path in loaded if path.parent == self._settings.paths.adapters(adapter_path)]
        return of_project[0] if len(of_project) == 1 else directory


def _wait_for(training: TrainingNeed) -> str:
    return f"Wait for the training: get_training_status(project_id={training.project_id!r}), or stop it with cancel_training"


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
