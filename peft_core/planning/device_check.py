"""What checking an accelerator takes, and how a run continues on the CPU when the check fails. Arithmetic, without torch."""

from __future__ import annotations

from typing import NamedTuple

from peft_core.base_models.families import FAMILIES
from peft_core.errors import TrainingError
from peft_core.planning.cost_model import (
    CPU_FLOPS_PER_CORE,
    PROCESS_BYTES,
    compute_plans,
    flops_per_token,
    lora_parameters,
    memory_bytes,
    training_speed,
    uses_bf16_blocks,
)
from peft_core.schemas.base_model import Base
from peft_core.schemas.device_check import DeviceCheck
from peft_core.schemas.task import ComputePlan, JobRequest
from peft_core.schemas.training import TrainingConfig

DOCUMENTS = 2  # compared, so that packed documents that attend to each other are found
_DOCUMENT_TOKENS = (128, 64, 32)  # of each, the most that the time allows
_MOST_SECONDS = 60.0  # of the CPU
_PASSES = 2  # in float32, and with products rounded as on the device
_LEAST_LAYERS = 2
# Longer trainings on a CPU are asked about before they begin; a run that was planned for a GPU has not been.
_LONGEST_ON_CPU_S = 3600.0


class Effort(NamedTuple):
    """How much of the model and of the data the CPU computes."""

    document_tokens: int
    layers: int
    skipped: str = ""  # why nothing is compared, as a clause


def plan_effort(base: Base, config: TrainingConfig, *, cores: int, available_bytes: int) -> Effort:
    """Return the most that the CPU computes within a minute and the memory.

    `available_bytes`: memory that the process may still take. Models of `FAMILIES` stay in their file, and can be compared in
    their first layers only; others are held in float32, complete.
    """
    shape = base.shape
    for tokens in _DOCUMENT_TOKENS:
        seconds = _seconds(base, DOCUMENTS * tokens, cores)
        is_last = tokens == _DOCUMENT_TOKENS[-1]
        needed = _reference_bytes(config, base, tokens)
        if (seconds > _MOST_SECONDS or needed > available_bytes) and not is_last:
            continue
        if needed > available_bytes:
            sizes = f"{needed / 1e9:.1f} GB of memory for it, and has {available_bytes / 1e9:.1f} GB"
            return Effort(0, 0, f"the CPU needs {sizes}")
        if seconds <= _MOST_SECONDS:
            return Effort(tokens, shape.layers)
        layers = int(shape.layers * _MOST_SECONDS / seconds)
        if base.model_type not in FAMILIES or layers < _LEAST_LAYERS:
            return Effort(0, 0, f"the CPU would take about {seconds / 60:.0f} minutes for {DOCUMENTS * tokens} tokens")
        return Effort(tokens, layers)
    raise AssertionError  # the last number of tokens always returns


def _seconds(base: Base, tokens: int, cores: int) -> float:
    return _PASSES * flops_per_token(base.shape) * tokens / (cores * CPU_FLOPS_PER_CORE["float32"])


def _reference_bytes(config: TrainingConfig, base: Base, tokens: int) -> int:
    """Return what the CPU's copy takes beside the process, which runs already."""
    short = config.model_copy(update={"max_length": tokens, "batch_size": 1})  # one document at a time
    if base.model_type not in FAMILIES:
        return memory_bytes(short, base, "cpu", ComputePlan()) - PROCESS_BYTES
    # The kernel can drop pages of the mapped file. Weights that are rounded to bf16 for the device are copied.
    copied = 2 * base.shape.parameters
    return memory_bytes(short, base, "cpu", ComputePlan(weights="file")) - PROCESS_BYTES - base.size_bytes + copied


def expected_device_bytes(request: JobRequest) -> int:
    """Return what a device is expected to hold during one micro-batch of the largest size: the estimate without optimiser."""
    config, base = request.config, request.base
    return memory_bytes(config, base, request.device, request.execution) - _beside_a_micro_batch(request)


