"""What a node of a cluster says about itself. This runs in a Ray task on the node, called by `probe.py`."""

from __future__ import annotations

import os
from typing import Any

from peft_core.cluster.bases import locate
from peft_core.config import Settings
from peft_core.errors import PeftMcpError
from peft_core.schemas.base_model import Base
from peft_core.schemas.machine import MachineAnswer, MachineRequest
from peft_core.system.child_process import run_json_child
from peft_core.system.machine import (
    cpu_multiplies_bfloat16,
    usable_cores,
)

_HIDES_GPUS = "CUDA_VISIBLE_DEVICES"  # Ray hides all GPUs from a task that reserves none
_TIMEOUT_S = 80.0


def describe(wanted: tuple[str, str] | None, *, with_device: bool) -> dict[str, Any]:
    """Return the fields of a `ClusterNode` that only the node itself knows.

    `wanted`: a base model as JSON, and its identity.
    """
    facts: dict[str, Any] = {
        "cores": usable_cores(),
        "cpu_bfloat16": cpu_multiplies_bfloat16(),
    }
    if wanted is not None:
        base = Base.model_validate_json(wanted[0])
        facts["has_base"] = locate(base, wanted[1], Settings()) is not None
    if with_device:
        facts |= _device()
    return facts


def _device() -> dict[str, Any]:
    hidden = os.environ.pop(_HIDES_GPUS, None)
    try:
        answer = run_json_child(
            "peft_core.modeling.describe_machine",
            MachineRequest(),
            MachineAnswer,
            timeout_s=_TIMEOUT_S,
            action="Asking torch what it computes on",
            on_timeout=["Restart the node"],
        )
    except PeftMcpError as error:
        return {"error": error.message}
    finally:
        if hidden is not None:
            os.environ[_HIDES_GPUS] = hidden
    return {
        "device": answer.device,
        "device_name": answer.device_name,
        "device_memory_bytes": answer.device_memory_bytes,
    }
