"""What the host does with each request. One thread, one request at a time: nothing can switch adapters under a forward."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog
import torch
from safetensors.torch import load as tensors_of

from peft_core.adapters.files import AdapterFiles, read_adapter
from peft_core.adapters.manifest import CONFIG, WEIGHTS
from peft_core.adapters.verify import judge
from peft_core.bases.convert import materialise
from peft_core.compute.device import DevicePlan
from peft_core.compute.process import memory_bytes
from peft_core.errors import AdapterNotLoaded, InferenceError
from peft_core.inference.host.generation import Completion, complete, encode
from peft_core.inference.host.model import ResidentModel, release_memory
from peft_core.inference.host.pace import Pace
from peft_core.inference.protocol import Generate, HostConfig, Load, Request, Unload
from peft_core.results import (
    Compatibility,
    Effect,
    Generation,
    GenerationSettings,
    LoadedAdapter,
    Resident,
    ResidentAdapter,
    UnloadedAdapter,
    Verdict,
)
from peft_core.spec import Base

Report = Callable[[float, float | None, str], None]  # done, total, message; raises when nobody waits any more
FileState = tuple[tuple[int, int, int, int], ...]

_EMPTY = "Nothing is loaded now; the process that remains ends in a minute, unless load_adapter needs it."

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Slot:
    """A resident adapter."""

    name: str  # in the model
    state: FileState  # of its files when they were read
    effect: Effect
    compatibility: Compatibility


class Desk:
    def __init__(self, config: HostConfig, plan: DevicePlan) -> None:
        self._config = config
        self._plan = plan
        self._pace = Pace(torch.get_num_threads())
        self._model: ResidentModel | None = None
        self._slots: OrderedDict[Path, Slot] = OrderedDict()  # least recently used first
        self._active: Path | None = None
        self._base_answers = False  # after a load fell back: without being asked each time

    @property
    def holds_nothing(self) -> bool:
        return self._model is None

    @property
    def resident(self) -> Resident:
        return Resident(
            base_model=self._model.base.name if self._model else None,
            base_path=str(self._model.base.path) if self._model else None,
            adapters=[ResidentAdapter(adapter_path=str(path), active=path == self._active) for path in self._slots],
            memory_bytes=memory_bytes(),
        )

    def answer(self, request: Request, report: Report) -> LoadedAdapter | UnloadedAdapter | Generation:
        """Do what is asked.

        Raises:
            ModelError: why not; everything is as it was before.
        """
        match request:
            case Load():
                return self._load(request, report)
            case Unload():
                return self._unload(request)
            case Generate():
                return self._generate(request, report)

    # -- load ----------------------------------------------------------------------------------------------------------

    def _load(self, request: Load, report: Report) -> LoadedAdapter:
        began = time.monotonic()
        path = request.adapter_path
        state = _state(path)
        slot = self._slots.get(path)
        if slot is not None and slot.state == state and self._is_resident(request.base):
            self._activate(path)
            return self._loaded(slot, "switched", [], began)

        report(0, None, "checking the adapter")
        for whole in (False, True):  # headers first: they bound what is read then
            files = read_adapter(path, whole=whole)
            verdict = judge(files, request.base, scan_weights=whole)
            if not (verdict.compatible or (request.insist and verdict.verdict is Verdict.SHAPE_ONLY)):
                return self._fall_back(request.base, verdict, _why(verdict), began, report)

        model, how = self._model_for(request.base, report)
        report(0, None, "loading the adapter")
        try:
            name, effect = self._put_on(model, files)
        except InferenceError as error:
            self._model = self._model or model
            return self._fall_back(request.base, verdict, error.message, began, report)
        finally:
            self._select_active()
        if model is not self._model:  # a new base, whose adapter has proved itself: the old one goes with all on it
            self._forget()
            self._model = model
            release_memory()
        if slot is not None and path in self._slots:  # its files have changed since
            model.remove(self._slots.pop(path).name)
        self._slots[path] = Slot(name, state, effect, verdict)
        self._activate(path)
        return self._loaded(self._slots[path], how, self._evict(), began)

    def _model_for(self, base: Base, report: Report) -> tuple[ResidentModel, Literal["cold", "warm"]]:
        """The resident model where it is of this base, else a new one beside it."""
        if self._model is not None and self._is_resident(base):
            return self._model, "warm"
        report(0, None, f"loading {base.name}")
        directory = materialise(base, self._config.base_models_dir, lambda message: report(0, None, message))
        return ResidentModel.load(base, directory, self._plan), "cold"

    def _put_on(self, model: ResidentModel, files: AdapterFiles) -> tuple[str, Effect]:
        if files.settings is None or files.weights is None:
            raise InferenceError("The adapter's files could not be read whole.")  # judged compatible: cannot be
        return model.add(files.settings, tensors_of(files.weights))

    def _fall_back(
        self, base: Base, verdict: Compatibility, reason: str, began: float, report: Report
    ) -> LoadedAdapter:
        """What was active stays; where nothing was, the base answers."""
        if self._model is None:
            self._model, _ = self._model_for(base, report)
        if self._active is None:
            self._base_answers = True
        log.warning("adapter not loaded", reason=reason)
        active = (
            f"{self._active} is still active" if self._active else f"{self._model.base.name} answers without adapter"
        )
        return LoadedAdapter(
            status="fallback",
            adapter_path=str(self._active) if self._active else None,
            base_model=self._model.base.name,
            verdict=verdict.verdict,
            reason=reason,
            reasons=verdict.reasons,
            resident=self.resident,
            elapsed_s=_since(began),
            memory_bytes=memory_bytes(),
            next=f"{active}. {_advice(verdict)}".strip(),
        )

    def _loaded(
        self, slot: Slot, how: Literal["cold", "warm", "switched"], evicted: list[str], began: float
    ) -> LoadedAdapter:
        assert self._model is not None  # noqa: S101 -- there is an adapter on it
        return LoadedAdapter(
            status="loaded",
            adapter_path=str(self._active),
            base_model=self._model.base.name,
            verdict=slot.compatibility.verdict,
            reasons=slot.compatibility.reasons,
            effect=slot.effect,
            how=how,
            evicted=evicted,
            resident=self.resident,
            elapsed_s=_since(began),
            memory_bytes=memory_bytes(),
            next="Call generate to use it; compare_with_base=true shows what it changes. unload_adapter takes it off.",
        )

    def _activate(self, path: Path) -> None:
        assert self._model is not None  # noqa: S101
        self._slots.move_to_end(path)
        self._active = path
        self._select_active()
        self._base_answers = False

    def _evict(self) -> list[str]:
        """Take off what was not used for longest, until as many are left as may stay."""
        evicted = []
        while len(self._slots) > self._config.max_resident_adapters:
            path = next(iter(self._slots))
            self._take_off(path)
            evicted.append(str(path))
        return evicted

    def _take_off(self, path: Path) -> None:
        assert self._model is not None  # noqa: S101
        self._model.remove(self._slots.pop(path).name)
        if path == self._active:
            self._active = None
        self._select_active()

    def _select_active(self) -> None:
        if self._model is not None:
            self._model.select(self._slots[self._active].name if self._active else None)

    def _is_resident(self, base: Base) -> bool:
        return self._model is not None and self._model.base.fingerprint.same_weights(base.fingerprint)

    def _forget(self) -> None:
        self._model = None
        self._slots.clear()
        self._active = None
        self._base_answers = False

    # -- unload --------------------------------------------------------------------------------------------------------

    def _unload(self, request: Unload) -> UnloadedAdapter:
        began, before = time.monotonic(), memory_bytes()
        path = request.adapter_path or self._active
        if request.adapter_path is not None and path not in self._slots:
            raise _not_loaded(request.adapter_path, self.resident)
        if path is None and self._slots:
            raise AdapterNotLoaded(
                f"No adapter is active. In memory: {', '.join(map(str, self._slots))}.",
                suggestions=["Call unload_adapter(adapter_path=...) with one of these"],
            )
        something = self._model is not None
        if path is not None:
            self._take_off(path)
        base_unloaded = something and not self._slots
        if base_unloaded:
            self._forget()
            release_memory()
        after = memory_bytes()
        left = (
            f"Still in memory: {', '.join(map(str, self._slots))}; load_adapter switches to it." if self._slots else ""
        )
        return UnloadedAdapter(
            status="unloaded" if something else "nothing_loaded",
            adapter_path=str(path) if path else None,
            base_unloaded=base_unloaded,
            resident=self.resident,
            memory_before_bytes=before,
            memory_after_bytes=after,
            elapsed_s=_since(began),
            next=left or _EMPTY if something else "Nothing was loaded. Call load_adapter to use an adapter.",
        )

    # -- generate ------------------------------------------------------------------------------------------------------

    def _generate(self, request: Generate, report: Report) -> Generation:
        began = time.monotonic()
        model, path = self._who_answers(request, report)
        wanted = request.request
        prompt = encode(wanted, model.tokenizer, model.base.name, model.base.shape.context_length)
        both = wanted.compare_with_base and path is not None
        total = wanted.max_new_tokens * (2 if both else 1)

        def write(adapter: str | None, before: int, who: str) -> Completion:
            model.select(adapter)
            return complete(
                model,
                prompt,
                wanted,
                self._pace,
                lambda done: report(before + done, total, f"{done} tokens by the {who}"),
            )

        try:
            text = write(self._slots[path].name, 0, "adapter") if path else write(None, 0, "base")
            seconds = time.monotonic() - began
            base_text = write(None, text.tokens, "base").text if both else None
        finally:
            self._select_active()
        if path is not None:
            self._slots.move_to_end(path)
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

    def _who_answers(self, request: Generate, report: Report) -> tuple[ResidentModel, Path | None]:
        """(the model, the adapter's path; None: the base alone)."""
        if request.without_adapter is not None:
            if self._model is None:
                self._model, _ = self._model_for(request.without_adapter, report)
            return self._model, None
        if self._model is not None:
            if request.adapter_path is not None:
                if request.adapter_path not in self._slots:
                    raise _not_loaded(request.adapter_path, self.resident)
                return self._model, request.adapter_path
            if self._active is not None or self._base_answers:
                return self._model, self._active
        raise _not_loaded(request.adapter_path, self.resident)


def _why(verdict: Compatibility) -> str:
    """The gravest reason, and how many there are beside it."""
    graver = [reason for reason in verdict.reasons if reason.severity == "error"] or verdict.reasons
    if not graver:
        return f"The verdict of the check is {verdict.verdict}."
    more = f" ({len(graver) - 1} more)" if len(graver) > 1 else ""
    return f"{graver[0].message}{more}"


def _advice(verdict: Compatibility) -> str:
    if verdict.verdict is Verdict.SHAPE_ONLY:
        return "Name the base that it was trained on as base_model, or insist with accept_unproven_base=true."
    fixes = [reason.fix for reason in verdict.reasons if reason.fix and reason.severity == "error"]
    return f"{fixes[0].rstrip('.')}." if fixes else "Call verify_adapter_compatibility to see every reason."


def _not_loaded(path: Path | None, resident: Resident) -> AdapterNotLoaded:
    there = ", ".join(adapter.adapter_path for adapter in resident.adapters)
    what = f"{path} is not in memory" if path else "No adapter is active"
    return AdapterNotLoaded(
        f"{what}. In memory: {there or 'none'}.",
        suggestions=[
            f"Call load_adapter(adapter_path={str(path) if path else '...'!r}) first",
            "Or pass use_base=true to have the base answer without an adapter",
        ],
        details={"resident": [adapter.adapter_path for adapter in resident.adapters]},
    )


def _state(directory: Path) -> FileState:
    """What changes when the adapter's files do. Taken before they are read."""
    states = []
    for name in (CONFIG, WEIGHTS):
        try:
            stat = (directory / name).lstat()
        except OSError:
            continue
        states.append((stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return tuple(states)


def _since(began: float) -> float:
    return round(time.monotonic() - began, 4)
