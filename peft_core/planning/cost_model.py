"""What a run will take, before it runs: steps, seconds, bytes. Arithmetic on sizes; no torch.

Constants were measured with the bundled 135M base on a CPU (benchmarks/training_speed.py); they scale by the
arithmetic of the architecture. A finished run on the same base and device replaces the guess of the speed.
"""

from __future__ import annotations

import math
import os

from peft_core.schemas.base_model import Base, ModelShape
from peft_core.schemas.dataset import SourceSummary
from peft_core.schemas.results import Estimate
from peft_core.schemas.task import ComputePlan
from peft_core.schemas.training import TrainingConfig

TOKENS_PER_EXAMPLE = 235  # mean of 9700 code units at max_length 512, of 480 files drawn from 20 000 Python files
# Useful rates in training, per core: half of what was measured on servers' cores, which few others reach.
CPU_FLOPS_PER_CORE = {"float32": 30e9, "bfloat16": 60e9}
PROCESS_BYTES = 420 << 20  # Python with torch, transformers and peft
# Processed at once, unless one document has more. In float32 on a CPU more are no faster, and take 0.9 GB more (512 against a
# whole step); CUDA wants more work at a time; on MPS attention keeps a number for each pair of them.
MICRO_TOKENS = {"cpu": 512, "mps": 512, "cuda": 4096}
# Of blocks computed in bfloat16, which keep half as much of each: a twentieth faster than 512, in 0.1 GB more.
NARROW_MICRO_TOKENS = 704
KERNELS_BYTES = 40 << 20  # oneDNN's programs for products in bfloat16
_HOLES = {"cpu": 3, "mps": 8, "cuda": 10}  # what is kept costs one in so many more, between blocks of many lengths
_HOLES_IN_BFLOAT16 = 2  # the same on a CPU: of the bundled base the heap holds 110 to 150 MB that it does not use
UNPACKED_BYTES = 32 << 20  # of weights that stay in their file, a few at a time
# Whose logits are held at once, by the type that the head is computed with: more were no faster.
LOSS_POSITIONS = {"float32": 192, "bfloat16": 256}
# At once on a CPU, of a head computed in bfloat16: what passes over them finds them in a cache.
LOGITS_IN_FLOAT32 = 1 << 20
MEASURED_EXAMPLES = 200  # held-out ones, at most
GENERAL_TOKENS = 2600  # of code that belongs to no project
COMPLETION_BUDGET = 12_000 + GENERAL_TOKENS  # that a model reads and writes from prompts, at most


