"""Requests, and what they are made of, each defined once: tool schema, database JSON and the training child's input.

Descriptions are read by the assistant that fills the fields in, so they say when to change a value, not only what it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from peft_core.schemas.frozen import FrozenModel

ProjectId = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$",
        min_length=1,
        max_length=64,
        description="Your name for the project: letters, digits, '-', '_' and single dots, at most 64 characters. "
        "Adapters of one project are kept together; use the same id each time.",
    ),
]
DeviceName = Literal["auto", "mps", "cuda", "cpu"]
Precision = Literal["auto", "float32"]
HeldOutBy = Literal["file", "time"]


class TaskMixture(FrozenModel):
    """How much of the code is told in another way than as plain text. The rest, and all that is measured on, is plain."""

    fill_in_the_middle: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Share of the units told as a gap between what is before and after it, for completion in editors. "
            "0.5 is usual. Only for bases with tokens for it, such as Qwen2.5-Coder or StarCoder2.",
        ),
    ] = 0.0
    instructions: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Share of the units told as the answer to their docstring, in the base's chat template, where they "
            "have one. For a model that is asked in words.",
        ),
    ] = 0.0

    @model_validator(mode="after")
    def _one_way_each(self) -> TaskMixture:
        if self.fill_in_the_middle + self.instructions > 1:
            raise ValueError("fill_in_the_middle and instructions are shares of the same units: at most 1 together")
        return self


class TrainingConfig(FrozenModel):
    """How to train. Every field is optional; the defaults suit a first run."""

    base_model: Annotated[
        str | None,
        Field(
            description="A local Hugging Face model directory, a .gguf file, or a hub id that is in the local cache. "
            "Null: the setting default_base_model, else the bundled SmolLM2-135M-Instruct.",
        ),
    ] = None
    rank: Annotated[
        int,
        Field(ge=1, le=512, description="LoRA rank r. Left out: by the size of the code base, 16 for most."),
    ] = 16
    alpha: Annotated[
        float | None,
        Field(gt=0, le=4096, description="LoRA alpha; the update is scaled by alpha/rank. Null: 2 x rank."),
    ] = None
    dropout: Annotated[
        float,
        Field(ge=0, lt=1, description="Dropout on the LoRA input. 0 is best for a single epoch."),
    ] = 0.0
    use_rslora: Annotated[bool, Field(description="Scale by alpha/sqrt(rank) instead: steadier for rank >= 64.")] = (
        False
    )
    target_modules: Annotated[
        Literal["all-linear"] | list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,128}$")]],
        Field(
            description="'all-linear' (recommended), or literal module names such as ['q_proj', 'v_proj']. "
            "No regular expressions.",
        ),
    ] = "all-linear"
    learning_rate: Annotated[
        float | None,
        Field(
            gt=0,
            le=0.1,
            description="Peak rate of LoRA A; B gets lora_plus_ratio times this. Null: 1e-3 for the bundled base, less for "
            "larger ones.",
        ),
    ] = None
    lora_plus_ratio: Annotated[
        float,
        Field(ge=1, le=64, description="LoRA+: rate of B over rate of A. 1 is plain LoRA."),
    ] = 8.0
    lr_scheduler: Annotated[
        Literal["linear", "cosine", "constant"],
        Field(description="Shape of the rate after warm-up."),
    ] = "linear"
    num_epochs: Annotated[
        float | None,
        Field(
            gt=0,
            le=100,
            description="Passes over the data, or give max_steps. Neither: by the size, 2 hours at most.",
        ),
    ] = None
    max_steps: Annotated[
        int | None,
        Field(ge=1, le=1_000_000, description="Optimiser steps, instead of num_epochs: a bound on time."),
    ] = None
    batch_size: Annotated[
        int,
        Field(ge=1, le=256, description="Examples per optimiser step. Small batches learn more per token."),
    ] = 4
    max_length: Annotated[
        int,
        Field(ge=64, le=8192, description="Tokens per example at most; longer units are split at syntax boundaries."),
    ] = 512
    warmup_ratio: Annotated[float, Field(ge=0, le=0.5, description="Share of the steps in which the rate rises.")] = (
        0.05
    )
    weight_decay: Annotated[float, Field(ge=0, le=1, description="AdamW weight decay.")] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, le=100, description="Gradient clipping by global norm.")] = 1.0
    held_out_fraction: Annotated[
        float,
        Field(
            ge=0.02,
            le=0.5,
            description="Share of the tokens, in whole files, kept out of training to measure base and adapter on; "
            "about 200 examples at most.",
        ),
    ] = 0.1
    held_out_by: Annotated[
        HeldOutBy,
        Field(description="Which files: drawn by lot, or those changed last in git's history."),
    ] = "file"
    eval_steps: Annotated[
        int | None,
        Field(ge=1, description="Measure the held-out loss every so many steps. Null: after each quarter of the run."),
    ] = None
    early_stopping_patience: Annotated[
        int | None,
        Field(
            ge=1,
            le=100,
            description="Stop after so many held-out measurements without improvement, and keep the best state (by a sample "
            "of what is reported in the end). Null: never stop early. Use it with num_epochs > 1.",
        ),
    ] = None
    mixture: Annotated[
        TaskMixture,
        Field(description="Units of code that are told in another way than as plain text. Left out: none."),
    ] = TaskMixture()
    allow_little_data: Annotated[
        bool,
        Field(description="Train although there are fewer than 50 units, which is refused otherwise."),
    ] = False
    seed: Annotated[int, Field(ge=0, le=2**32 - 1, description="Same seed, same machine, same data: same result.")] = 0
    device: Annotated[DeviceName, Field(description="'auto' takes MPS (Apple silicon), else CUDA, else the CPU.")] = (
        "auto"
    )
    precision: Annotated[
        Precision,
        Field(
            description="Arithmetic of products with the base's weights. 'auto' takes bfloat16 where CPU or GPU has units for "
            "it, else float32. The adapter, its gradients and the losses are float32 always.",
        ),
    ] = "auto"
    make_current: Annotated[
        Literal["unless_it_harms", "always", "never"],
        Field(
            description="Whether the project id stands for the new adapter. 'unless_it_harms': not when it raises the "
            "held-out loss, or forgets more of general code than it gains; it is kept all the same.",
        ),
    ] = "unless_it_harms"
    max_memory_mb: Annotated[
        int | None,
        Field(
            ge=256,
            description="Memory that training may take. Null: the setting max_memory_mb, else what is available now. "
            "A run that is estimated to need more computes in a leaner and slower way, or is refused at once.",
        ),
    ] = None

    @model_validator(mode="after")
    def _one_length(self) -> TrainingConfig:
        if self.num_epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"num_epochs = {self.num_epochs:g} and max_steps = {self.max_steps} exclude each other: "
                "leave one of them out",
            )
        if self.target_modules == []:
            raise ValueError("target_modules is empty: name at least one module, or use 'all-linear'")
        return self

    @property
    def lora_alpha(self) -> float:
        """Alpha with its default filled in."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    @property
    def rates(self) -> tuple[float, float]:
        """Peak learning rates of LoRA A and of B, once `recipe.filled_in` has chosen the first."""
        if self.learning_rate is None:
            raise ValueError("learning_rate is still open")
        return self.learning_rate, self.learning_rate * self.lora_plus_ratio


class EvaluatedAdapter(FrozenModel):
    """What is to be evaluated instead of trained."""

    adapter_path: Path
    accept_unproven_base: bool = False
