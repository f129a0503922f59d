"""Jobs that evaluate an adapter instead of training one: what is checked before, and the page that is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft_core.adapters.manifest import read_manifest
from peft_core.adapters.verify import verify
from peft_core.config import Settings
from peft_core.data.summarise import summarise_source
from peft_core.errors import InvalidArgument
from peft_core.planning.cost_model import evaluation_estimate
from peft_core.planning.planner import TrainingData, require_memory, require_place
from peft_core.schemas.base_model import Base
from peft_core.schemas.dataset import DatasetPurpose
from peft_core.schemas.results import BaseMatch
from peft_core.schemas.task import JobRequest
from peft_core.schemas.training import EvaluatedAdapter, TrainingConfig
from peft_core.system.machine import expected_device


def plan_evaluation(
    evaluated: EvaluatedAdapter,
    evaluation_data: TrainingData,
    base: Base,
    settings: Settings,
    measured_speed: Callable[[Base, str], float | None],
) -> JobRequest:
    """The resolved request; what an adapter of ours was trained with decides how text is cut and split.

    Raises:
        InvalidArgument: the adapter does not fit the base, or the data is not there.
        DataError: the data is empty or too little.
    """
    require_place(DatasetPurpose.EVALUATION.field, evaluation_data, settings)
    _require_fit(evaluated, base)
    manifest = read_manifest(evaluated.adapter_path)
    used = manifest.run.config if manifest is not None else TrainingConfig()
    config = TrainingConfig(
        max_length=min(used.max_length, base.shape.context_length),
        seed=used.seed,
        precision=used.precision,
    )
    found = summarise_source(evaluation_data, max_length=config.max_length, purpose=DatasetPurpose.EVALUATION)
    if found.needs_chat_template and not base.has_chat_template:
        raise InvalidArgument(
            "evaluation_data",
            "records with messages",
            f"the base {base.name} has no chat template to write them in",
        )
    device = expected_device("auto")
    estimate = evaluation_estimate(base, found, device, measured_speed(base, device))
    require_memory(estimate.memory_bytes, base, device, settings)
    return JobRequest(
        source=found.path or Path(),
        source_kind=found.kind,
        config=config,
        base=base,
        found=found,
        device=device,
        estimate=estimate,
        evaluated=evaluated,
    )


def _require_fit(evaluated: EvaluatedAdapter, base: Base) -> None:
    found = verify(evaluated.adapter_path, base)
    if found.verdict is BaseMatch.INCOMPATIBLE:
        wrong = [reason for reason in found.reasons if reason.severity == "error"]
        raise InvalidArgument(
            "adapter_path",
            str(evaluated.adapter_path),
            f"it does not fit {base.name}: {' '.join(reason.message for reason in wrong[:3])}",
            suggestions=[reason.fix for reason in wrong[:2] if reason.fix]
            or ["Call verify_adapter_compatibility to see every reason"],
        )
    if not found.compatible and not evaluated.accept_unproven_base:
        raise InvalidArgument(
            "base_model",
            base.name,
            "the adapter fits it, and nothing proves that it was trained on it",
            suggestions=[
                "Name the base that it was trained on",
                "Or insist with accept_unproven_base=true: the figures will show whether it belongs",
            ],
        )