def estimate(
    config: TrainingConfig,
    base: Base,
    source: SourceSummary,
    device: str,
    execution: ComputePlan,
    *,
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
    held_out_tokens = min(source.estimated_tokens * config.held_out_fraction, MEASURED_EXAMPLES * TOKENS_PER_EXAMPLE)

    narrow = uses_bf16_blocks(config, base, execution)
    rate, basis = tokens_per_second(base, device, measured_tokens_per_second, uses_bf16_blocks=narrow)
    # Measuring the held-out loss is a forward pass, a third of a training step: twice, and as much again in between. Writing
    # from prompts is a tenth of the training at most, and little of a long one.
    written = 2 / 3 * min(COMPLETION_BUDGET, 0.15 * tokens + GENERAL_TOKENS)
    seconds = None if rate is None else 15 + (tokens + held_out_tokens + written) / rate
    return Estimate(
        train_tokens=round(tokens),
        steps=steps,
        seconds=None if seconds is None else round(seconds, 1),
        memory_bytes=memory_bytes(config, base, device, execution),
        basis=basis,
    )


def evaluation_estimate(
    base: Base,
    source: SourceSummary,
    device: str,
    *,
    measured_tokens_per_second: float | None = None,
) -> Estimate:
    """Of base and adapter on the same text: each a forward pass, a third of a training step."""
    tokens = 2 * (min(source.estimated_tokens, MEASURED_EXAMPLES * TOKENS_PER_EXAMPLE) + COMPLETION_BUDGET)
    rate, basis = tokens_per_second(base, device, measured_tokens_per_second)
    return Estimate(
        train_tokens=0,
        steps=0,
        seconds=None if rate is None else round(20 + tokens / 3 / rate, 1),
        memory_bytes=inference_memory_bytes(base.shape, device),
        basis=basis,
    )


def tokens_per_second(
    base: Base,
    device: str,
    measured: float | None,
    *,
    uses_bf16_blocks: bool = False,
) -> tuple[float | None, str]:
    """The rate to reckon with, None where nothing is known; and where it comes from, in words."""
    if measured:
        return measured, "speed of your last run on this base and device"
    if device == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        rate = cores * CPU_FLOPS_PER_CORE["bfloat16" if uses_bf16_blocks else "float32"] / flops_per_token(base.shape)
        return rate, f"rule of thumb for {cores} CPU cores; the status shows the measured speed"
    return None, f"no run on this base and {device} yet; the status shows the measured speed"


def flops_per_token(shape: ModelShape) -> float:
    """Of one training token: forward and the gradient of the input; frozen weights have no gradient of their own.

    2 flops a weight forward, 2 backward; attention and the LoRA matrices are about a tenth on top.
    """
    return 4.4 * shape.parameters


# Families (`model_type`) whose every weight can stay in its file, or be held in bfloat16. A test builds one of each.
MAPPED = frozenset(
    [
        "arcee",
        "cohere",
        "ernie4_5",
        "exaone4",
        "glm",
        "glm4",
        "gpt_neox",
        "granite",
        "helium",
        "llama",
        "mistral",
        "olmo",
        "olmo2",
        "phi",
        "phi3",
        "qwen2",
        "qwen3",
        "seed_oss",
        "smollm3",
        "stablelm",
        "starcoder2",
    ],
)
# Of these, whose blocks compute as `training.functions` has them, with the logits in chunks: what they keep is known.
FUSED = frozenset({"llama", "mistral", "qwen2", "qwen3"})
_NORMED_HEADS = frozenset({"qwen3"})  # queries and keys are kept before and after their norms


def compute_plans(config: TrainingConfig, base: Base, device: str, *, cpu_bfloat16: bool) -> list[ComputePlan]:
    """Ways to compute a run, the fastest first."""
    if device != "cpu" or base.model_type not in MAPPED:
        return [ComputePlan(), ComputePlan(recompute_layers=True)]
    ways = [ComputePlan(weights="file"), ComputePlan(weights="file", recompute_layers=True)]
    if cpu_bfloat16 and config.precision == "auto":
        return [ComputePlan(weights="bfloat16"), ComputePlan(weights="bfloat16", recompute_layers=True), *ways]
    return [ComputePlan(), *ways]


def memory_bytes(config: TrainingConfig, base: Base, device: str, execution: ComputePlan) -> int:
    """Estimated peak of the training process, on a CPU; of what torch takes of the device's memory, elsewhere.

    For the families of FUSED near what they take; for others what they take at most.
    """
    shape = base.shape
    narrow = execution.weights == "bfloat16" or (device != "cpu" and config.precision == "auto")
    weights = {
        "float32": 4 * shape.parameters,
        "bfloat16": 2 * shape.parameters
        + (0 if device == "mps" else lora_concat_bytes(config.rank, shape))
        + (KERNELS_BYTES if device == "cpu" else 0),
        "file": base.size_bytes + UNPACKED_BYTES,
    }["bfloat16" if narrow else execution.weights]
    if device == "cpu" and base.model_type not in MAPPED and base.size_bytes < 3 * shape.parameters:
        weights += base.size_bytes  # its file, of 16 bits a weight, is mapped while it becomes float32
    known = base.model_type in FUSED
    kept_per_token = activation_bytes(config, base, device, narrow=narrow)
    capacity = micro_capacity(config.max_length, device, uses_bf16_blocks=uses_bf16_blocks(config, base, execution))
    micro_tokens = min(capacity, config.batch_size * config.max_length)
    pairs = shape.heads * micro_tokens**2 if device == "mps" else 0  # in float32, as its attention has no own backward
    per_layer = micro_tokens * kept_per_token + 4 * pairs
    kept = shape.layers * per_layer
    if execution.recompute_layers:
        kept = per_layer + shape.layers * micro_tokens * 4 * shape.hidden_size
    holes = kept // (_HOLES_IN_BFLOAT16 if narrow and device == "cpu" else _HOLES[device])
    temporary = micro_tokens * 4 * 6 * shape.intermediate_size
    if narrow:
        positions = LOSS_POSITIONS["bfloat16"]
        logits = 2 * positions * shape.vocab_size
        logits += 4 * (max(LOGITS_IN_FLOAT32, shape.vocab_size) if device == "cpu" else positions * shape.vocab_size)
    else:
        logits = 4 * LOSS_POSITIONS["float32"] * shape.vocab_size
    if not known:  # a head that does more than a product is computed as a whole: logits, two copies, their gradient
        logits = max(logits, 4 * 4 * micro_tokens * shape.vocab_size)
    return round(
        (0 if device == "cuda" else PROCESS_BYTES)  # MPS has the process's own memory
        + weights
        + kept
        + holes
        + (temporary + logits if known else max(temporary, logits))  # room for the logits of a chunk stays
        # Weights, gradients, two Adam moments, the best weights.
        + lora_parameters(config.rank, shape) * 4 * 5,
    )


def activation_bytes(config: TrainingConfig, base: Base, device: str, *, narrow: bool) -> int:
    """What a layer keeps of a token until its gradients are computed. `narrow`: products are computed in 16 bits."""
    shape = base.shape
    known = base.model_type in FUSED
    if device == "mps" or config.dropout or not known:
        in_16_bits = (
            narrow and device == "cpu"
        )  # on accelerators, what flows between layers that are not fused is float32
        per_token = (2 if in_16_bits else 4) * (14 * shape.hidden_size + 6 * shape.intermediate_size)
        return per_token if known else 2 * per_token
    # Its two inputs, queries, keys, values, the attention's result, gate and up; A x of each.
    numbers = 2 * (shape.hidden_size + shape.query_size + shape.kv_size + shape.intermediate_size) + 7 * config.rank
    numbers += shape.query_size + 2 * shape.kv_size if base.model_type in _NORMED_HEADS else 0
    return (2 if narrow else 4) * numbers


def lora_concat_bytes(rank: int, shape: ModelShape) -> int:
    """Of the columns that stand beside the weights for LoRA's B (`training/projections.py`)."""
    attention = 3 * (shape.query_size + 2 * shape.kv_size) + shape.hidden_size
    mlp = 2 * 2 * shape.intermediate_size + shape.hidden_size
    return 2 * shape.layers * rank * (attention + mlp)


def uses_bf16_blocks(config: TrainingConfig, base: Base, execution: ComputePlan) -> bool:
    """Whether whole blocks are computed in bfloat16 on a CPU."""
    return execution.weights == "bfloat16" and base.model_type in FUSED and not config.dropout


def micro_capacity(max_length: int, device: str, *, uses_bf16_blocks: bool = False) -> int:
    """Tokens of one micro-batch at most; the longest document always fits."""
    return max(NARROW_MICRO_TOKENS if device == "cpu" and uses_bf16_blocks else MICRO_TOKENS[device], max_length)


def inference_memory_bytes(shape: ModelShape, device: str) -> int:
    """Estimated memory of the inference process with one base and a few adapters; of the device's memory elsewhere."""
    weight_bytes = 4 if device == "cpu" else 2
    cache = 2 * shape.layers * shape.kv_size * 2048 * weight_bytes
    return PROCESS_BYTES + shape.parameters * weight_bytes + cache + 4 * lora_parameters(32, shape)


def lora_parameters(rank: int, shape: ModelShape) -> int:
    """Of an adapter on all linear layers."""
    if shape.linear_features is not None:
        return rank * shape.linear_features
    attention = 2 * (shape.hidden_size + shape.query_size) + 2 * (shape.hidden_size + shape.kv_size)
    mlp = 3 * (shape.hidden_size + shape.intermediate_size)
    return rank * shape.layers * (attention + mlp)
