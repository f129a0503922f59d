"""List the base models on this machine, with what training each would take. Only headers are read."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

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
    MeasuredRun,
    Speed,
    compute_plans,
    estimate,
    memory_bytes,
    scaled_speed,
    training_speed,
    uses_bf16_blocks,
)
from peft_core.planning.defaults import choose_defaults
from peft_core.planning.planner import choose_plan, with_settings
from peft_core.planning.target import Target, this_machine
from peft_core.schemas.base_model import BUNDLED, Base
from peft_core.schemas.dataset import SourceKind, SourceSummary
from peft_core.schemas.local_bases import BaseSource, LocalBase, LocalBases
from peft_core.schemas.results import Estimate, NextStep
from peft_core.schemas.task import ComputePlan
from peft_core.schemas.training import TrainingConfig
from peft_core.system.gpu_memory import device_memory_bytes
from peft_core.system.machine import expected_device

MAX_LISTED = 100
# Seconds, after which the remaining models are named only; the next call continues, because headers are cached.
MAX_SECONDS = 3.0
THOUSAND_EXAMPLES = SourceSummary(
    kind=SourceKind.RECORDS,
    path=None,
    files=1,
    examples=1000,
    estimated_tokens=1000 * TOKENS_PER_EXAMPLE,
    languages={},
    left_out={},
)
NOT_EXAMINED = "Not examined yet: call list_base_models again"
_NAME_CHARACTERS = 300

MeasuredSpeed = Callable[[Base, str], float | None]


class Examined(NamedTuple):
    """A base model that was found on this machine: read, refused, or not looked at in time."""

    base_model: str  # what to give as base_model
    source: BaseSource
    base: Base | None
    reason: str = ""  # why there is no `base`
    in_time: bool = True


class Machine(NamedTuple):
    """What a plan depends on beside the data and the base model."""

    target: Target
    settings: Settings
    measured_speed: MeasuredSpeed
    newest_run: MeasuredRun | None = None  # of any base model: what other base models' speed is estimated from


class TrainingCost(NamedTuple):
    """What a training takes on one base model."""

    estimate: Estimate | None  # None: this machine is too small for it
    reason: str = ""  # why there is no estimate, or why a slower plan than the fastest was chosen
    fits_now: bool = True  # into the memory that is free now
    sees_everything: bool = True  # every example, or as many as the user's own limit of steps allows


def list_base_models(settings: Settings, measured_speed: MeasuredSpeed) -> LocalBases:
    """Return the base models that are installed, cached, or stored by Ollama, LM Studio and llama.cpp.

    `measured_speed(base, device)` returns the tokens per second of an earlier run, or None if there was none.
    """
    device = expected_device("auto")
    machine = Machine(this_machine(device), settings, measured_speed)
    found = find_bases(settings)
    listed: list[LocalBase] = []
    basis = ""
    for examined in examine(found[:MAX_LISTED], settings):
        if examined.base is None:
            listed.append(
                LocalBase(
                    base_model=examined.base_model,
                    source=examined.source,
                    trainable=False if examined.in_time else None,
                    reason=examined.reason,
                )
            )
            continue
        base = examined.base
        cost = training_cost(base, TrainingConfig(num_epochs=1.0), THOUSAND_EXAMPLES, machine)
        listed.append(_describe(examined, base, cost))
        basis = cost.estimate.basis if cost.estimate is not None else basis
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


def find_bases(settings: Settings) -> list[tuple[str, BaseSource]]:
    """Return the names of the base models on this machine, with the places where they are."""
    return list(dict.fromkeys(_all_found(settings)))


def examine(
    found: Iterable[tuple[str, BaseSource]], settings: Settings, max_seconds: float | None = None
) -> Iterator[Examined]:
    """Read the headers of base models, each file once; nothing is downloaded.

    After `max_seconds` seconds (default: `MAX_SECONDS`) the rest is only named. The first one is always read.
    """
    offline = settings.model_copy(update={"allow_downloads": False})
    deadline = time.monotonic() + (MAX_SECONDS if max_seconds is None else max_seconds)
    places = set[Path]()
    for number, (name, source) in enumerate(found):
        if number and time.monotonic() > deadline:
            yield Examined(name, source, None, NOT_EXAMINED, in_time=False)
            continue
        try:
            base = resolve(None if source == "default" else name, offline)
        except PeftMcpError as error:
            yield Examined(name, source, None, without_path(error.message))
            continue
        place = base.path.resolve()
        if place not in places:  # LM Studio's files may be links to Ollama's
            places.add(place)
            yield Examined(name, source, base)


# -- where models are --------------------------------------------------------------------------------------------------


def _all_found(settings: Settings) -> Iterator[tuple[str, BaseSource]]:
    if settings.default_base_model is not None:
        yield _shown(settings.default_base_model), "default"
    yield BUNDLED, "bundled"
    for name in installed_names():
        yield f"{PREFIX}{name}", "ollama"
    yield from _in_hugging_face_cache()
    directories: list[tuple[BaseSource, list[Path]]] = [
        ("lm_studio", lm_studio_directories()),
        ("llama_cpp", llama_cpp_directories()),
    ]
    for source, roots in directories:
        for root in roots:
            for file in gguf_files(root):
                yield _shown(str(file)), source


def _in_hugging_face_cache() -> Iterator[tuple[str, BaseSource]]:
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
            yield repo_id, "hugging_face_cache"
        for file in gguf_files(repository / "snapshots"):
            yield _shown(str(file)), "hugging_face_cache"


def _shown(name: str) -> str:
    """Return a path below the home directory with '~', as `resolve` takes it: it need not name the user."""
    try:
        home = str(Path.home())
    except RuntimeError:  # the home directory is unknown
        return name
    return f"~{name[len(home) :]}" if name.startswith(f"{home}/") else name


def without_path(message: str) -> str:
    """Return the reason of an error about a base model without the path at its beginning."""
    return _shown(message.partition(" cannot be used: ")[2] or message)[:_NAME_CHARACTERS]


# -- what training takes -----------------------------------------------------------------------------------------------


def training_cost(base: Base, config: TrainingConfig, source: SourceSummary, machine: Machine) -> TrainingCost:
    """Return what a training of this source takes on a base model, with the settings that `config` leaves open chosen."""
    target, settings = machine.target, machine.settings
    device = target.device
    measured = machine.measured_speed(base, device)

    def speed(plan: ComputePlan) -> Speed:
        if not measured and machine.newest_run is not None:
            return scaled_speed(machine.newest_run, base.shape)
        return training_speed(
            base, device, measured, uses_bf16_blocks=uses_bf16_blocks(config, base, plan), cores=target.cores
        )

    config = with_settings(config, settings)
    config = config.model_copy(update={"max_length": min(config.max_length, base.shape.context_length)})
    plans = compute_plans(config, base, device, cpu_bfloat16=target.cpu_bfloat16)
    speeds = list(map(speed, plans))
    fastest, most_steps = speeds[0].tokens_per_second, settings.max_training_steps
    in_time, _ = choose_defaults(config, base.shape, source, fastest)
    ends_early = config.max_steps is None and in_time.max_steps is not None
    config, _ = choose_defaults(config, base.shape, source, fastest, most_steps=most_steps)
    sizes = [memory_bytes(config, base, device, plan) for plan in plans]
    try:
        chosen = choose_plan(list(map(CostedPlan, plans, sizes, speeds)), config, base, target, settings)
    except InvalidArgument as error:
        return TrainingCost(None, without_path(error.message))
    total = device_memory_bytes(device)
    if total is not None and chosen.memory_bytes > total:
        of = "the GPU" if device == "cuda" else "this machine"
        needed = f"Training it takes about {chosen.memory_bytes / 1e9:.1f} GB of memory"
        return TrainingCost(None, f"{needed}; {of} has {total / 1e9:.1f} GB")
    return TrainingCost(
        estimate(config, source, chosen),
        chosen.reason.removeprefix("; "),
        fits_now=target.memory_bytes is None or chosen.memory_bytes <= target.memory_bytes,
        sees_everything=not ends_early,
    )


def _describe(examined: Examined, base: Base, cost: TrainingCost) -> LocalBase:
    estimated = cost.estimate
    return LocalBase(
        base_model=examined.base_model,
        source=examined.source,
        trainable=estimated is not None,
        reason=cost.reason,
        size_bytes=base.size_bytes,
        quantisation=number_format(base.fingerprint.storage),
        parameters=base.shape.parameters,
        family=base.model_type,
        context_length=base.shape.context_length,
        fill_in_the_middle=fills_in_middle(base.path, file_states(base.path)),
        chat_template=base.has_chat_template,
        memory_bytes=estimated.memory_bytes if estimated is not None else None,
        seconds_per_1000_examples=estimated.seconds if estimated is not None else None,
    )


@functools.lru_cache(maxsize=256)
def fills_in_middle(path: Path, states: FileStates) -> bool | None:  # noqa: ARG001 -- part of the cache key
    try:
        return has_fim_tokens(path)
    except PeftMcpError:
        return None


def number_format(storage: str) -> str:
    """Return the number format of most tensors: matrices are more numerous than vectors, which stay in F32."""
    counts = [(int(count), dtype) for dtype, _, count in (part.partition(" ") for part in storage.split(", ") if part)]
    return max((entry for entry in counts if entry[1] != "F32"), default=max(counts, default=(0, "")))[1]