def why_too_large(request: JobRequest, measured: int, *, limit_mb: int | None, recommended_bytes: int | None) -> str:
    """Return as a clause why a run must not use a device of which its largest micro-batch takes `measured` bytes, "" if it may.

    `limit_mb`: that of the user's settings; the request may have one too. `recommended_bytes`: the most that should be taken of
    a device which shares the computer's memory: beyond that, all programs become slow. A device with memory of its own needs
    no such limit, because smaller micro-batches follow when it is full.
    """
    limits = [
        (f"the limit max_memory_mb is {limit} MB", limit * 1_000_000)
        for limit in (limit_mb, request.config.max_memory_mb)
        if limit is not None
    ]
    if recommended_bytes is not None:
        limits.append((f"the system recommends at most {recommended_bytes / 1e9:.2f} GB", recommended_bytes))
    needed = measured + _beside_a_micro_batch(request)
    name, least = min(limits, key=lambda limit: limit[1], default=("", needed))
    return f"the run takes {needed / 1e9:.2f} GB, and {name}" if needed > least else ""


def _beside_a_micro_batch(request: JobRequest) -> int:
    """Return what the estimate counts beside the device's memory during a micro-batch."""
    after_a_step = (
        3 * 4 * lora_parameters(request.config.lora_rank, request.base.shape)
    )  # Adam's moments, the best weights
    return after_a_step + (PROCESS_BYTES if request.device == "mps" else 0)  # which shares one memory with the process


def on_cpu(
    request: JobRequest, check: DeviceCheck, *, limit_mb: int | None, available_bytes: int, cpu_bfloat16: bool
) -> JobRequest:
    """Return the request as it is computed on the CPU, by the fastest plan that fits.

    `limit_mb`: that of the user's settings; the request may have one too. `available_bytes`: memory that the process may
    take, or has taken already.

    Raises:
        TrainingError: the CPU has too little memory, or would take so long that the person has to agree first.
    """
    config, base = request.config, request.base
    limits = [limit * 1_000_000 for limit in (limit_mb, config.max_memory_mb) if limit is not None]
    most = min([available_bytes, *limits])
    sizes = [(memory_bytes(config, base, "cpu", plan), plan) for plan in _plans(request, cpu_bfloat16=cpu_bfloat16)]
    fitting = next(((size, plan) for size, plan in sizes if size <= most), None)
    if fitting is None:
        least = min(size for size, _ in sizes)
        raise _not_on_cpu(
            check,
            f"the CPU needs {least / 1e9:.1f} GB of memory for this training, and may take {most / 1e9:.1f} GB",
            "Close other programs, or use a smaller base_model, and train again",
        )
    size, plan = fitting
    speed = training_speed(base, "cpu", None, uses_bf16_blocks=uses_bf16_blocks(config, base, plan))
    seconds = speed.seconds(request.estimate.train_tokens)
    if seconds is not None and seconds > _LONGEST_ON_CPU_S and config.max_minutes is None:
        raise _not_on_cpu(
            check,
            f"the CPU would take about {seconds / 3600:.1f} hours",
            "Call train_adapter with config.device='cpu' if that is acceptable, or with fewer max_steps",
        )
    estimate = request.estimate.model_copy(
        update={"memory_bytes": size, "seconds": seconds, "basis": f"{speed.basis}; {check.in_words}"}
    )
    return request.model_copy(update={"device": "cpu", "execution": plan, "estimate": estimate})


def _plans(request: JobRequest, *, cpu_bfloat16: bool) -> list[ComputePlan]:
    return compute_plans(request.config, request.base, "cpu", cpu_bfloat16=cpu_bfloat16)


def _not_on_cpu(check: DeviceCheck, obstacle: str, advice: str) -> TrainingError:
    return TrainingError(
        f"The training cannot use {check.key.device}: {check.in_words}. It cannot continue on the CPU either: {obstacle}.",
        code="device_check_failed",
        suggestions=[advice, "`peft-mcp doctor --report FILE` writes a report of the check to send"],
        details={"device": check.key.device, "outcome": check.outcome},
    )
