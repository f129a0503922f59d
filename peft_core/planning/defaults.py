"""What is chosen where a request leaves it open, from how much there is to learn and how fast; and why, in one sentence.

What the figures rest on: 50 units is the least that Codebase Gardener trains on, and a tenth of fewer is too little to tell a
gain from noise. A second and a third pass over a small code base are a rule of thumb and not measured: 22 steps of 4
examples lower the held-out loss of the bundled base by 0.6 nats, and more steps go on lowering it. Two hours are what a
person may be made to wait who did not say for how long. The rank follows the arithmetic of LoRA Without Regret: a weight
holds about two bits, and a token of code that the base half knows has about one to teach.
"""

from __future__ import annotations

import math

from peft_core.errors import DataError, InvalidArgument
from peft_core.planning.cost_model import TOKENS_PER_EXAMPLE, lora_parameters
from peft_core.schemas.base_model import ModelShape
from peft_core.schemas.dataset import SourceSummary
from peft_core.schemas.training import TrainingConfig

MIN_UNITS = 50
FEW_STEPS = 60  # a pass of fewer is made twice
VERY_FEW_STEPS = 25  # and one of fewer three times
PATIENCE_S = 2 * 3600.0
RANKS = (16, 32, 64)
TOKENS_PER_WEIGHT = 2.0
_PASSES = {1: "One pass", 2: "Two passes", 3: "Three passes"}


def choose_defaults(
    config: TrainingConfig,
    shape: ModelShape,
    found: SourceSummary,
    tokens_per_second: float | None,
) -> tuple[TrainingConfig, str]:
    """The request with its length and rank filled in, and a sentence on each that it left open.

    Raises:
        DataError: 'too_little_data', unless the request allows for little.
    """
    units = found.examples if found.examples is not None else round(found.estimated_tokens / TOKENS_PER_EXAMPLE)
    if units < MIN_UNITS and not config.allow_little_data:
        raise too_little(units, found)
    config, length = _with_length(config, units, found.estimated_tokens, tokens_per_second)
    config, rank = _with_rank(config, shape, units, found.estimated_tokens)
    return config, " ".join(filter(None, [length, rank]))


def too_little(units: int, found: SourceSummary) -> DataError:
    called = "records" if found.examples is not None else "units (functions, classes and the like)"
    return DataError(
        f"Too little data: {found.path or 'training_data'} holds about {units} {called}, {found.estimated_tokens} tokens; at "
        f"least {MIN_UNITS} are needed to teach more than is learned by heart. Retrieval, that is letting the assistant "
        "read these files, will serve you better.",
        code="too_little_data",
        suggestions=(
            "Give more code: a directory further up, or the whole repository",
            "Or set config.allow_little_data = true to train all the same",
        ),
        details={"units": units, "needed": MIN_UNITS, "estimated_tokens": found.estimated_tokens},
    )


def _with_length(
    config: TrainingConfig,
    units: int,
    tokens: int,
    tokens_per_second: float | None,
) -> tuple[TrainingConfig, str]:
    if config.num_epochs is not None or config.max_steps is not None:
        return config, ""
    train_units = max(1.0, units * (1 - config.held_out_fraction))
    steps = math.ceil(train_units / config.batch_size)
    suited = 3 if steps < VERY_FEW_STEPS else 2 if steps < FEW_STEPS else 1
    pass_s = tokens * (1 - config.held_out_fraction) / tokens_per_second if tokens_per_second else 0.0
    if pass_s > PATIENCE_S:
        affordable = max(1, int(steps * PATIENCE_S / pass_s))
        return config.model_copy(update={"max_steps": affordable}), (
            f"{affordable} of the {steps} steps of a whole pass, because that would take about {_hours(pass_s)} and nobody "
            f"said that it may take more than {_hours(PATIENCE_S)}; set num_epochs = 1 for all."
        )
    passes = next(count for count in range(suited, 0, -1) if count * pass_s <= PATIENCE_S)
    only = "" if suited == 1 else "only "
    each = "" if suited == 1 else " each"
    why = f"{_PASSES[passes]}, because about {units} units make {only}{steps} steps{each}"
    if passes < suited:
        why += (
            f"; no more than that, because {_PASSES[suited].lower()} would take about {_hours(suited * pass_s)} and nobody "
            f"said that it may take more than {_hours(PATIENCE_S)}"
        )
    return config.model_copy(update={"num_epochs": float(passes)}), f"{why}."


