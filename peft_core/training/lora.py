"""The adapter (PEFT's LoRA on a frozen base model), its optimiser, and its learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_core.errors import InvalidArgument, TrainingError
from peft_core.schemas.training import TrainingConfig


def attach(model: PreTrainedModel, config: TrainingConfig, base_name: str) -> PeftModel:
    """Wrap the base model with an untrained adapter: A is drawn from torch's generator, B is zero.

    The adapter's weights are float32, regardless of the number format of the base model.

    Raises:
        InvalidArgument: a target module does not exist in the base model, or is its output head.
    """
    if config.target_modules != "all-linear":
        _check_targets(model, config.target_modules)
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT annotates int and computes with floats
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        target_modules=config.target_modules,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2 stores W transposed
    )
    wrapped = get_peft_model(model, lora, autocast_adapter_dtype=True)
    # PEFT takes the name from the base model's configuration, where it may be a path on this machine.
    lora_config(wrapped).base_model_name_or_path = base_name
    return wrapped


def lora_config(model: PeftModel) -> LoraConfig:
    """Return PEFT's configuration of the adapter."""
    return cast("LoraConfig", model.peft_config["default"])


def target_modules(model: PeftModel) -> tuple[str, ...]:
    """Return the sorted names of the wrapped modules, also for 'all-linear'."""
    targets = lora_config(model).target_modules or ()
    return tuple(sorted({targets} if isinstance(targets, str) else targets))


def weights(model: PeftModel) -> dict[str, nn.Parameter]:
    """Return the trainable weights by name: every LoRA A and B, and nothing of the base model."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_weights(model: PeftModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the adapter's weights by those of another adapter, given under PEFT's names in files.

    Raises:
        TrainingError: a tensor is missing, has another shape, or belongs to no adapted module.
    """
    own = {name.replace(".default.", "."): parameter for name, parameter in weights(model).items()}
    differing = own.keys() ^ tensors.keys()
    differing |= {name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape}
    if differing:
        raise TrainingError(
            f"The adapter to continue from does not fit: {len(differing)} of its tensors differ in name or shape from those "
            f"that are trained here, such as {min(differing)[:120]}.",
            code="parent_unusable",
            suggestions=["Set config.continue_from = 'none' to train from scratch"],
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def copy_of_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return a copy of what `weights` returns."""
    return {name: parameter.detach().clone() for name, parameter in weights(model).items()}


def blend(model: PeftModel, other: Mapping[str, torch.Tensor], share: float) -> None:
    """Replace each weight by the mean of itself and of the one in `other`, which counts for `share`, 0 to 1."""
    with torch.no_grad():
        for name, parameter in weights(model).items():
            parameter.lerp_(other[name], share)


def scale(model: PeftModel, factor: float) -> None:
    """Multiply what the adapter adds to the base model."""
    with torch.no_grad():
        for name, parameter in weights(model).items():
            if ".lora_B." in name:
                parameter.mul_(factor)


def build_optimizer(model: PeftModel, config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW with a `lora_plus_ratio` times higher learning rate for B than for A (LoRA+, arXiv 2402.12354)."""
    groups: dict[Literal["A", "B"], list[nn.Parameter]] = {"A": [], "B": []}
    for name, parameter in weights(model).items():
        groups["B" if ".lora_B." in name else "A"].append(parameter)
    rate_A, rate_B = config.rates
    return torch.optim.AdamW(
        [{"params": groups["A"], "lr": rate_A}, {"params": groups["B"], "lr": rate_B}],
        weight_decay=config.weight_decay,
        fused=True,  # reads and writes weights and moments once per step
    )


def build_scheduler(optimizer: torch.optim.Optimizer, config: TrainingConfig, total_steps: int) -> LambdaLR:
    """Return the schedule for both parameter groups: linear warm-up, then the configured shape."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    return LambdaLR(optimizer, lambda done: rate_factor(config.lr_scheduler, done, warmup=warmup, total=total_steps))


def rate_factor(shape: Literal["linear", "cosine", "constant"], done: int, *, warmup: int, total: int) -> float:
    """Return the share of the peak learning rate, in (0, 1], for the step after `done` completed ones.

    Written by hand because transformers' schedules begin their warm-up at a rate of zero, which wastes the first step. In
    runs of a few dozen steps that matters.
    """
    if done < warmup:
        return (done + 1) / (warmup + 1)
    progress = (done - warmup) / max(1, total - warmup)
    match shape:
        case "linear":
            return max(0.0, 1.0 - progress)
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        case "constant":
            return 1.0


def _check_targets(model: PreTrainedModel, names: list[str]) -> None:
    head = model.get_output_embeddings()  # often tied to the input embedding, so an update would change both
    linear = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    for name in names:
        if not any(path == name or path.endswith(f".{name}") for path in linear):
            known = sorted({path.rsplit(".", 1)[-1] for path in linear})
            raise InvalidArgument(
                "config.target_modules",
                name,
                f"the linear modules of this base model are {', '.join(known)}",
                suggestions=["Use target_modules='all-linear'."],
            )
