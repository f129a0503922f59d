"""From what was asked for to what will be done: base found, data inspected, time and memory estimated, limits checked.

Everything that can be refused without a model is refused here, before there is a job.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_core.adapters.tensor_check import linear_modules
from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.fim_tokens import has_fim_tokens
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.data import lance_table
from peft_core.data.git import require_history
from peft_core.data.records import write_records
from peft_core.data.summarise import summarise_source
from peft_core.errors import InvalidArgument, StorageError, unwritable
from peft_core.planning.cost_model import (
    MICRO_TOKENS,
    compute_plans,
    estimate,
    lora_parameters,
    memory_bytes,
    tokens_per_second,
    uses_bf16_blocks,
)
from peft_core.planning.defaults import choose_defaults, with_defaults
from peft_core.schemas.base_model import BUNDLED, Base
from peft_core.schemas.dataset import DatasetPurpose, SourceKind, SourceSummary
from peft_core.schemas.task import ComputePlan, JobRequest
from peft_core.schemas.training import TrainingConfig
from peft_core.system.allowed_paths import require_data_place
from peft_core.system.machine import available_memory_bytes, cpu_multiplies_bfloat16, expected_device, why_no_cuda

MARGIN_BYTES = 200 << 20  # disk space that is left to others

TrainingData = str | Sequence[Mapping[str, Any]]


def plan(
    training_data: TrainingData,
    config: TrainingConfig,
    settings: Settings,
    measured_speed: Callable[[Base, str], float | None],
) -> JobRequest:
    """The resolved request. `measured_speed(base, device)`: tokens per second of an earlier run, where there was one.

    Raises:
        InvalidArgument, DataError, BaseModelError, StorageError: it cannot be done, and why.
    """
    device = _device(config)
    require_place(DatasetPurpose.TRAINING.field, training_data, settings)
    base = resolve(config.base_model, settings)
    found = summarise_source(training_data, max_length=config.max_length)
    if config.held_out_by == "time":
        if found.kind is not SourceKind.REPOSITORY or found.path is None:
            raise InvalidArgument("config.held_out_by", "time", "records have no history; 'file' is allowed for them")
        require_history(found.path)
    if found.needs_chat_template and not base.has_chat_template:
        raise InvalidArgument(
            "training_data",
            "records with messages",
            f"the base {base.name} has no chat template, so conversations cannot be written in its form",
            suggestions=["Use an instruct model as base_model, or records of the form {prompt, completion}"],
        )
    if config.mixture.instructions and not base.has_chat_template:
        raise InvalidArgument(
            "config.mixture.instructions",
            config.mixture.instructions,
            f"the base {base.name} has no chat template, so nothing can be told as an instruction; 0 is allowed",
            suggestions=["Use an instruct model as base_model"],
        )
    if config.mixture.fill_in_the_middle and not has_fim_tokens(base.path):
        raise InvalidArgument(
            "config.mixture.fill_in_the_middle",
            config.mixture.fill_in_the_middle,
            f"the vocabulary of the base {base.name} has no tokens for gaps of a form that is known here; 0 is allowed",
            suggestions=["Use a base for code completion, such as Qwen2.5-Coder or StarCoder2"],
        )
    measured = measured_speed(base, device)
    fastest = compute_plans(config, base, device, cpu_bfloat16=cpu_multiplies_bfloat16())[0]
    narrow = uses_bf16_blocks(config, base, fastest)
    rate, _ = tokens_per_second(base, device, measured, uses_bf16_blocks=narrow)
    config, chosen = choose_defaults(config, base.shape, found, rate)
    _check_fit(config, base)
    config = with_defaults(config, base.shape)
    execution, cost = _choose_execution(config, base, device, settings.max_memory_mb)
    planned = estimate(config, base, found, device, execution, measured_tokens_per_second=measured)
    planned = planned.model_copy(update={"basis": planned.basis + cost, "chosen": chosen})
    _check_disk(config, base, found, settings.data_dir)
    return JobRequest(
        source=found.path or Path(),
        source_kind=found.kind,
        config=config,
        base=base,
        found=found,
        device=device,
        estimate=planned,
        execution=execution,
    )


def require_place(field: str, data: TrainingData, settings: Settings) -> None:
    """That data named by a path may be read from there. `field`: what the request calls it.

    Raises:
        InvalidArgument: 'sensitive_place', 'outside_allowed_roots'.
    """
    if not isinstance(data, str):
        return
    try:
        path = Path(data).expanduser().absolute()
    except RuntimeError:  # a home directory that is not known; the inspection says so
        return
    require_data_place(path, data_dir=settings.data_dir, allowed_roots=settings.allowed_roots, field=field)


def require_sources(request: JobRequest, settings: Settings) -> None:
    """That a job of earlier may still read what it was made from: the setting `allowed_roots` may have changed since.

    Raises:
        InvalidArgument, BaseModelError: it may not, or the base is gone.
    """
    if request.source_kind is not SourceKind.RECORDS:  # those are a file of our own
        require_place(request.purpose.field, str(request.source), settings)
    resolve(request.base.ref if request.base.ref == BUNDLED else str(request.base.path), settings)


def write_source(request: JobRequest, training_data: TrainingData, records: Path) -> JobRequest:
    """Give inline records and the rows of a table a file, so that the job can be run by another process, and again.

    Raises:
        StorageError, DataError: nothing is left behind.
    """
    if isinstance(training_data, str) and request.source_kind is not SourceKind.RECORDS:
        return request
    try:
        records.parent.mkdir(parents=True)
    except OSError as error:
        raise unwritable(records.parent, error) from error
    try:
        if isinstance(training_data, str):
            lance_table.export_records(request.source, records)
        else:
            write_records(training_data, records)
    except BaseException as error:
        shutil.rmtree(records.parent, ignore_errors=True)
        if isinstance(error, OSError):
            raise unwritable(records.parent, error) from error
        raise
    return request.model_copy(update={"source": records})


def _device(config: TrainingConfig) -> str:
    why_not = {
        "mps": None if sys.platform == "darwin" else "MPS is there on Apple silicon only",
        "cuda": why_no_cuda(),
    }
    if (why := why_not.get(config.device)) is not None:
        allowed = ["auto", *(device for device, reason in why_not.items() if reason is None), "cpu"]
        raise InvalidArgument("config.device", config.device, f"{why}; allowed here: {', '.join(allowed)}")
    return expected_device(config.device)


def _check_fit(config: TrainingConfig, base: Base) -> None:
    """Settings that this base cannot follow."""
    if config.max_length > base.shape.context_length:
        raise InvalidArgument(
            "config.max_length",
            config.max_length,
            f"{base.name} knows positions up to {base.shape.context_length}",
        )
    if config.target_modules != "all-linear":
        known = {name.rsplit(".", 1)[-1] for name in linear_modules(read_checkpoint(base.path).shapes)} - {"lm_head"}
        for name in config.target_modules:
            if name.rsplit(".", 1)[-1] not in known:
                raise InvalidArgument(
                    "config.target_modules",
                    name,
                    f"the linear modules of {base.name} are {', '.join(sorted(known))}",
                    suggestions=["Use 'all-linear', or names from this list"],
                )


def _choose_execution(
    config: TrainingConfig,
    base: Base,
    device: str,
    settings_limit_mb: int | None,
) -> tuple[ComputePlan, str]:
    """The fastest way to train within the limit, and in words what it costs to keep it.

    The limit is the tighter of the caller's and the user's; where there is none, what is available on this machine.
    """
    ways = compute_plans(config, base, device, cpu_bfloat16=cpu_multiplies_bfloat16())
    needs = [memory_bytes(config, base, device, way) for way in ways]
    limits = [("config.max_memory_mb", config.max_memory_mb), ("CODEBASE_GARDENER_MAX_MEMORY_MB", settings_limit_mb)]
    given = [(limit_mb, field) for field, limit_mb in limits if limit_mb is not None]
    if not given and device != "cpu":
        return ways[0], ""  # what the device has is not known here
    limit_mb, field = min(given) if given else (_mb(available_memory_bytes()), "the memory available now")
    for way, need in zip(ways, needs, strict=True):
        if need <= limit_mb << 20:
            return way, "" if way == ways[0] else f"; {_described(way)}, to keep within {field} = {limit_mb} MB"
    lean = min(needs)
    if not given:  # it may be otherwise when the job's turn comes
        way = ways[needs.index(lean)]
        return (
            way,
            f"; more than {field}, {limit_mb} MB, even so: {_described(way)}. Close other programs before it starts",
        )
    smallest = min(
        memory_bytes(config.model_copy(update={"rank": 1, "max_length": 64}), base, device, way) for way in ways
    )
    if smallest > limit_mb << 20:
        advice = f"Training {base.name} takes {_mb(smallest)} MB at least: use a smaller base_model"
    else:
        lower = "max_length" if config.max_length > MICRO_TOKENS[device] else "rank"
        advice = f"Lower {lower}, or have the limit raised to {_mb(lean)}"
    raise InvalidArgument(
        field,
        limit_mb,
        f"training {base.name} with rank {config.rank} and max_length {config.max_length} is estimated to take "
        f"{_mb(lean)} MB at least",
        suggestions=[advice],
    )


def require_memory(needed: int, base: Base, device: str, settings: Settings) -> None:
    """That evaluating a base fits the user's limit, where there is one.

    Raises:
        InvalidArgument: with the figures.
    """
    limit_mb = settings.max_memory_mb
    if device == "cpu" and limit_mb is not None and needed > limit_mb << 20:
        raise InvalidArgument(
            "CODEBASE_GARDENER_MAX_MEMORY_MB",
            limit_mb,
            f"evaluating on {base.name} is estimated to take {_mb(needed)} MB",
            suggestions=[f"Have the limit raised to {_mb(needed)}, or use a smaller base_model"],
        )


def _described(way: ComputePlan) -> str:
    parts = ["the base's weights stay in their file"] if way.weights == "file" else []
    parts += ["layers are computed twice"] if way.recompute_layers else []
    return " and ".join(parts)


def _check_disk(config: TrainingConfig, base: Base, found: SourceSummary, data_dir: Path) -> None:
    needed = (
        (4 * base.shape.parameters if base.format == "gguf" else 0)  # the converted base, if not there yet
        # The adapter and its start; the checkpoint and two good states, each of four, and one that is being written.
        + 4 * lora_parameters(config.rank, base.shape) * 18
        + 12 * found.estimated_tokens  # the dataset as JSON
        + MARGIN_BYTES
    )
    place = data_dir
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise StorageError(
            f"Not enough disk space for this training: it needs about {_mb(needed)} MB in {data_dir}, {_mb(free)} MB are free.",
            code="disk_full",
            suggestions=["Free some space, or set CODEBASE_GARDENER_DATA_DIR to a larger disk and restart the server"],
            details={"needed_bytes": needed, "free_bytes": free, "path": str(data_dir)},
        )


def _mb(size: int) -> int:
    return round(size / (1 << 20))
