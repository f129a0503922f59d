"""The frozen base as a run was planned to hold it."""

from __future__ import annotations

from pathlib import Path

import structlog
from transformers import PreTrainedModel

from peft_core.compute.base import load_base
from peft_core.compute.device import DevicePlan
from peft_core.compute.frozen import load_frozen
from peft_core.estimate import MAPPED
from peft_core.spec import Base, Execution

_log = structlog.get_logger(__name__)


def load_planned(base: Base, directory: Path, way: Execution, plan: DevicePlan) -> tuple[PreTrainedModel, Execution]:
    """The frozen base on the CPU, in the way that was planned or as a whole where it cannot be had so; and how it is.

    On an accelerator the device's own formats decide. Of most families weights alone are in 16 bits there: what flows between
    layers is float32, as on a CPU, and so they have the same fused blocks.

    Raises:
        BaseModelError: as `load_base`.
    """
    whole = way.model_copy(update={"weights": str(plan.weights).removeprefix("torch."), "repacked_bytes": 0})
    if plan.device != "cpu":
        way = whole
    if way.weights == "float32" or (plan.device != "cpu" and base.model_type not in MAPPED):
        return load_base(directory, plan.weights), whole
    frozen = load_frozen(base, directory, in_bfloat16=way.weights == "bfloat16", repacked_bytes=way.repacked_bytes)
    if frozen is not None:
        return frozen, way
    _log.warning("base_loaded_whole", planned=way.weights, model_type=base.model_type)
    return load_base(directory, plan.weights), whole
