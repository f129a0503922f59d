"""What a job will take, before it runs: steps, seconds, bytes. This is arithmetic on sizes, without torch.

The constants were measured with the bundled 135M base model on a CPU (benchmarks/training_speed.py); they scale with the
architecture. A finished run on the same base model and device replaces the estimate of the speed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from peft_core.base_models.families import FAMILIES, has_fused_blocks, has_head_norms
from peft_core.planning.evaluation_budget import EvaluationBudget, budget_after_training, budget_of_evaluation
from peft_core.schemas.base_model import Base, ModelShape
from peft_core.schemas.dataset import SourceSummary, TrainingSetSize
from peft_core.schemas.results import Estimate
from peft_core.schemas.task import ComputePlan
from peft_core.schemas.training import TrainingConfig
from peft_core.system.machine import usable_cores

TOKENS_PER_EXAMPLE = 235  # mean of 9700 code units at max_length 512, from 480 of 20 000 Python files
# Useful speed in training per core: half of what was measured on server cores, which few other machines reach.
CPU_FLOPS_PER_CORE = {"float32": 30e9, "bfloat16": 60e9}
PROCESS_BYTES = 420 << 20  # Python with torch, transformers and peft
# Tokens of one micro-batch, unless a single document is longer. In float32 on a CPU, larger micro-batches are not faster and
# take up to 0.9 GB more; CUDA needs more work at a time; on MPS, attention stores a number for each pair of tokens.
MICRO_TOKENS = {"cpu": 512, "mps": 512, "cuda": 4096}
# Blocks computed in bf16 store half as much per token; 704 tokens are 5 % faster than 512, for 0.1 GB more.
BF16_MICRO_TOKENS = 704
KERNELS_BYTES = 40 << 20  # compiled kernels of oneDNN for bf16 products
# Fragmentation of the heap by blocks of many lengths: one byte is lost for every so many bytes of activations.
_FRAGMENTATION_DIVISOR = {"cpu": 3, "mps": 8, "cuda": 10}
_BF16_FRAGMENTATION_DIVISOR = 2  # on a CPU; with the bundled base model, 110 to 150 MB of the heap stay unused
UNPACKED_BYTES = 32 << 20  # weights that stay in their file are dequantised a few at a time
# Positions whose logits are held at a time, by the number format of the LM head; more were not faster.
LOSS_POSITIONS = {"float32": 192, "bfloat16": 256}
# Logits of a bf16 head that are converted to float32 at a time on a CPU, so that they stay in the cache.
LOGITS_IN_FLOAT32 = 1 << 20
MAX_HELD_OUT_EXAMPLES = 200
GENERAL_TOKENS = 2600  # code from the standard library, which shows what the adapter forgets
ADAM_COPIES = 5  # adapter weights, gradients, two Adam moments, the best weights


# --- Plans -----------------------------------------------------------------------------------------------------------------


def compute_plans(config: TrainingConfig, base: Base, device: str, *, cpu_bfloat16: bool) -> list[ComputePlan]:
    """Return the plans that can compute a run, the fastest first."""
    if device != "cpu" or base.model_type not in FAMILIES:
        return [ComputePlan(), ComputePlan(recompute_layers=True)]
    from_file = [ComputePlan(weights="file"), ComputePlan(weights="file", recompute_layers=True)]
    if cpu_bfloat16 and config.precision == "auto":
        return [ComputePlan(weights="bfloat16"), ComputePlan(weights="bfloat16", recompute_layers=True), *from_file]
    return [ComputePlan(), *from_file]


def uses_bf16_blocks(config: TrainingConfig, base: Base, plan: ComputePlan) -> bool:
    """Return whether complete transformer blocks are computed in bf16 on a CPU."""
    return plan.weights == "bfloat16" and has_fused_blocks(base.model_type) and not config.dropout


def micro_capacity(max_length: int, device: str, *, uses_bf16_blocks: bool = False) -> int:
    """Return the most tokens of one micro-batch. The longest document always fits."""
    return max(BF16_MICRO_TOKENS if device == "cpu" and uses_bf16_blocks else MICRO_TOKENS[device], max_length)


# --- Time ------------------------------------------------------------------------------------------------------------------


class Speed(NamedTuple):
    """Training speed to plan with."""

    tokens_per_second: float | None  # None: unknown
    basis: str  # where the figure comes from, in words

    def seconds(self, tokens: float) -> float | None:
        return None if self.tokens_per_second is None else tokens / self.tokens_per_second


class CostedPlan(NamedTuple):
    """A compute plan with what it costs."""

    plan: ComputePlan
    memory_bytes: int
    speed: Speed
    reason: str = ""  # why a slower plan than the fastest was chosen, as the end of a sentence

    def because(self, reason: str) -> CostedPlan:
        return self._replace(reason=reason)


def training_speed(
    base: Base, device: str, measured: float | None, *, uses_bf16_blocks: bool = False, cores: int | None = None
) -> Speed:
    """Return the expected speed.

    `measured`: tokens per second of an earlier run on this base model and device. `cores`: physical ones; None: those of this
    machine.
    """
    if measured:
        return Speed(measured, "speed of your last run on this base and device")
    if device == "cpu":
        cores = cores or usable_cores()
        flops = cores * CPU_FLOPS_PER_CORE["bfloat16" if uses_bf16_blocks else "float32"]
        basis = f"rule of thumb for {cores} CPU cores; the status shows the measured speed"
        return Speed(flops / flops_per_token(base.shape), basis)
    return Speed(None, f"no run on this base and {device} yet; the status shows the measured speed")


class MeasuredRun(NamedTuple):
    """The speed of an earlier run on one device."""

    base_model: str  # its name
    shape: ModelShape
    tokens_per_second: float


def scaled_speed(run: MeasuredRun, shape: ModelShape) -> Speed:
    """Return the speed that a run on another base model of the same device suggests, by the work for each token.

    A larger base model uses a device better than a smaller one does, so this is too low for it, and too high for a smaller one.
    """
    speed = run.tokens_per_second * flops_per_token(run.shape) / flops_per_token(shape)
    return Speed(speed, f"by size, from the speed of your last run on this device, with {run.base_model}")


def flops_per_token(shape: ModelShape) -> float:
    """Return the work for one training token: forward, and the gradient of the input. Frozen weights have no gradient.

    2 flops per weight forward and 2 backward; attention and the LoRA matrices add about a tenth.
    """
    return 4.4 * shape.parameters


def training_set(source: SourceSummary, held_out_fraction: float) -> TrainingSetSize:
    """Return what of a source will be trained on: what its files were cut into, and its records."""
    code = source.training_set or TrainingSetSize(examples=0, tokens=0)
    rest = source.cut_records
    if source.training_set is None and not rest:  # nothing was cut
        rest = source.examples or math.ceil(source.estimated_tokens / TOKENS_PER_EXAMPLE)
    examples, tokens = code.examples, code.tokens
    if rest:
        share = 1 - min(held_out_fraction, MAX_HELD_OUT_EXAMPLES / rest)
        tokens_of_code = tokens / (1 - held_out_fraction) if held_out_fraction < 1 else 0.0
        examples += round(rest * share)
        tokens += round(max(0.0, source.estimated_tokens - tokens_of_code) * share)
    return TrainingSetSize(examples=max(1, examples), tokens=max(1, tokens))


def steps_of(examples: int, epochs: float, batch_size: int) -> int:
    """Return how many optimiser steps these passes over the examples take."""
    return max(1, math.ceil(examples * epochs / batch_size))


def estimate(config: TrainingConfig, source: SourceSummary, compute: CostedPlan, chosen: str = "") -> Estimate:
    """Return what a training takes. `chosen`: which defaults were chosen, and why."""
    train = training_set(source, config.held_out_fraction)
    if config.max_steps is not None:
        steps = config.max_steps
        tokens = train.tokens / train.examples * config.batch_size * steps
    else:
        epochs = config.num_epochs or 1.0
        steps = steps_of(train.examples, epochs, config.batch_size)
        tokens = train.tokens * epochs
    held_out_tokens = min(
        source.estimated_tokens * config.held_out_fraction, MAX_HELD_OUT_EXAMPLES * TOKENS_PER_EXAMPLE
    )
    # A held-out measurement is a forward pass, which costs a third of a training step. It is made twice in full, and the
    # samples in between add up to a third one. What else is measured is read by both models.
    budget = budget_after_training(tokens)
    measured = 2 / 3 * _read(budget, source) + budget.memorisation_work
    seconds = compute.speed.seconds(tokens + held_out_tokens + measured)
    return Estimate(
        train_tokens=round(tokens),
        steps=steps,
        seconds=None if seconds is None else round(15 + seconds, 1),
        memory_bytes=compute.memory_bytes,
        basis=compute.speed.basis + compute.reason,
        chosen=chosen,
    )


def evaluation_estimate(
    base: Base,
    source: SourceSummary,
    device: str,
    measured: float | None,
    *,
    adapters: int,
    has_training_code: bool,
) -> Estimate:
    """Return what an evaluation takes: the base model and each adapter make a forward pass over the same text.

    `has_training_code`: see `budget_of_evaluation`.
    """
    held_out_tokens = min(source.estimated_tokens, MAX_HELD_OUT_EXAMPLES * TOKENS_PER_EXAMPLE)
    budget = budget_of_evaluation(held_out_tokens, has_training_code=has_training_code)
    tokens = (1 + adapters) * (held_out_tokens + _read(budget, source))
    speed = training_speed(base, device, measured)
    seconds = speed.seconds(tokens / 3)  # a forward pass is a third of a training step
    return Estimate(
        train_tokens=0,
        steps=0,
        seconds=None if seconds is None else round(20 + seconds, 1),
        memory_bytes=inference_memory_bytes(base.shape, device),
        basis=speed.basis,
    )


def _read(budget: EvaluationBudget, source: SourceSummary) -> int:
    """Return the tokens that a model reads and writes besides the held-out examples. Records have no files to read."""
    return GENERAL_TOKENS + (budget.tokens if source.units else budget.completions)


# --- Memory ----------------------------------------------------------------------------------------------------------------


def memory_bytes(config: TrainingConfig, base: Base, device: str, plan: ComputePlan) -> int:
    """Return the estimated peak memory of the training process on a CPU, or of the device's memory that torch takes.

    For families with fused blocks it is near the measured peak, for others an upper bound.
    """
    return _MemoryModel(config, base, device, plan).total()


@dataclass(frozen=True)
class _MemoryModel:
    """The terms of the peak memory. Micro-batches of T tokens pass through L layers."""

    config: TrainingConfig
    base: Base
    device: str
    plan: ComputePlan

    @property
    def bf16(self) -> bool:
        """Whether products with the base model's weights are computed in 16 bits."""
        return self.plan.weights == "bfloat16" or (self.device != "cpu" and self.config.precision == "auto")

    @property
    def fused(self) -> bool:
        return has_fused_blocks(self.base.model_type)

    @property
    def _stored_in_16_bits(self) -> bool:
        return self.base.size_bytes < 3 * self.base.shape.parameters

    @property
    def micro_tokens(self) -> int:
        bf16_blocks = uses_bf16_blocks(self.config, self.base, self.plan)
        capacity = micro_capacity(self.config.max_length, self.device, uses_bf16_blocks=bf16_blocks)
        return min(capacity, self.config.batch_size * self.config.max_length)

    def total(self) -> int:
        activations = self.activations()
        if self.bf16 and self.device == "cpu":
            fragmentation = activations // _BF16_FRAGMENTATION_DIVISOR
        else:
            fragmentation = activations // _FRAGMENTATION_DIVISOR[self.device]
        temporaries = self.micro_tokens * 4 * 6 * self.base.shape.intermediate_size
        # The heap keeps the space of chunked logits; complete ones are freed before the backward pass needs temporaries.
        peak = temporaries + self.logits() if self.fused else max(temporaries, self.logits())
        process = 0 if self.device == "cuda" else PROCESS_BYTES  # MPS shares the process's memory
        optimiser = lora_parameters(self.config.lora_rank, self.base.shape) * 4 * ADAM_COPIES
        return round(process + self.weights() + activations + fragmentation + peak + optimiser)

    def weights(self) -> int:
        if self.bf16:
            weights = self._bf16_weights()
        elif self.plan.weights == "file":
            weights = self.base.size_bytes + UNPACKED_BYTES
        else:
            weights = 4 * self.base.shape.parameters
        if self.device == "cpu" and self.base.model_type not in FAMILIES and self._stored_in_16_bits:
            weights += self.base.size_bytes  # the file is mapped while it is converted to float32
        return weights

    def _bf16_weights(self) -> int:
        weights = 2 * self.base.shape.parameters
        if self.device != "mps":
            weights += lora_concat_bytes(self.config.lora_rank, self.base.shape)
        return weights + (KERNELS_BYTES if self.device == "cpu" else 0)

    def activations(self) -> int:
        """Return what is stored for the backward pass."""
        shape = self.base.shape
        per_layer = self.micro_tokens * activation_bytes(self.config, self.base, self.device, bf16=self.bf16)
        if self.device == "mps":
            # Its attention has no backward pass of its own: the scores of all pairs of tokens are stored, in float32.
            per_layer += 4 * shape.heads * self.micro_tokens**2
        if self.plan.recompute_layers:
            return per_layer + shape.layers * self.micro_tokens * 4 * shape.hidden_size
        return shape.layers * per_layer

    def logits(self) -> int:
        vocabulary = self.base.shape.vocab_size
        if self.bf16:
            positions = LOSS_POSITIONS["bfloat16"]
            float32_logits = max(LOGITS_IN_FLOAT32, vocabulary) if self.device == "cpu" else positions * vocabulary
            chunked = 2 * positions * vocabulary + 4 * float32_logits
        else:
            chunked = 4 * LOSS_POSITIONS["float32"] * vocabulary
        if self.fused:
            return chunked
        # A head that does more than a product is not chunked: logits, two copies, and their gradient.
        return max(chunked, 4 * 4 * self.micro_tokens * vocabulary)


