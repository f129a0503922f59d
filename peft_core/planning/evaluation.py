"""Planning of jobs that evaluate an adapter instead of training one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft_core.adapters.manifest import read_manifest
from peft_core.adapters.verify import verify
from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.planning.base_check import require_loadable
from peft_core.planning.cost_model import evaluation_estimate
from peft_core.planning.planner import require_memory, require_places, summarise, with_base
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
    `selection` selects.

    Raises:
        InvalidArgument: the adapter does not fit the base model, or the data does not exist.
        DataError: the data is empty or too little.
    """
    require_places(DatasetPurpose.EVALUATION.field, evaluation_data, selection.more_sources, settings)
    _check_fit(evaluated, base)
    manifest = read_manifest(evaluated.adapter_path)
    trained_with = manifest.run.config if manifest is not None else TrainingConfig()
    config = TrainingConfig(
        max_length=min(trained_with.max_length, base.shape.context_length),
        seed=trained_with.seed,
        precision=trained_with.precision,
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
    estimate = evaluation_estimate(base, source, device, measured_speed(base, device))
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


def _advice_on_selection(selection: DataSelection, trained_with: TrainingConfig, source: SourceSummary) -> str:
    """Return what to say where the adapter was trained on a part of a repository, and all code is evaluated."""
    if selection.include or selection.exclude or source.kind is not SourceKind.REPOSITORY:
        return ""
    given = {"include": trained_with.include, "exclude": trained_with.exclude}
    patterns = ", ".join(f"{name} = {value}" for name, value in given.items() if value)
    return f"All code is evaluated, although the adapter was trained with {patterns}" if patterns else ""


def _check_fit(evaluated: EvaluatedAdapter, base: Base) -> None:
    """Check that the adapter fits the base model, and was trained on it unless the request accepts that this is unproven.

    Raises:
        InvalidArgument: it does not fit, or nothing proves that it was trained on this base model.
    """
    compatibility = verify(evaluated.adapter_path, base)
    if compatibility.verdict is BaseMatch.INCOMPATIBLE:
        errors = [reason for reason in compatibility.reasons if reason.severity == "error"]
        raise InvalidArgument(
            "adapter_path",
            str(evaluated.adapter_path),
            f"it does not fit {base.name}: {' '.join(reason.message for reason in errors[:3])}",
            suggestions=[reason.fix for reason in errors[:2] if reason.fix]
            or ["Call verify_adapter_compatibility to see every reason"],
        )
    if not compatibility.compatible and not evaluated.accept_unproven_base:
        raise InvalidArgument(
            "base_model",
            base.name,
            "the adapter fits it, but there is no evidence that it was trained on it",
            suggestions=[
                "Give the base model that it was trained on",
                "Or pass accept_unproven_base=true: the evaluation will show whether it belongs to it",
            ],
        )
