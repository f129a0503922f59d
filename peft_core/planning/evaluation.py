"""Planning of jobs that evaluate one adapter, or compare two, instead of training one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from peft_core.adapters.manifest import Manifest, read_manifest
from peft_core.adapters.verify import verify
from peft_core.config import Settings
from peft_core.errors import InvalidArgument, sanitize
from peft_core.paths import adapter_names
from peft_core.planning.base_check import require_loadable
from peft_core.planning.cost_model import evaluation_estimate
from peft_core.planning.planner import require_memory, require_places, summarise, with_base
from peft_core.retrieval.service import training_code
from peft_core.schemas.base_model import Base
from peft_core.schemas.dataset import DatasetPurpose, SourceKind, SourceSummary, TrainingData
from peft_core.schemas.results import BaseMatch
from peft_core.schemas.task import JobRequest
from peft_core.schemas.training import DataSelection, EvaluatedAdapter, TrainingConfig
from peft_core.system.machine import expected_device


def plan_evaluation(
    evaluated: EvaluatedAdapter,
    evaluation_data: TrainingData,
    base: Base,
    settings: Settings,
    measured_speed: Callable[[Base, str], float | None],
    *,
    selection: DataSelection,
) -> JobRequest:
    """Return the resolved request. An adapter trained here is evaluated with the settings of its training, on the data that
    `selection` selects; of two adapters, with A's seed and the smaller `max_length`.

    Raises:
        InvalidArgument: an adapter does not fit the base model, two adapters cannot be compared, or the data does not exist.
        DataError: the data is empty or too little.
    """
    require_places(DatasetPurpose.EVALUATION.field, evaluation_data, selection.more_sources, settings)
    manifests = {field: read_manifest(path) for field, path in evaluated.paths.items()}
    _require_comparable(evaluated, manifests)
    for field in evaluated.paths:
        _check_fit(evaluated, field, base)
    trained_with = [manifest.run.config for manifest in manifests.values() if manifest] or [TrainingConfig()]
    config = TrainingConfig(
        max_length=min(base.shape.context_length, *(each.max_length for each in trained_with)),
        seed=trained_with[0].seed,
        precision=trained_with[0].precision,
        include=selection.include,
        exclude=selection.exclude,
        more_sources=selection.more_sources,
        skip_unusable_records=selection.skip_unusable_records,
    )
    source = summarise(evaluation_data, config, DatasetPurpose.EVALUATION)
    if source.needs_chat_template and not base.has_chat_template:
        raise InvalidArgument(
            "evaluation_data",
            "records with messages",
            f"the base model {base.name} has no chat template to render conversations with",
        )
    source, config = with_base(source, evaluation_data, config, base, longer_allowed=None)
    if advice := _advice_on_selection(selection, trained_with, source):
        source = source.model_copy(update={"advice": (*source.advice, advice)})
    require_loadable(base)
    device = expected_device("auto")
    speed = measured_speed(base, device)
    has_code = evaluated.compared_with is None and bool(training_code(settings.paths, evaluated.adapter_path))
    adapters = len(evaluated.paths)
    estimate = evaluation_estimate(base, source, device, speed, adapters=adapters, has_training_code=has_code)
    require_memory(estimate.memory_bytes, base, device, settings)
    return JobRequest(
        source=source.path or Path(),
        source_kind=source.kind,
        source_name=source.name,
        more_sources=source.more_sources,
        config=config,
        base=base,
        found=source,
        device=device,
        estimate=estimate,
        evaluated=evaluated,
    )


def _advice_on_selection(
    selection: DataSelection, trained_with: Sequence[TrainingConfig], source: SourceSummary
) -> str:
    """Return what to say where an adapter was trained on a part of a repository, and all code is evaluated."""
    if selection.include or selection.exclude or source.kind is not SourceKind.REPOSITORY:
        return ""
    for config in trained_with:
        given = {"include": config.include, "exclude": config.exclude}
        if patterns := ", ".join(f"{name} = {value}" for name, value in given.items() if value):
            which = "the" if len(trained_with) == 1 else "an"
            return f"All code is evaluated, although {which} adapter was trained with {patterns}"
    return ""


def _require_comparable(evaluated: EvaluatedAdapter, manifests: Mapping[str, Manifest | None]) -> None:
    """Check that two adapters are not the same one, and that they were trained on the same base model, as far as is recorded.

    Raises:
        InvalidArgument: they cannot be compared.
    """
    if evaluated.compared_with is None:
        return
    a, b = adapter_names(list(evaluated.paths.values()))
    if evaluated.adapter_path == evaluated.compared_with:
        raise InvalidArgument(
            "adapter_b",
            str(evaluated.compared_with),
            "it is the same adapter as adapter_a; two different ones must be given",
            suggestions=[
                "Call list_adapters to see the others",
                "Or call evaluate_adapter to compare it with its base model",
            ],
        )
    bases = [manifest.base for manifest in manifests.values() if manifest is not None]
    if len(bases) < len(manifests) or bases[0].fingerprint.same_weights(bases[1].fingerprint):
        return
    names = [sanitize(base.name) for base in bases]
    which = f"{names[0]} and {names[1]}" if names[0] != names[1] else f"different weights called {names[0]}"
    raise InvalidArgument(
        "adapter_b",
        b,
        f"it must have the same base model as {a}, but they were trained on {which}; losses of different base models cannot be "
        "compared",
        suggestions=["Call evaluate_adapter for each of them, which compares it with its own base model"],
        code="different_base_models",
    )


def _check_fit(evaluated: EvaluatedAdapter, field: str, base: Base) -> None:
    """Check that an adapter fits the base model, and was trained on it unless the request accepts that this is unproven.

    Raises:
        InvalidArgument: it does not fit, or nothing proves that it was trained on this base model.
    """
    path = evaluated.paths[field]
    compatibility = verify(path, base)
    if compatibility.verdict is BaseMatch.INCOMPATIBLE:
        errors = [reason for reason in compatibility.reasons if reason.severity == "error"]
        raise InvalidArgument(
            field,
            str(path),
            f"it does not fit {base.name}: {' '.join(reason.message for reason in errors[:3])}",
            suggestions=[reason.fix for reason in errors[:2] if reason.fix]
            or ["Call verify_adapter_compatibility to see every reason"],
        )
    if not compatibility.compatible and not evaluated.accept_unproven_base:
        which = "the adapter" if evaluated.compared_with is None else field
        raise InvalidArgument(
            "base_model",
            base.name,
            f"{which} fits it, but there is no evidence that it was trained on it",
            suggestions=[
                "Give the base model that it was trained on",
                "Or pass accept_unproven_base=true: the evaluation will show whether it belongs to it",
            ],
        )