def activation_bytes(config: TrainingConfig, base: Base, device: str, *, bf16: bool) -> int:
    """Return the bytes per token that a layer stores for the backward pass. `bf16`: products are computed in 16 bits."""
    shape = base.shape
    fused = has_fused_blocks(base.model_type)
    if device == "mps" or config.dropout or not fused:
        in_16_bits = bf16 and device == "cpu"  # on accelerators, layers that are not fused pass on float32
        per_token = (2 if in_16_bits else 4) * (14 * shape.hidden_size + 6 * shape.intermediate_size)
        return per_token if fused else 2 * per_token
    # The block's two inputs, queries, keys, values, the attention's result, gate and up; A x of each linear layer.
    numbers = 2 * (shape.hidden_size + shape.query_size + shape.kv_size + shape.intermediate_size)
    numbers += 7 * config.lora_rank
    if has_head_norms(base.model_type):
        numbers += shape.query_size + 2 * shape.kv_size
    return (2 if bf16 else 4) * numbers


def lora_concat_bytes(rank: int, shape: ModelShape) -> int:
    """Return the bytes of the columns that are appended to the weights for LoRA's B (`modeling.fused_linear`)."""
    attention = 3 * (shape.query_size + 2 * shape.kv_size) + shape.hidden_size
    mlp = 2 * 2 * shape.intermediate_size + shape.hidden_size
    return 2 * shape.layers * rank * (attention + mlp)


def inference_memory_bytes(shape: ModelShape, device: str, *, in_float16: bool = False) -> int:
    """Return the estimated memory of the inference process with one base model and a few adapters.

    On devices other than the CPU, it is the device's memory. llama.cpp holds weights and cache in F16 on a CPU as well.
    """
    weight_bytes = 4 if device == "cpu" and not in_float16 else 2
    cache = 2 * shape.layers * shape.kv_size * 2048 * weight_bytes
    return PROCESS_BYTES + shape.parameters * weight_bytes + cache + 4 * lora_parameters(32, shape)


def lora_parameters(rank: int, shape: ModelShape) -> int:
    """Return the number of weights of an adapter on all linear layers."""
    if shape.linear_features is not None:
        return rank * shape.linear_features
    attention = 2 * (shape.hidden_size + shape.query_size) + 2 * (shape.hidden_size + shape.kv_size)
    mlp = 3 * (shape.hidden_size + shape.intermediate_size)
    return rank * shape.layers * (attention + mlp)
