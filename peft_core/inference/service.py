"""Adapters in use, as the rest of the house asks for them: verify, load, unload, generate.

What only reads headers happens here; what computes, in the host.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from anyio.to_thread import run_sync

from peft_core.adapters.manifest import read_manifest
from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import AdapterInUse, AdapterNotFound, AdapterNotLoaded, InferenceError, InvalidArgument
from peft_core.inference.client import InferenceClient, ProgressCallback
from peft_core.inference.protocol import Generate, HostConfig, Load, Unload
from peft_core.planning.cost_model import inference_memory_bytes
from peft_core.schemas.base_model import Base
from peft_core.schemas.generation import Generation, GenerationRequest
from peft_core.schemas.results import (
    Compatibility,
    DeletedAdapter,
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
    """`trained_on(adapter_id)` tells where the base of a job's adapter was; `training()` what a running job needs."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        trained_on: Callable[[str], str | None],
        training: Callable[[], TrainingNeed | None],
    ) -> None:
        self._settings = settings
        self._registry = registry
        self._trained_on = trained_on
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

    def verify(self, adapter_path: str, base_model: str | None, *, scan_weights: bool) -> Compatibility:
        """Blocks for milliseconds; with `scan_weights` for as long as reading the weights takes.

        Raises:
            AdapterNotFound: no such directory.
            InvalidArgument, BaseModelError, HeaderError: the named base cannot be found or read.
        """
        from peft_core.adapters.verify import verify  # noqa: PLC0415 -- not at the server's start

        directory = self._registry.locate(adapter_path)
        base = self._base(directory, base_model)
        if scan_weights and base is not None:
            from peft_core.base_models.fingerprint import content_hash  # noqa: PLC0415 -- not at the server's start

            known = base.fingerprint.model_copy(update={"content": content_hash(base.path)})
            base = base.model_copy(update={"fingerprint": known})
        return verify(directory, base, scan_weights=scan_weights)

    async def load(
        self, adapter_path: str, base_model: str | None, *, accept_unproven_base: bool, report: ProgressCallback | None
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
            return await self._host.ask(request, LoadedAdapter, report)
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
                    f"{adapter_path!r} is not in memory, nor is anything else: there is nothing to unload", needed=False
                ) from None
            return nothing_was_loaded(memory_bytes=0)

    async def generate(
        self, request: GenerationRequest, adapter_path: str | None, *, use_base: bool, report: ProgressCallback | None
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
            Generate(request=request, adapter_path=path, without_adapter=base), Generation, report
        )

    def adapter_and_base(self, adapter_path: str, base_model: str | None) -> tuple[Path, Base]:
        """The directory that is meant, and the named base; else the one it was trained on, where it is on this machine.

        Raises:
            AdapterNotFound, InvalidArgument, BaseModelError, HeaderError: as `load`.
        """
        directory = self._registry.locate(adapter_path)
        base = self._base(directory, base_model)
        if base is None:
            self._require_readable(adapter_path, directory)
            raise InvalidArgument(
                "base_model",
                base_model,
                "this adapter does not say on which base it was trained, or that base is not on this machine; "
                "a base that its configuration merely names is not looked for",
                suggestions=["Give base_model: a model directory, a .gguf file or a cached hub id"],
            )
        return directory, base

    def delete(self, project_id: str, adapter_id: str) -> DeletedAdapter:
        """Delete an adapter that was trained here.

        Raises:
            AdapterNotFound: the project has none of this id; names those it has.
            AdapterInUse: it is loaded, or being loaded.
        """
        path = self._registry.require(project_id, adapter_id)
        directory = path.resolve()  # as it was loaded
        if self._loading[directory] or self._host.is_still_loading(directory):
            raise AdapterInUse(
                f"Adapter {adapter_id} is being loaded, and so is not deleted.",
                suggestions=[
                    "Wait for load_adapter to answer; a call that was cancelled may take as long to come to its end",
                    f"Then call unload_adapter(adapter_path={str(path)!r}), and delete_adapter again",
                ],
            )
        if str(directory) in {adapter.adapter_path for adapter in self.resident.adapters}:
            raise AdapterInUse(
                f"Adapter {adapter_id} is loaded, and so is not deleted.",
                suggestions=[f"Call unload_adapter(adapter_path={str(path)!r}) first"],
            )
        return self._registry.delete(project_id, adapter_id)

    # -- what a request needs ------------------------------------------------------------------------------------------

    def _load_request(self, adapter_path: str, base_model: str | None, *, insist: bool) -> Load:
        directory, base = self.adapter_and_base(adapter_path, base_model)
        self._require_memory(base)
        return Load(adapter_path=directory, base=base, insist=insist)

    def _require_readable(self, adapter_path: str, directory: Path) -> None:
        """That the directory holds an adapter at all: the check says so without a base, too."""
        from peft_core.adapters.verify import verify  # noqa: PLC0415 -- not at the server's start

        wrong = [r for r in verify(directory, None).reasons if r.severity == "error" and r.code != "base_unknown"]
        if wrong:
            allowed = " ".join(reason.message for reason in wrong[:3])
            raise InvalidArgument(
                "adapter_path",
                adapter_path,
                allowed,
                suggestions=[r.fix for r in wrong[:1] if r.fix],
                code=wrong[0].code,
            )

    def _base(self, directory: Path, base_model: str | None) -> Base | None:
        """The named base; else the one the adapter was trained on, where it can be found on this machine."""
        from peft_core.base_models.resolve import resolve  # noqa: PLC0415 -- not at the server's start

        if base_model is not None:
            return resolve(base_model, self._settings)
        from peft_core.adapters.base_match import find_base  # noqa: PLC0415 -- likewise
        from peft_core.base_models.resolve import candidates  # noqa: PLC0415 -- likewise

        manifest = read_manifest(directory)
        if manifest is None:
            return None
        record = manifest.base
        known = self._trained_on(directory.name)
        local = self._settings.model_copy(update={"allow_downloads": False})

        def places() -> Iterable[Callable[[], Base]]:
            if known is not None:
                yield lambda: resolve(known, local)
            yield from candidates(record.name, record.revision, self._settings)

        return find_base(record, places())

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
            directory = self._registry.locate(adapter_path)
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