def _with_rank(config: TrainingConfig, shape: ModelShape, units: int, tokens: int) -> tuple[TrainingConfig, str]:
    if (
        "rank" in config.model_fields_set or config.target_modules != "all-linear"
    ):  # what some modules hold is not known here
        return config, ""
    share = 1.0
    if config.max_steps is not None:
        share = min(1.0, config.max_steps * config.batch_size / max(1, units))
    different = tokens * share  # passes do not make them more
    roomy = [rank for rank in RANKS if lora_parameters(rank, shape) * TOKENS_PER_WEIGHT >= different]
    rank = roomy[0] if roomy else RANKS[-1]
    weights = f"{lora_parameters(rank, shape) / 1e6:.1f} million weights"
    why = (
        f"because its {weights} have room for what {_rounded(different)} tokens teach"
        if roomy
        else f"the most that is chosen: {weights}, for a part of what {_rounded(different)} tokens teach"
    )
    return config.model_copy(update={"rank": rank}), f"Rank {rank}, {why}."


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.1f} hours" if hours < 10 and round(hours, 1) % 1 else f"{hours:.0f} hours"


def _rounded(tokens: float) -> str:
    return f"{tokens / 1e6:.1f} million" if tokens >= 1e6 else f"{max(1, round(tokens / 1e3))} thousand"


# FOLDED FROM peft_core.planning.defaults: What is filled in where a caller leaves training settings open, from the
# base and nothing else. No torch.
#
# The rate was measured on the bundled base (benchmarks/recipes.py). Other sizes follow the rule that Thinking Machines Lab
# published with "LoRA Without Regret" (Schulman et al., 2025): proportional to hidden_size^-p, with p = 0.781 for Llama and
# 0.0775 for Qwen. The larger one is taken for all: too low a rate learns somewhat less, too high a rate harms. Nor is the rate
# raised for bases that are smaller than the one it was measured on. With the batch it grows by the square root, as is usual for
# Adam (Malladi et al., arXiv 2205.10287).
#

MEASURED_RATE = 1e-3  # of LoRA A, at the two sizes below
_MEASURED_HIDDEN_SIZE = 576
_MEASURED_BATCH = 4
_EXPONENT = 0.781


def with_defaults(config: TrainingConfig, shape: ModelShape) -> TrainingConfig:
    """The settings with a learning rate that suits the base, unless they have one."""
    if config.learning_rate is not None:
        return config
    return config.model_copy(update={"learning_rate": default_learning_rate(shape.hidden_size, config.batch_size)})


def require_complete(config: TrainingConfig) -> None:
    """Check that the planner has filled in what a request may leave open; a worker does not choose.

    Raises:
        InvalidArgument: for a task that was written by hand.
    """
    if config.num_epochs is None and config.max_steps is None:
        missing = "num_epochs"
    else:
        missing = next((name for name in ("rank", "learning_rate") if getattr(config, name) is None), "")
    if missing:
        raise InvalidArgument(
            f"request.config.{missing}",
            None,
            "it must be set in a training task; the planner chooses it when train_adapter queues the job",
            suggestions=["Take the task.json of a queued job as the starting point"],
        )


def default_learning_rate(hidden_size: int, batch_size: int) -> float:
    """Peak rate of LoRA A, two digits."""
    by_size = min(1.0, (_MEASURED_HIDDEN_SIZE / hidden_size) ** _EXPONENT)
    by_batch = (batch_size / _MEASURED_BATCH) ** 0.5
    return float(f"{MEASURED_RATE * by_size * by_batch:.2g}")
