"""What the host does with each request. One thread, one request at a time: nothing can switch adapters under a forward."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import structlog
import torch
from safetensors.torch import load as tensors_of

from peft_core.adapters.files import AdapterFiles, read_adapter
from peft_core.adapters.verify import verify_files
from peft_core.errors import InferenceError
from peft_core.inference.protocol import Command, Generate, HostConfig, Load, Unload
from peft_core.inference.worker.adapter_cache import AdapterCache, CacheEntry, file_state
from peft_core.inference.worker.generate import Completion, complete, encode
from peft_core.modeling.adapter_model import ResidentModel, release_memory
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.modeling.device import DevicePlan
from peft_core.modeling.memory import memory_bytes
from peft_core.modeling.threads import DecodeThreadTuner
from peft_core.schemas.base_model import Base
from peft_core.schemas.generation import Generation, GenerationSettings
from peft_core.schemas.results import (
    BaseMatch,
    Compatibility,
    LoadCheck,
    LoadedAdapter,
    MemoryState,
    UnloadedAdapter,
    nothing_was_loaded,
)

ProgressCallback = Callable[[float, float | None, str], None]  # done, total, message; raises when nobody waits any more
How = Literal["cold", "warm", "switched"]

_EMPTY = "Nothing is loaded now; the process that remains ends in a minute, unless load_adapter needs it."

log = structlog.get_logger(__name__)


class RequestHandler:
    def __init__(self, config: HostConfig, plan: DevicePlan) -> None:
        self._config = config
        self._plan = plan
        self._pace = DecodeThreadTuner(torch.get_num_threads())
        self._residents = AdapterCache(config.max_resident_adapters)

    @property
    def holds_nothing(self) -> bool:
        return self._residents.model is None

    @property
    def resident(self) -> MemoryState:
        return self._residents.summary

    def answer(self, request: Command, report: ProgressCallback) -> LoadedAdapter | UnloadedAdapter | Generation:
        """Do what is asked.

        Raises:
            ModelError: why not; what was in memory still is, and answers as before.
        """
        match request:
            case Load():
                return self._load(request, report)
            case Unload():
                return self._unload(request)
            case Generate():
                return self._generate(request, report)

    # -- load ----------------------------------------------------------------------------------------------------------

    def _load(self, request: Load, report: ProgressCallback) -> LoadedAdapter:
        began = time.monotonic()
        path, residents = request.adapter_path, self._residents
        state = file_state(path)
        slot = residents.slots.get(path)
        accepted = slot is not None and (slot.compatibility.compatible or request.insist)
        if slot is not None and accepted and slot.state == state and residents.is_on(request.base):
            residents.activate(path)
            return self._loaded(slot, "switched", [], began)

        report(0, None, "checking the adapter")
        for with_weights in (False, True):  # headers first: they bound what is read then
            files = read_adapter(path, with_weights=with_weights)
            verdict = verify_files(files, request.base, scan_weights=with_weights)
            if not (verdict.compatible or (request.insist and verdict.verdict is BaseMatch.SHAPE_ONLY)):
                return self._fall_back(request.base, verdict, _why(verdict), began, report)

        model, how = self._model_for(request.base, report)
        report(0, None, "loading the adapter")
        try:
            name, effect = self._put_on(model, files, report)
        except InferenceError as error:
            if residents.model is None:
                residents.settle(model)
            return self._fall_back(request.base, verdict, error.message, began, report)
        finally:
            residents.select_active()
        residents.settle(model)  # a new base goes in the old one's place only now that its adapter has proved itself
        slot = CacheEntry(name, state, effect, verdict)
        return self._loaded(slot, how, residents.put(path, slot), began)

    def _model_for(self, base: Base, report: ProgressCallback) -> tuple[ResidentModel, How]:
        """The resident model where it is of this base, else a new one beside it."""
        if self._residents.model is not None and self._residents.is_on(base):
            return self._residents.model, "warm"
        report(0, None, f"loading {base.name}")
        directory = ensure_hf_directory(base, self._config.base_models_dir, lambda message: report(0, None, message))
        return ResidentModel.load(base, directory, self._plan), "cold"

    def _put_on(self, model: ResidentModel, files: AdapterFiles, report: ProgressCallback) -> tuple[str, LoadCheck]:
        if files.settings is None or files.weights is None:
            raise InferenceError("The adapter's files could not be read whole.")  # judged usable: cannot be
        name, effect = model.add(files.settings, tensors_of(files.weights))
        try:
            report(0, None, "the adapter takes effect")
        except BaseException:  # nobody waits any more: a load that was called off changes nothing
            model.remove(name)
            raise
        return name, effect

    def _fall_back(
        self,
        base: Base,
        verdict: Compatibility,
        reason: str,
        began: float,
        report: ProgressCallback,
    ) -> LoadedAdapter:
        """What was active stays; where nothing was, the base answers."""
        residents = self._residents
        model = residents.model or self._model_for(base, report)[0]
        residents.settle(model)
        residents.base_answers = residents.active is None
        log.warning("adapter not loaded", reason=reason)
        who = (
            f"{residents.active} is still active" if residents.active else f"{model.base.name} answers without adapter"
        )
        return LoadedAdapter(
            status="fallback",
            adapter_path=str(residents.active) if residents.active else None,
            base_model=model.base.name,
            verdict=verdict.verdict,
            reason=reason,
            reasons=verdict.reasons,
            resident=self.resident,
            elapsed_s=_since(began),
            memory_bytes=memory_bytes(),
            next=f"{who}. {_advice(verdict)}",
        )

    def _loaded(self, slot: CacheEntry, how: How, evicted: list[Path], began: float) -> LoadedAdapter:
        resident = self.resident
        return LoadedAdapter(
            status="loaded",
            adapter_path=str(self._residents.active),
            base_model=resident.base_model or "",
            verdict=slot.compatibility.verdict,
            reasons=slot.compatibility.reasons,
            effect=slot.effect,
            how=how,
            evicted=[str(path) for path in evicted],
            resident=resident,
            elapsed_s=_since(began),
            memory_bytes=resident.memory_bytes,
            next="Call generate to use it; compare_with_base=true shows what it changes. unload_adapter takes it off.",
        )

    # -- unload --------------------------------------------------------------------------------------------------------

    def _unload(self, request: Unload) -> UnloadedAdapter:
        began, before = time.monotonic(), memory_bytes()
        residents = self._residents
        if residents.model is None and request.adapter_path is None:
            return nothing_was_loaded(before)
        path = request.adapter_path or residents.active
        if path is None and residents.slots:
            raise residents.not_loaded("No adapter is active, so name the one to unload", verb="unload_adapter")
        if path is not None:
            residents.require(path, verb="unload_adapter")
            residents.take_off(path)
        base_unloaded = not residents.slots
        if base_unloaded:
            residents.forget()
            release_memory()
        left = f"Still in memory: {', '.join(map(str, residents.slots))}; load_adapter switches to it."
        return UnloadedAdapter(
            status="unloaded",
            adapter_path=str(path) if path else None,
            base_unloaded=base_unloaded,
            resident=self.resident,
            memory_before_bytes=before,
            memory_after_bytes=memory_bytes(),
            elapsed_s=_since(began),
            next=_EMPTY if base_unloaded else left,
        )

    # -- generate ------------------------------------------------------------------------------------------------------

    def _generate(self, request: Generate, report: ProgressCallback) -> Generation:
        began = time.monotonic()
        model, path = self._who_answers(request, report)
        wanted = request.request
        prompt = encode(wanted, model.tokenizer, model.base.name, model.base.shape.context_length)
        both = wanted.compare_with_base and path is not None
        total = wanted.max_new_tokens * (2 if both else 1)

        def write(adapter: str | None, before: int) -> Completion:
            model.select(adapter)
            who = "adapter" if adapter else "base"
            return complete(
                model,
                prompt,
                wanted,
                self._pace,
                lambda done: report(
                    before + done,
                    total,
                    f"{done} tokens by the {who}" if done else f"the {who} reads the prompt",
                ),
            )

        try:
            writing_since = time.monotonic()
            text = write(self._residents.slots[path].name if path else None, 0)
            seconds = time.monotonic() - writing_since
            base_text = write(None, text.tokens).text if both else None
        finally:
            self._residents.select_active()
        if path is not None:
            self._residents.touch(path)
        return Generation(
            text=text.text,
            base_text=text.text if wanted.compare_with_base and path is None else base_text,
            base_model=model.base.name,
            adapter_path=str(path) if path else None,
            applied=GenerationSettings(
                prompt_format=prompt.format,
                **wanted.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed", "stop"}),
            ),
            prompt_tokens=len(prompt.ids),
            completion_tokens=text.tokens,
            finish_reason=text.finish_reason,
            elapsed_s=_since(began),
            tokens_per_second=round(text.tokens / seconds, 1) if seconds else 0.0,
        )

    def _who_answers(self, request: Generate, report: ProgressCallback) -> tuple[ResidentModel, Path | None]:
        """(the model, the adapter's path; None: the base alone)."""
        residents = self._residents
        if request.without_adapter is not None:
            if residents.model is None:
                residents.settle(self._model_for(request.without_adapter, report)[0])
            path = None
        elif request.adapter_path is not None:
            residents.require(request.adapter_path)
            path = request.adapter_path
        else:
            path = residents.active
            if path is None and not residents.base_answers:
                raise residents.not_loaded("No adapter is active")
        if residents.model is None:
            raise residents.not_loaded("Nothing is loaded")
        return residents.model, path


def _why(verdict: Compatibility) -> str:
    """The gravest reason, and how many there are beside it."""
    graver = [reason for reason in verdict.reasons if reason.severity == "error"] or verdict.reasons
    if not graver:
        return f"The verdict of the check is {verdict.verdict}."
    more = f" ({len(graver) - 1} more)" if len(graver) > 1 else ""
    return f"{graver[0].message}{more}"


def _advice(verdict: Compatibility) -> str:
    if verdict.verdict is BaseMatch.SHAPE_ONLY:
        return "Name the base that it was trained on as base_model, or insist with accept_unproven_base=true."
    fixes = [reason.fix for reason in verdict.reasons if reason.fix and reason.severity == "error"]
    return f"{fixes[0].rstrip('.')}." if fixes else "Call verify_adapter_compatibility to see every reason."


def _since(began: float) -> float:
    return round(time.monotonic() - began, 4)
