"""The frozen base model of a training, on a device that has been checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
from transformers import PreTrainedModel

from peft_core.config import Settings
from peft_core.devices import records
from peft_core.evaluation.worker.setup import RunData, Session, start_on_cpu
from peft_core.modeling.batches import Document
from peft_core.modeling.device import DevicePlan, release_memory
from peft_core.modeling.load import load_planned, move
from peft_core.modeling.memory import memory_bytes, return_freed_memory
from peft_core.modeling.objective import Objective, probe_fast_paths
from peft_core.planning.cost_model import uses_bf16_blocks
from peft_core.planning.device_check import on_cpu
from peft_core.schemas.device_check import DeviceCheck
from peft_core.schemas.events import DeviceChecked
from peft_core.schemas.results import Phase
from peft_core.schemas.task import ComputePlan
from peft_core.system.failures import describe_error
from peft_core.system.machine import available_memory_bytes, cpu_multiplies_bfloat16
from peft_core.training import device_check

_log = structlog.get_logger(__name__)

NeedsCheck = Callable[[DevicePlan], bool]


@dataclass(frozen=True)
class BaseModel:
    """The loaded base model and how it computes."""

    model: PreTrainedModel
    compute_plan: ComputePlan  # the task's, unless the device has a number format of its own
    uses_bf16_blocks: bool
    objective: Objective

    @property
    def weights_dtype(self) -> str:
        """The number format of the frozen weights. Those that stay in their file are computed with in float32."""
        return "bfloat16" if self.compute_plan.weights == "bfloat16" else "float32"


def is_accelerator(plan: DevicePlan) -> bool:
    return plan.device != "cpu"


def load_on_checked_device(
    session: Session, data: RunData, documents: Sequence[Document], needs_check: NeedsCheck
) -> tuple[Session, BaseModel]:
    """Load the base model. If its device does not compute what the CPU does, load it on the CPU, and return such a session.

    A device that has agreed before, with the same versions and the same way of computing, is not checked again. Nor are those
    of several processes, which would have to decide alike.

    Raises:
        TrainingError: the device may not train, and neither can the CPU.
        BaseCheckpointError: as `load_planned`.
        Cancelled: on request.
    """
    if not needs_check(session.device) or session.accelerator.num_processes > 1:  # each has a device of its own
        return session, load_base_model(session, data)
    base, check = _load_and_check(session, data, documents)
    if check is not None:
        event = DeviceChecked(check=check)
        session.emit(event)
        session = replace(session, device_note=event.note)
        _save(session, check)
    if base is not None and (check is None or check.may_train):
        return session, base
    del base  # frees the device's memory
    with suppress(RuntimeError):
        release_memory(session.accelerator.device)
    return_freed_memory()
    assert check is not None  # noqa: S101 -- without one the base model is there
    session.start_phase(Phase.LOADING_MODEL, f"{check.in_words}; continuing on the CPU")
    request = on_cpu(
        session.task.request,
        check,
        limit_mb=Settings().max_memory_mb,
        available_bytes=available_memory_bytes() + memory_bytes(),
        cpu_bfloat16=cpu_multiplies_bfloat16(),
    )
    session = start_on_cpu(replace(session, task=session.task.model_copy(update={"request": request})))
    return session, load_base_model(session, data)


def load_base_model(session: Session, data: RunData) -> BaseModel:
    """Load the base model onto the session's device, and try the fast paths there."""
    request, max_length = session.task.request, session.task.request.config.max_length
    # kill-point: worker: the base model is about to be loaded
    model, compute_plan = load_planned(request.base, data.base_directory, request.execution, session.device)
    # kill-point: worker: the base model is loaded
    model = move(model, session.accelerator.device)
    uses_bf16 = uses_bf16_blocks(request.config, request.base, compute_plan)
    objective = probe_fast_paths(model, max_length, uses_bf16_blocks=uses_bf16)
    return_freed_memory()
    return BaseModel(model, compute_plan, uses_bf16, objective)


def _load_and_check(
    session: Session, data: RunData, documents: Sequence[Document]
) -> tuple[BaseModel | None, DeviceCheck | None]:
    """Return the base model, None if the device cannot hold it, and the check, None if it is not necessary."""
    try:
        base = load_base_model(session, data)
    except (RuntimeError, MemoryError) as error:
        error.__traceback__ = None  # it keeps what was loaded alive
        return None, device_check.failed(device_check.key_of_session(session), error)
    subject = device_check.Subject(
        session, data.base_directory, base.model, base.objective, base.compute_plan.recompute_layers, documents
    )
    data_dir = _records_of(session)
    if data_dir is not None and records.is_known(data_dir, device_check.key_of(subject)):
        return base, None
    session.start_phase(Phase.LOADING_MODEL, f"comparing {session.device.device} with the CPU, once")
    return base, device_check.check(subject)


def _records_of(session: Session) -> Path | None:
    """Return the data directory that keeps the checks: on a cluster that of the node, which a task from elsewhere lacks."""
    return session.task.data_dir if session.task.request.cluster is None else Settings().data_dir


def _save(session: Session, check: DeviceCheck) -> None:
    if (data_dir := _records_of(session)) is None:
        return
    try:
        records.save(data_dir, check)
    except OSError as error:  # the next training checks again
        _log.warning("device_check_not_saved", reason=describe_error(error))
