"""What a run will take, before it runs: steps, seconds, bytes. Arithmetic on sizes; no torch.

Constants were measured with the bundled 135M base on a CPU (benchmarks/training_speed.py); they scale by the
arithmetic of the architecture. A finished run on the same base and device replaces the guess of the speed.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from pathlib import Path

from peft_core.results import Estimate
from peft_core.spec import Base, ModelShape, SourceSummary, TrainingConfig, WeightsIn

TOKENS_PER_EXAMPLE = 200  # mean of code units at max_length 512
CPU_FLOPS_PER_CORE = 30e9  # useful float32 rate in training, per core
PROCESS_BYTES = 420 << 20  # Python with torch, transformers and peft
MICRO_TOKENS = 512


def expected_device(requested: str) -> str:
    """The device that training will most likely take; the training process decides, with torch at hand."""
    if requested != "auto":
        return requested
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mps"
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def estimate(
    config: TrainingConfig,
    base: Base,
    source: SourceSummary,
    device: str,
    measured_tokens_per_second: float | None = None,
) -> Estimate:
    """`measured_tokens_per_second`: of an earlier run on this base and device, where there was one."""
    share = 1 - config.held_out_fraction
    tokens = source.estimated_tokens * share
    examples = max(1.0, source.examples * share if source.examples is not None else tokens / TOKENS_PER_EXAMPLE)
    if config.max_steps is not None:
        steps = config.max_steps
        tokens = tokens / examples * config.batch_size * steps
    else:
        epochs = config.num_epochs or 1.0
        steps = max(1, math.ceil(examples * epochs / config.batch_size))
        tokens *= epochs
    held_out_tokens = min(source.estimated_tokens * config.held_out_fraction, 200 * TOKENS_PER_EXAMPLE)

    rate: float | None
    if measured_tokens_per_second:
        rate, basis = measured_tokens_per_second, "speed of your last run on this base and device"
    elif device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        rate = cores * CPU_FLOPS_PER_CORE / flops_per_token(base.shape)
        basis = f"rule of thumb for {cores} CPU cores; the status shows the measured speed"
    else:
        rate, basis = None, f"no run on this base and {device} yet; the status shows the measured speed"
    # Measuring the held-out loss is a forward pass, a third of a training step: twice, and as much again in between.
    seconds = None if rate is None else 15 + (tokens + held_out_tokens) / rate
    return Estimate(
        train_tokens=round(tokens),
        steps=steps,
        seconds=None if seconds is None else round(seconds, 1),
        memory_bytes=memory_bytes(config, base, device),
        basis=basis,
    )


def flops_per_token(shape: ModelShape) -> float:
    """Of one training token: forward and the gradient of the input; frozen weights have no gradient of their own.

    2 flops a weight forward, 2 backward; attention and the LoRA matrices are about a tenth on top.
    """
    return 4.4 * shape.parameters


def smallest_memory_bytes(base: Base, device: str) -> int:
    """What no setting but another base gets below."""
    smallest = TrainingConfig(rank=1, max_length=64)
    return min(memory_bytes(smallest, base, device, weights_in) for weights_in in ("memory", "file"))


def memory_bytes(config: TrainingConfig, base: Base, device: str, weights_in: WeightsIn = "memory") -> int:
    """Estimated peak of the training process, on CPU; of the device's memory elsewhere, where all weights are in it."""
    shape = base.shape
    weight_bytes = 4 if device == "cpu" else 2
    micro_tokens = max(MICRO_TOKENS, config.max_length)
    # Per token and layer, in units of the hidden and the intermediate size. Fused layers keep half as much for backward.
    hidden, intermediate = (8, 3.5) if device == "cpu" and config.dropout == 0 else (14, 6)
    saved_per_token = (
        shape.layers * (hidden * shape.hidden_size + intermediate * shape.intermediate_size) * weight_bytes
    )
    logits = 256 * shape.vocab_size * 4 * 2
    unpacked, head = shape.parameters * weight_bytes, shape.vocab_size * shape.hidden_size * 4
    return round(
        PROCESS_BYTES
        + (unpacked if device != "cpu" or weights_in == "memory" else base.size_bytes + head)
        + micro_tokens * saved_per_token
        + logits
        # Weights, gradients, two Adam moments, the best weights; weights and moments of the last good state.
        + lora_parameters(config.rank, shape) * 4 * 8
    )


def inference_memory_bytes(shape: ModelShape, device: str) -> int:
    """Estimated memory of the inference process with one base and a few adapters; of the device's memory elsewhere."""
    weight_bytes = 4 if device == "cpu" else 2
    cache = 2 * shape.layers * shape.hidden_size // shape.heads * shape.kv_heads * 2048 * weight_bytes
    return PROCESS_BYTES + shape.parameters * weight_bytes + cache + 4 * lora_parameters(32, shape)


def lora_parameters(rank: int, shape: ModelShape) -> int:
    """Of an adapter on all linear layers of a Llama-like block."""
    kv_size = shape.hidden_size // shape.heads * shape.kv_heads
    attention = 2 * (shape.hidden_size + shape.hidden_size) + 2 * (shape.hidden_size + kv_size)
    mlp = 3 * (shape.hidden_size + shape.intermediate_size)
    return rank * shape.layers * (attention + mlp)
