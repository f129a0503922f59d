"""What is filled in where a caller leaves training settings open, from the base and nothing else. No torch.

The rate was measured on the bundled base (benchmarks/recipes.py). Other sizes follow the rule that Thinking Machines Lab
published with "LoRA Without Regret" (Schulman et al., 2025): proportional to hidden_size^-p, with p = 0.781 for Llama and
0.0775 for Qwen. The larger one is taken for all: too low a rate learns somewhat less, too high a rate harms. Nor is the rate
raised for bases that are smaller than the one it was measured on. With the batch it grows by the square root, as is usual for
Adam (Malladi et al., arXiv 2205.10287).
"""

from __future__ import annotations

from peft_core.spec import ModelShape, TrainingConfig

MEASURED_RATE = 1e-3  # of LoRA A, at the two sizes below
_MEASURED_HIDDEN_SIZE = 576
_MEASURED_BATCH = 4
_EXPONENT = 0.781


def filled_in(config: TrainingConfig, shape: ModelShape) -> TrainingConfig:
    """The settings with a learning rate that suits the base, unless they have one."""
    if config.learning_rate is not None:
        return config
    return config.model_copy(update={"learning_rate": suited_rate(shape.hidden_size, config.batch_size)})


def suited_rate(hidden_size: int, batch_size: int) -> float:
    """Peak rate of LoRA A, two digits."""
    by_size = min(1.0, (_MEASURED_HIDDEN_SIZE / hidden_size) ** _EXPONENT)
    by_batch = (batch_size / _MEASURED_BATCH) ** 0.5
    return float(f"{MEASURED_RATE * by_size * by_batch:.2g}")
