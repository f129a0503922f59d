"""List the base models on this machine, with what training each would take. Only headers are read."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from peft_core.base_models.checkpoint import FileStates, file_states
from peft_core.base_models.fim_tokens import has_fim_tokens
from peft_core.base_models.hub_cache import cache_directory, parse_hub_ref
from peft_core.base_models.model_directories import gguf_files, llama_cpp_directories, lm_studio_directories
from peft_core.base_models.ollama_store import PREFIX, installed_names
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import InvalidArgument, PeftMcpError
from peft_core.planning.cost_model import (
    TOKENS_PER_EXAMPLE,
    CostedPlan,
    compute_plans,
    estimate,
    memory_bytes,
    training_speed,
    uses_bf16_blocks,
)
from peft_core.planning.defaults import choose_defaults
from peft_core.planning.planner import choose_plan
from peft_core.planning.target import this_machine
from peft_core.schemas.base_model import BUNDLED, Base
from peft_core.schemas.dataset import SourceKind, SourceSummary
from peft_core.schemas.local_bases import BaseSource, LocalBase, LocalBases
from peft_core.schemas.results import Estimate, NextStep
from peft_core.schemas.training import TrainingConfig
from peft_core.system.machine import expected_device, total_memory_bytes

MAX_LISTED = 100
MAX_SECONDS = (
    3.0  # after which the remaining models are named only; the next call continues, because headers are cached
)
_SOURCE = SourceSummary(
    kind=SourceKind.RECORDS,
    path=None,
    files=1,
    examples=1000,
    estimated_tokens=1000 * TOKENS_PER_EXAMPLE,
    languages={},
    left_out={},
)
_NAME_CHARACTERS = 300


@dataclass(frozen=True)
class _Found:
    base_model: str
    source: BaseSource


def list_base_models(settings: Settings, measured_speed: Callable[[Base, str], float | None]) -> LocalBases:
    """Return the base models that are installed, cached, or stored by Ollama, LM Studio and llama.cpp.

    `measured_speed(base, device)` returns the tokens per second of an earlier run, or None if there was none.
    """
    offline = settings.model_copy(update={"allow_downloads": False})
    device = expected_device("auto")
    found = list(dict.fromkeys(_all_found(offline)))
    deadline = time.monotonic() + MAX_SECONDS
    listed: list[LocalBase] = []
    basis, places = "", set[Path]()
    for number, model in enumerate(found):
        if len(listed) == MAX_LISTED:
            break
        if number and time.monotonic() > deadline:
            reason = "Not examined yet: call list_base_models again"
            listed.append(LocalBase(base_model=model.base_model, source=model.source, trainable=None, reason=reason))
            continue
        try:
            base = resolve(None if model.source == "default" else model.base_model, offline)
        except PeftMcpError as error:
            listed.append(
                LocalBase(
                    base_model=model.base_model,
                    source=model.source,
                    trainable=False,
                    reason=_without_path(error.message),
                )
            )
            continue
        place = base.path.resolve()
        if place not in places:  # LM Studio's files may be links to Ollama's
            places.add(place)
            described, basis = _describe(model, base, device, settings, measured_speed)
            listed.append(described)
    listed.sort(key=lambda entry: (entry.trainable is not True, entry.trainable is False, entry.parameters or 0))
    step = NextStep(
        tool="inspect_training_data",
        missing=("training_data",),
        reason="Set config.base_model to one of them; inspect_training_data estimates time and memory for your code.",
    )
    return LocalBases(
        base_models=listed,
        omitted=max(0, len(found) - MAX_LISTED),
        device=device,
        basis=basis,
        next=step.sentence,
        next_step=step,
    )


# -- where models are --------------------------------------------------------------------------------------------------


def _all_found(settings: Settings) -> Iterator[_Found]:
    if settings.default_base_model is not None:
        yield _Found(_shown(settings.default_base_model), "default")
    yield _Found(BUNDLED, "bundled")
    for name in installed_names():
        yield _Found(f"{PREFIX}{name}", "ollama")
    yield from _in_hugging_face_cache()
    directories: list[tuple[BaseSource, list[Path]]] = [
        ("lm_studio", lm_studio_directories()),
        ("llama_cpp", llama_cpp_directories()),
    ]
    for source, roots in directories:
        for root in roots:
            for file in gguf_files(root):
                yield _Found(_shown(str(file)), source)


def _in_hugging_face_cache() -> Iterator[_Found]:
    """Yield the repositories with a model directory, and GGUF files, which have no hub id of their own.

    Repositories without weights for text, such as those of tokenizers, are left out.
    """
    for repository in sorted(cache_directory().glob("models--*")):
        repo_id = repository.name.removeprefix("models--").replace("--", "/")
        snapshots = sorted((repository / "snapshots").glob("*"))
        complete = any(
            any(snapshot.glob("*.safetensors")) and (snapshot / "config.json").exists() for snapshot in snapshots
        )
        if complete and parse_hub_ref(repo_id) is not None:
            yield _Found(repo_id, "hugging_face_cache")
        for file in gguf_files(repository / "snapshots"):
            yield _Found(_shown(str(file)), "hugging_face_cache")


def _shown(name: str) -> str:
    """Return a path below the home directory with '~', as `resolve` takes it: it need not name the user."""
    try:
        home = str(Path.home())
    except RuntimeError:  # the home directory is unknown
        return name
    return f"~{name[len(home) :]}" if name.startswith(f"{home}/") else name


def _without_path(message: str) -> str:
    """Return the reason of an error about a base model without the path at its beginning."""
    return _shown(message.partition(" cannot be used: ")[2] or message)[:_NAME_CHARACTERS]


# -- what training takes -----------------------------------------------------------------------------------------------


def _describe(
    found: _Found,
    base: Base,
    device: str,
    settings: Settings,
    measured_speed: Callable[[Base, str], float | None],
) -> tuple[LocalBase, str]:
    """Describe a base model that can be read; return the basis of its estimate, too."""
    estimated, reason = _estimate(base, device, settings, measured_speed)
    described = LocalBase(
        base_model=found.base_model,
        source=found.source,
        trainable=estimated is not None,
        reason=reason,
        size_bytes=base.size_bytes,
        quantisation=_quantisation(base.fingerprint.storage),
        parameters=base.shape.parameters,
        family=base.model_type,
        context_length=base.shape.context_length,
        fill_in_the_middle=_has_fim(base.path, file_states(base.path)),
        chat_template=base.has_chat_template,
        memory_bytes=estimated.memory_bytes if estimated is not None else None,
        seconds_per_1000_examples=estimated.seconds if estimated is not None else None,
    )
    return described, estimated.basis if estimated is not None else ""


def _estimate(
    base: Base, device: str, settings: Settings, measured_speed: Callable[[Base, str], float | None]
) -> tuple[Estimate | None, str]:
    """Return what one epoch of 1000 examples takes; None, and the reason, if the machine is too small."""
    config = TrainingConfig(num_epochs=1.0)
    config = config.model_copy(update={"max_length": min(config.max_length, base.shape.context_length)})
    config, _ = choose_defaults(config, base.shape, _SOURCE, None)
    measured, machine = measured_speed(base, device), this_machine(device)
    costed = [
        CostedPlan(
            plan,
            memory_bytes(config, base, device, plan),
            training_speed(base, device, measured, uses_bf16_blocks=uses_bf16_blocks(config, base, plan)),
        )
        for plan in compute_plans(config, base, device, cpu_bfloat16=machine.cpu_bfloat16)
    ]
    try:
        chosen = choose_plan(costed, config, base, machine, settings)
    except InvalidArgument as error:
        return None, _without_path(error.message)
    total = total_memory_bytes()
    if device == "cpu" and chosen.memory_bytes > total:
        needed = chosen.memory_bytes / 1e9
        return None, f"Training it takes about {needed:.1f} GB of memory; this machine has {total / 1e9:.1f} GB"
    return estimate(config, _SOURCE, chosen), chosen.reason.lstrip("; ")


@functools.lru_cache(maxsize=256)
def _has_fim(path: Path, states: FileStates) -> bool | None:  # noqa: ARG001 -- part of the cache key
    try:
        return has_fim_tokens(path)
    except PeftMcpError:
        return None


def _quantisation(storage: str) -> str:
    """Return the number format of most tensors: matrices are more numerous than vectors, which stay in F32."""
    counts = [(int(count), dtype) for dtype, _, count in (part.partition(" ") for part in storage.split(", ") if part)]
    return max((entry for entry in counts if entry[1] != "F32"), default=max(counts, default=(0, "")))[1]
