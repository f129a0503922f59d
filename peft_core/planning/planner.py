"""Planning of a training: resolve the base model, inspect the data, estimate time and memory, check limits.

Everything that can be rejected without loading a model is rejected here, before the job exists.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from peft_core.adapters.tensor_check import linear_modules
from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.fim_tokens import has_fim_tokens
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.data import table
from peft_core.data.git import require_history
from peft_core.data.records import write_records
from peft_core.data.selection import Selection
from peft_core.data.summarise import summarise_source, with_parts
from peft_core.errors import InvalidArgument, StorageError, unwritable
from peft_core.planning.base_check import require_loadable
from peft_core.planning.continuation import Adapters, plan_continuation, resolve_base
from peft_core.planning.cost_model import (
    MICRO_TOKENS,
    CostedPlan,
    Speed,
    compute_plans,
    estimate,
    lora_parameters,
    memory_bytes,
    training_speed,
    uses_bf16_blocks,
)
from peft_core.planning.defaults import RANKS, choose_catch_up, choose_defaults
from peft_core.planning.record_check import LIMITS, check_records
from peft_core.planning.target import (
    DATASET_BYTES_PER_TOKEN,
    AskCluster,
    Target,
    ask_cluster,
    describe,
    on_cluster,
    require_device,
    reserve,
    this_machine,
)
from peft_core.schemas.base_model import BUNDLED, Base
from peft_core.schemas.cluster import ClusterAnswer
from peft_core.schemas.dataset import DatasetPurpose, SourceKind, SourceSummary, TrainingData
from peft_core.schemas.task import ComputePlan, JobRequest
from peft_core.schemas.training import TrainingConfig
from peft_core.system.allowed_paths import require_data_path
from peft_core.system.user_paths import user_path

RESERVED_DISK_BYTES = 200_000_000  # left free for other programs
MB = 1_000_000  # in settings, requests and messages
_SETTING = "CODEBASE_GARDENER_MAX_MEMORY_MB"


def plan(
    training_data: TrainingData,
    config: TrainingConfig,
    settings: Settings,
    measured_speed: Callable[[Base, str], float | None],
    adapters: Adapters | None = None,
    *,
    ask: AskCluster = ask_cluster,
) -> JobRequest:
    """Return the resolved request.

    `measured_speed(base, device)` returns the tokens per second of an earlier run, or None if there was none. `adapters`: those
    that the training may continue from; without them it starts from scratch. `ask`: what the user's cluster has.

    Raises:
        InvalidArgument, AdapterNotFound, DataError, BaseCheckpointError, ClusterError, StorageError: the job cannot be run.
    """
    device_here = require_device(config, settings)
    require_places(DatasetPurpose.TRAINING.field, training_data, config.more_sources, settings)
    base = resolve_base(config, settings, adapters)
    config = _within_context(config, base)
    source = summarise(training_data, config, DatasetPurpose.TRAINING)
    _check_source(config, base, source)
    continuation = plan_continuation(config, base, source, adapters)
    config = with_settings(continuation.config, settings)
    _check_base(config, base)

    answer = None if settings.cluster is None or device_here is not None else ask(settings.cluster, base)
    target = this_machine(device_here or "cpu") if answer is None else on_cluster(config, answer)
    plans = compute_plans(config, base, target.device, cpu_bfloat16=target.cpu_bfloat16)
    speeds = _speeds(config, base, target, plans, measured_speed(base, target.device))
    longer = _longest_affordable(config, base, target, plans, settings)
    source, config = with_base(source, training_data, config, base, longer)
    given, speed, most = config, speeds[0].tokens_per_second, settings.max_training_steps
    config, chosen = choose_defaults(config, base.shape, source, speed, most_steps=most)
    catch_up, trained_on = None, source
    if (changes := continuation.changes) is not None:
        changed = changes.changed_units + changes.records
        config, catch_up, trained_on, chosen = choose_catch_up(given, config, source, changed, most_steps=most)
    chosen = " ".join(filter(None, [_why_longer(config, source), continuation.reason, chosen]))
    require_loadable(base)  # last of the checks, because it may take seconds

    sizes = (memory_bytes(config, base, target.device, compute) for compute in plans)
    compute = choose_plan(list(map(CostedPlan, plans, sizes, speeds)), config, base, target, settings)
    _check_disk(config, base, source, settings.data_dir)
    request = JobRequest(
        source=source.path or Path(),
        source_kind=source.kind,
        source_name=source.name,
        more_sources=source.more_sources,
        config=config,
        base=base,
        found=source,
        device=target.device,
        estimate=estimate(config, trained_on, compute, chosen),
        execution=compute.plan,
        continued=continuation.parent,
        catch_up=catch_up,
    )
    return request if answer is None else _for_cluster(request, target, answer, settings)


def _speeds(
    config: TrainingConfig, base: Base, target: Target, plans: Sequence[ComputePlan], measured: float | None
) -> list[Speed]:
    in_bf16 = [uses_bf16_blocks(config, base, compute) for compute in plans]
    return [training_speed(base, target.device, measured, uses_bf16_blocks=use, cores=target.cores) for use in in_bf16]


def _for_cluster(request: JobRequest, target: Target, answer: ClusterAnswer, settings: Settings) -> JobRequest:
    """Return the request with what it reserves on the cluster, and what is sent there.

    Raises:
        ClusterError: No node has as much as it needs.
    """
    base, nodes, estimate = request.base, answer.nodes, request.estimate
    plan = reserve(answer.address, target, base, estimate.memory_bytes, nodes, gpus=settings.cluster_gpus)
    words, sent_bytes = describe(plan, target, base, request.found, nodes, continues=request.continued is not None)
    estimate = estimate.model_copy(update={"cluster": words, "sent_bytes": sent_bytes})
    return request.model_copy(update={"cluster": plan, "estimate": estimate})


def summarise(data: TrainingData, config: TrainingConfig, purpose: DatasetPurpose) -> SourceSummary:
    """Return what the selected data holds; see `summarise_source`."""
    return summarise_source(
        data,
        max_length=config.max_length,
        purpose=purpose,
        selection=Selection(tuple(config.include), tuple(config.exclude)),
        also=config.more_sources,
        held_out_fraction=config.held_out_fraction,
        seed=config.seed,
        skip_unusable_records=config.skip_unusable_records,
    )


def require_places(field: str, data: TrainingData, more_sources: Sequence[str], settings: Settings) -> None:
    """Check that all data of a request may be read; see `require_place`."""
    require_place(field, data, settings)
    for path in more_sources:
        require_place("config.more_sources", path, settings)


def require_place(field: str, data: TrainingData, settings: Settings) -> None:
    """Check that data named by a path may be read from there. `field`: the request's name for it.

    Raises:
        InvalidArgument: 'sensitive_place', 'outside_allowed_roots'.
    """
    if not isinstance(data, str):
        return
    try:
        path = user_path(data).absolute()
    except RuntimeError:  # an unknown home directory; `summarise_source` reports it
        return
    require_data_path(path, data_dir=settings.data_dir, allowed_roots=settings.allowed_roots, field=field)


def require_sources(request: JobRequest, settings: Settings) -> None:
    """Check that an earlier job may still read its inputs: the setting `allowed_roots` may have changed since.

    Raises:
        InvalidArgument, BaseCheckpointError: it may not, or the base model does not exist any more.
    """
    if request.source_kind is not SourceKind.RECORDS:  # those are a file in the job's own directory
        require_place(request.purpose.field, str(request.source), settings)
    for source in request.more_sources:
        require_place("config.more_sources", str(source.path), settings)
    resolve(request.base.ref if request.base.ref == BUNDLED else str(request.base.path), settings)
    if request.cluster is not None and request.cluster.address != settings.cluster:
        raise InvalidArgument(
            "CODEBASE_GARDENER_CLUSTER",
            settings.cluster,
            f"it must be {request.cluster.address!r}, the cluster that this training was planned for",
            suggestions=["Set it again and restart the server, or call train_adapter"],
        )


def write_source(request: JobRequest, training_data: TrainingData, records: Path) -> JobRequest:
    """Write inline records, or the rows of a table, to a file, so that another process can run the job, also repeatedly.

    Raises:
        StorageError, DataError: nothing is left on disk.
    """
    if isinstance(training_data, str) and request.source_kind is not SourceKind.RECORDS:
        return request
    skip = request.config.skip_unusable_records
    try:
        records.parent.mkdir(parents=True)
    except OSError as error:
        raise unwritable(records.parent, error) from error
    try:
        if isinstance(training_data, str):
            table.export_records(request.source, records, skip_unusable_records=skip)
        else:
            write_records(training_data, records, skip=skip)
    except BaseException as error:
        shutil.rmtree(records.parent, ignore_errors=True)
        if isinstance(error, OSError):
            raise unwritable(records.parent, error) from error
        raise
    return request.model_copy(update={"source": records})


# --- Checks ----------------------------------------------------------------------------------------------------------------


def _check_source(config: TrainingConfig, base: Base, source: SourceSummary) -> None:
    """Check that the data suits the settings and the base model."""
    if source.study_items and SourceKind.REPOSITORY not in {
        source.kind,
        *(other.kind for other in source.more_sources),
    }:
        raise InvalidArgument(
            "training_data",
            str(source.path or "records"),
            f"{source.study_items} of its records are study items, whose answers are checked against the repository that they "
            "are about, so they must be trained on together with it",
            suggestions=[
                "Write them into a .jsonl file; give the repository as training_data, and the file in config.more_sources",
                "To train on them unchecked, delete the key 'study' from all records",
            ],
        )
    if config.held_out_by == "time":
        kinds = {source.kind, *(other.kind for other in source.more_sources)}
        if kinds != {SourceKind.REPOSITORY} or source.path is None:
            raise InvalidArgument("config.held_out_by", "time", "records have no history; it must be 'file' for them")
        for path in (source.path, *(other.path for other in source.more_sources)):
            require_history(path)
    if source.needs_chat_template and not base.has_chat_template:
        raise InvalidArgument(
            "training_data",
            "records with messages",
            f"the base model {base.name} {_why_no_template(base)}",
            suggestions=["Use an instruct model as base_model, or records of the form {prompt, completion}"],
        )
    if config.mixture.instructions and not base.has_chat_template:
        raise InvalidArgument(
            "config.mixture.instructions",
            config.mixture.instructions,
            f"the base model {base.name} has no chat template to render instructions with; it must be 0",
            suggestions=["Use an instruct model as base_model"],
        )
    if config.mixture.fill_in_the_middle and not has_fim_tokens(base.path):
        raise InvalidArgument(
            "config.mixture.fill_in_the_middle",
            config.mixture.fill_in_the_middle,
            f"the vocabulary of the base model {base.name} has no known fill-in-the-middle tokens; it must be 0",
            suggestions=["Use a base model for code completion, such as Qwen2.5-Coder or StarCoder2"],
        )


def _why_no_template(base: Base) -> str:
    """Return what a base model without a default chat template has instead, as a predicate."""
    return f"{read_checkpoint(base.path).chat_templates.why_none}, which conversations are rendered with"


def _check_base(config: TrainingConfig, base: Base) -> None:
    """Check that the base model supports the settings."""
    if config.max_length > base.shape.context_length:
        raise InvalidArgument(
            "config.max_length",
            config.max_length,
            f"it must be at most {base.shape.context_length}, the context length of {base.name}",
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


def _check_disk(config: TrainingConfig, base: Base, source: SourceSummary, data_dir: Path) -> None:
    needed = (
        (4 * base.shape.parameters if base.format == "gguf" else 0)  # the converted base model, unless it is cached
        # The adapter and its initial state; the checkpoint and two rollback states of four copies each, and one more that is
        # being written.
        + 4 * lora_parameters(config.lora_rank, base.shape) * 18
        + DATASET_BYTES_PER_TOKEN * source.estimated_tokens
        + RESERVED_DISK_BYTES
    )
    existing = data_dir
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise StorageError(
            f"Not enough disk space for this training: it needs about {_mb(needed)} MB in {data_dir}, but {free // MB} MB are "
            "free.",
            code="disk_full",
            suggestions=["Free some space, or set CODEBASE_GARDENER_DATA_DIR to a larger disk and restart the server"],
            details={"needed_bytes": needed, "free_bytes": free, "path": str(data_dir)},
        )


# --- The compute plan within the memory limit ------------------------------------------------------------------------------


class MemoryLimit(NamedTuple):
    field: str  # the setting that it comes from, for messages
    megabytes: int
    is_set: bool = True  # False: the memory available now, which may have changed when the job starts


def _memory_limit(config: TrainingConfig, settings: Settings, target: Target) -> MemoryLimit | None:
    """Return the tighter of the caller's and the user's limit for this machine, otherwise what the target has."""
    limits = [("config.max_memory_mb", config.max_memory_mb)]
    limits += [(_SETTING, settings.max_memory_mb)] if target.is_here else []
    explicit = [MemoryLimit(field, megabytes) for field, megabytes in limits if megabytes is not None]
    if explicit:
        return min(explicit, key=lambda limit: limit.megabytes)
    if target.memory_bytes is None:
        return None
    return MemoryLimit(target.memory, target.memory_bytes // MB, is_set=False)


def choose_plan(
    costed: Sequence[CostedPlan], config: TrainingConfig, base: Base, target: Target, settings: Settings
) -> CostedPlan:
    """Return the fastest plan that fits the memory limit, with the reason why it is not the fastest of all.

    Raises:
        InvalidArgument: no plan fits a limit that was set.
    """
    fastest, limit = costed[0], _memory_limit(config, settings, target)
    if limit is None or fastest.memory_bytes <= limit.megabytes * MB:
        return fastest
    for candidate in costed:
        if candidate.memory_bytes <= limit.megabytes * MB:
            measures = _describe(candidate.plan)
            return candidate.because(f"; {measures}, to keep within {limit.field} = {limit.megabytes} MB")
    leanest = min(costed, key=lambda candidate: candidate.memory_bytes)
    if limit.is_set:
        raise _over_limit(leanest, limit, config, base, target.device)
    advice = ". Close other programs before it starts" if target.is_here else ""
    return leanest.because(
        f"; more than {limit.field}, {limit.megabytes} MB, although {_describe(leanest.plan)}{advice}"
    )


def with_settings(config: TrainingConfig, settings: Settings) -> TrainingConfig:
    """Return the request's settings, with the user's for those that it does not give."""
    users = {"rank": settings.lora_rank, "alpha": settings.lora_alpha, "batch_size": settings.training_batch_size}
    given = config.model_fields_set
    changes = {name: value for name, value in users.items() if value is not None and name not in given}
    return config.model_copy(update=changes) if changes else config


def _within_context(config: TrainingConfig, base: Base) -> TrainingConfig:
    """Lower a `max_length` that was not given to what the base model takes."""
    if "max_length" in config.model_fields_set or config.max_length <= base.shape.context_length:
        return config
    lowered = config.model_copy(update={"max_length": base.shape.context_length})
    lowered.model_fields_set.discard("max_length")
    return lowered


def with_base(
    source: SourceSummary, given: TrainingData, config: TrainingConfig, base: Base, longer_allowed: int | None
) -> tuple[SourceSummary, TrainingConfig]:
    """Return what the records are with this base model, and the settings with the `max_length` that suits them.

    `max_length` does not follow records that are trained on together with other sources: those were cut to it already.
    """
    check = partial(check_records, base=base, max_length=config.max_length, skip=config.skip_unusable_records)
    if source.parts:
        return with_parts(source, [check(part, str(part.path))[0] for part in source.parts]), config
    source, max_length = check(source, given, longer_allowed=longer_allowed)
    return source, config.model_copy(update={"max_length": max_length})


def _why_longer(config: TrainingConfig, source: SourceSummary) -> str:
    shorter = source.raised_max_length
    return "" if shorter is None else f"max_length {config.max_length}, because {shorter.in_words}."


def _longest_affordable(
    config: TrainingConfig, base: Base, target: Target, plans: Sequence[ComputePlan], settings: Settings
) -> int | None:
    """Return the highest `max_length` that may be chosen for the request; None if the request gives one."""
    if "max_length" in config.model_fields_set:
        return None
    limit = _memory_limit(config, settings, target)

    def fits(max_length: int) -> bool:
        longer = config.model_copy(update={"max_length": max_length, "rank": config.rank or RANKS[0]})
        needed = min(memory_bytes(longer, base, target.device, compute) for compute in plans)
        return limit is None or needed <= limit.megabytes * MB

    affordable = (length for length in LIMITS if length <= base.shape.context_length and fits(length))
    return max(affordable, default=config.max_length)


def _over_limit(
    leanest: CostedPlan, limit: MemoryLimit, config: TrainingConfig, base: Base, device: str
) -> InvalidArgument:
    needed = _mb(leanest.memory_bytes)
    smallest = memory_bytes(config.model_copy(update={"rank": 1, "max_length": 64}), base, device, leanest.plan)
    if smallest > limit.megabytes * MB:
        advice = f"Training {base.name} takes at least {_mb(smallest)} MB: use a smaller base_model"
    else:
        lower = "max_length" if config.max_length > MICRO_TOKENS[device] else "rank"
        advice = f"Lower {lower}, or raise the limit to {needed}"
    return InvalidArgument(
        limit.field,
        limit.megabytes,
        f"training {base.name} with rank {config.rank} and max_length {config.max_length} is estimated to take at least "
        f"{needed} MB",
        suggestions=[advice],
    )


def require_memory(needed: int, base: Base, device: str, settings: Settings) -> None:
    """Check that an evaluation fits the user's limit, if there is one.

    Raises:
        InvalidArgument: it does not.
    """
    limit_mb = settings.max_memory_mb
    if device == "cpu" and limit_mb is not None and needed > limit_mb * MB:
        raise InvalidArgument(
            _SETTING,
            limit_mb,
            f"evaluating on {base.name} is estimated to take {_mb(needed)} MB",
            suggestions=[f"Raise the limit to {_mb(needed)}, or use a smaller base_model"],
        )


def _describe(plan: ComputePlan) -> str:
    measures = ["the base model's weights stay in their file"] if plan.weights == "file" else []
    measures += ["gradient checkpointing is on"] if plan.recompute_layers else []
    return " and ".join(measures)


def _mb(size: int) -> int:
    """Return the size in MB, rounded up: what a limit must be raised to."""
    return -(-size // MB)
