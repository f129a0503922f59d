"""The inference worker's answers to requests.

One thread answers one request at a time, so that no request can switch adapters during another one's forward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import structlog
import torch

from peft_core.adapters.files import AdapterFiles, WeightsUse, read_adapter
from peft_core.adapters.verify import verify_files
from peft_core.errors import InferenceError
from peft_core.inference.protocol import Command, Generate, Load, Unload, WorkerConfig
from peft_core.inference.worker.adapter_cache import AdapterCache, CacheEntry, file_state
from peft_core.inference.worker.llama_model import LlamaModel
from peft_core.inference.worker.models import Completion, LoadedModel, choose_engine, encode
from peft_core.inference.worker.retriever import Retriever
from peft_core.inference.worker.torch_model import TorchModel
from peft_core.modeling.adapter_model import ResidentModel, release_memory
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.modeling.device import DevicePlan
from peft_core.modeling.memory import memory_bytes
from peft_core.modeling.threads import DecodeThreadTuner
from peft_core.schemas.base_model import Base
from peft_core.schemas.generation import EngineChoice, Generation, GenerationSettings
from peft_core.schemas.results import (
    BaseMatch,
    Compatibility,
    LoadCheck,
    LoadedAdapter,
    MemoryState,
    NextStep,
    UnloadedAdapter,
    nothing_was_loaded,
)
from peft_core.system import in_use

ProgressCallback = Callable[..., None]
"""Takes (done, total, message), and `text`, a function that returns the text so far; raises if the request was cancelled."""
LoadKind = Literal["cold", "warm", "switched"]

log = structlog.get_logger(__name__)


class RequestHandler:
    def __init__(self, config: WorkerConfig, plan: DevicePlan) -> None:
        self._config = config
        self._plan = plan
        self._thread_tuner = DecodeThreadTuner(torch.get_num_threads())
        self._cache = AdapterCache(config.max_resident_adapters)
        self._retriever = Retriever()

    @property
    def holds_nothing(self) -> bool:
        return self._cache.model is None

    @property
    def resident(self) -> MemoryState:
        return self._cache.summary

    def answer(self, request: Command, on_progress: ProgressCallback) -> LoadedAdapter | UnloadedAdapter | Generation:
        """Answer one request.

        Raises:
            PeftMcpError: the request failed; the adapters in memory are unchanged.
        """
        try:
            match request:
                case Load():
                    return self._load(request, on_progress)
                case Unload():
                    return self._unload(request)
                case Generate():
                    return self._generate(request, on_progress)
        finally:
            in_use.keep_only(self._cache.files)

    # -- load ----------------------------------------------------------------------------------------------------------

    def _load(self, request: Load, on_progress: ProgressCallback) -> LoadedAdapter:
        started = time.monotonic()
        path, cache = request.adapter_path, self._cache
        if self._config.projects_dir is not None and path.is_relative_to(self._config.projects_dir):
            in_use.hold(path)
        state = file_state(path)
        entry = cache.entries.get(path)
        accepted = entry is not None and (entry.compatibility.compatible or request.insist)
        if entry is not None and accepted and entry.state == state and self._is_resident(request.base, request.engine):
            cache.activate(path)
            return self._loaded(entry, "switched", [], started)

        on_progress(0, None, "checking the adapter")
        uses: tuple[WeightsUse, ...] = ("skip", "keep")  # headers first: they limit how much is read afterwards
        for use in uses:
            files = read_adapter(path, weights=use)
            check = verify_files(files, request.base)
            if not (check.compatible or (request.insist and check.verdict is BaseMatch.SHAPE_ONLY)):
                return self._fall_back(request, check, _main_reason(check), started, on_progress)

        model, kind = self._model_for(request.base, request.engine, on_progress)
        on_progress(0, None, "loading the adapter")
        try:
            name, effect = self._add_adapter(model, files, on_progress)
            # kill-point: inference worker, load_adapter: the effect is measured, the adapter is not active
        except InferenceError as error:
            if cache.model is None:
                cache.set_model(model)
            return self._fall_back(request, check, error.message, started, on_progress)
        finally:
            cache.restore_selection()
        cache.set_model(model)  # a new base model replaces the old one only after its adapter was found to work
        entry = CacheEntry(name, state, effect, check)
        # kill-point: inference worker, load_adapter: the answer is about to be composed
        return self._loaded(entry, kind, cache.add(path, entry), started)

    def _is_resident(self, base: Base, requested: EngineChoice | None) -> bool:
        """Return whether this base model is in memory, in the requested engine if one is requested."""
        model = self._cache.model
        return model is not None and self._cache.is_on(base) and requested in (None, "auto", model.engine)

    def _model_for(
        self, base: Base, requested: EngineChoice | None, on_progress: ProgressCallback
    ) -> tuple[LoadedModel, LoadKind]:
        """Return the resident model if it is this base model in a requested engine, else load another one next to it."""
        if self._cache.model is not None and self._is_resident(base, requested):
            return self._cache.model, "warm"
        engine, reason = choose_engine(requested or self._config.engine, base, self._plan)

        def say(message: str) -> None:
            on_progress(0, None, message)

        say(f"loading {base.name}")
        if engine == "llamacpp":
            return LlamaModel.load(base, self._config.base_models_dir, reason, say), "cold"
        directory = ensure_hf_directory(base, self._config.base_models_dir, say)
        model = ResidentModel.load(base, directory, self._plan)
        return TorchModel(model, directory, self._thread_tuner, reason), "cold"

    def _add_adapter(
        self, model: LoadedModel, files: AdapterFiles, on_progress: ProgressCallback
    ) -> tuple[str, LoadCheck]:
        if files.settings is None or files.weights is None:
            raise InferenceError("The adapter's files could not be read.")  # cannot happen: they were verified
        name, effect = model.add(files)
        try:
            on_progress(0, None, "the adapter takes effect")
        except BaseException:  # a cancelled load must not change anything
            model.remove(name)
            raise
        return name, effect

    def _fall_back(
        self, request: Load, check: Compatibility, reason: str, started: float, on_progress: ProgressCallback
    ) -> LoadedAdapter:
        """Keep the active adapter; if there is none, let the base model answer without one."""
        cache = self._cache
        model = cache.model or self._model_for(request.base, request.engine, on_progress)[0]
        cache.set_model(model)
        cache.base_answers = cache.active is None
        log.warning("adapter not loaded", reason=reason)
        state = f"{cache.active} is still active" if cache.active else f"{model.base.name} answers without adapter"
        return LoadedAdapter(
            status="fallback",
            adapter_path=str(cache.active) if cache.active else None,
            base_model=model.base.name,
            verdict=check.verdict,
            reason=reason,
            reasons=check.reasons,
            resident=self.resident,
            elapsed_s=_seconds_since(started),
            memory_bytes=memory_bytes(),
            next=f"{state}. {_advice(check)}",
        )

    def _loaded(self, entry: CacheEntry, kind: LoadKind, evicted: list[Path], started: float) -> LoadedAdapter:
        resident = self.resident
        step = NextStep(tool="generate", reason="compare_with_base=true shows what the adapter changes.")
        return LoadedAdapter(
            status="loaded",
            adapter_path=str(self._cache.active),
            base_model=resident.base_model or "",
            verdict=entry.compatibility.verdict,
            reasons=entry.compatibility.reasons,
            effect=entry.effect,
            engine=resident.engine,
            engine_reason=self._cache.model.engine_reason if self._cache.model else "",
            how=kind,
            evicted=[str(path) for path in evicted],
            resident=resident,
            elapsed_s=_seconds_since(started),
            memory_bytes=resident.memory_bytes,
            next="Call generate to use it (compare_with_base=true shows what it changes), unload_adapter to unload it.",
            next_step=step,
        )

    # -- unload --------------------------------------------------------------------------------------------------------

    def _unload(self, request: Unload) -> UnloadedAdapter:
        started, memory_before = time.monotonic(), memory_bytes()
        cache = self._cache
        if cache.model is None and request.adapter_path is None:
            return nothing_was_loaded(memory_before)
        path = request.adapter_path or cache.active
        if path is None and cache.entries:
            raise cache.not_loaded("No adapter is active, so name the one to unload", tool="unload_adapter")
        if path is not None:
            cache.require(path, tool="unload_adapter")
            cache.remove(path)
        base_unloaded = not cache.entries
        if base_unloaded:
            cache.clear()
            release_memory()
            text, step = "Nothing is in memory now; the idle worker process exits within a minute.", None
        else:
            step = NextStep(
                tool="load_adapter",
                arguments={"adapter_path": str(list(cache.entries)[-1])},
                reason=f"Still in memory: {', '.join(map(str, cache.entries))}.",
            )
            text = step.sentence
        # kill-point: inference worker, unload_adapter: the adapter is unloaded, not reported
        return UnloadedAdapter(
            status="unloaded",
            adapter_path=str(path) if path else None,
            base_unloaded=base_unloaded,
            resident=self.resident,
            memory_before_bytes=memory_before,
            memory_after_bytes=memory_bytes(),
            elapsed_s=_seconds_since(started),
            next=text,
            next_step=step,
        )

    # -- generate ------------------------------------------------------------------------------------------------------

    def _generate(self, command: Generate, on_progress: ProgressCallback) -> Generation:
        started = time.monotonic()
        # kill-point: inference worker, generate: asked to generate
        model, path = self._select_for(command, on_progress)
        request, retrieved = command.request, None
        if command.units is not None:
            on_progress(0, None, "looking for similar code")
            request, retrieved = self._retriever.add_context(request, command.units, model)
        prompt = encode(request, model)
        both = request.compare_with_base and path is not None
        total = request.max_new_tokens * (2 if both else 1)

        def run(adapter: str | None, tokens_before: int) -> Completion:
            model.select(adapter)
            who = "adapter" if adapter else "base"

            def on_token(done: int, text: Callable[[], str]) -> None:
                message = f"{done} tokens by the {who}" if done else f"the {who} reads the prompt"
                streamed = {"text": text} if command.stream and not tokens_before else {}
                on_progress(tokens_before + done, total, message, **streamed)

            return model.complete(prompt, request, on_token)

        try:
            generation_started = time.monotonic()
            completion = run(self._cache.entries[path].name if path else None, 0)
            seconds = time.monotonic() - generation_started
            base_text = run(None, completion.tokens).text if both else None
        finally:
            self._cache.restore_selection()
        if path is not None:
            self._cache.mark_used(path)
        # kill-point: inference worker, generate: the text is generated but not returned
        return Generation(
            text=completion.text,
            base_text=completion.text if request.compare_with_base and path is None else base_text,
            base_model=model.base.name,
            engine=model.engine,
            adapter_path=str(path) if path else None,
            applied=GenerationSettings(
                prompt_format=prompt.format,
                **request.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed", "stop"}),
            ),
            prompt_tokens=len(prompt.ids),
            completion_tokens=completion.tokens,
            finish_reason=completion.finish_reason,
            retrieved=retrieved,
            elapsed_s=_seconds_since(started),
            tokens_per_second=round(completion.tokens / seconds, 1) if seconds else 0.0,
        )

    def _select_for(self, command: Generate, on_progress: ProgressCallback) -> tuple[LoadedModel, Path | None]:
        """Return the model and the path of the adapter to use; None for the base model without an adapter."""
        cache = self._cache
        if command.without_adapter is not None:
            if cache.model is None:
                cache.set_model(self._model_for(command.without_adapter, None, on_progress)[0])
            path = None
        elif command.adapter_path is not None:
            cache.require(command.adapter_path)
            path = command.adapter_path
        else:
            path = cache.active
            if path is None and not cache.base_answers:
                raise cache.not_loaded("No adapter is active")
        if cache.model is None:
            raise cache.not_loaded("Nothing is loaded")
        return cache.model, path


def _main_reason(check: Compatibility) -> str:
    """Return the message of the first error, or else of the first warning, and how many more there are."""
    reasons = [reason for reason in check.reasons if reason.severity == "error"] or check.reasons
    if not reasons:
        return f"The verdict of the check is {check.verdict}."
    more = f" ({len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return f"{reasons[0].message}{more}"


def _advice(check: Compatibility) -> str:
    if check.verdict is BaseMatch.SHAPE_ONLY:
        return "Pass the base_model that it was trained on, or load it all the same with accept_unproven_base=true."
    fixes = [reason.fix for reason in check.reasons if reason.fix and reason.severity == "error"]
    return f"{fixes[0].rstrip('.')}." if fixes else "Call verify_adapter_compatibility to see every reason."


def _seconds_since(started: float) -> float:
    return round(time.monotonic() - started, 4)
