"""Training requests, each defined once: as the tool's schema, as JSON in the database, and as the worker's input.

The assistant that fills the fields in reads their descriptions, so these say what a field does and when to change it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from peft_core.schemas.frozen import ONE_TEXT_IS_A_LIST, FrozenModel

MAX_PROJECT_ID = 64  # characters
ProjectId = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$",
        min_length=1,
        max_length=MAX_PROJECT_ID,
        description="Your name for the project: letters, digits, '.', '-', '_'. It groups its adapters.",
    ),
]


def project_id_from(name: str) -> str:
    """Return the project id for a name: "org-repo" for "org/repo". An empty text if no character of it can be used."""
    words = re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
    return re.sub(r"\.{2,}", ".", words).strip("-_.")[:MAX_PROJECT_ID].rstrip(".")


DeviceName = Literal["auto", "mps", "cuda", "cpu"]
Precision = Literal["auto", "float32"]
HeldOutBy = Literal["file", "time"]
FROM_SCRATCH = "none"  # the value of `TrainingConfig.continue_from` that begins without an adapter
SETTINGS_URI = "settings://training"  # the resource that describes every setting
ADVANCED = {"advanced": True}  # the tools' schemas describe such a setting only by its type
# The default depends on the base model and the data, so it is not in the tools' schemas: forms submit each default they find.
DEPENDS = {"default_depends": True}
MAX_SWEEP_RUNS = 8
_MAX_STARS = 4  # more would make matching slow
Pattern = Annotated[str, Field(min_length=1, max_length=200)]


def _pattern_problem(pattern: str) -> str:
    """Return why a pattern for files is not understood, or an empty text."""
    parts = pattern.split("/")
    if pattern.startswith("!"):
        return "it must not begin with '!'; patterns of files not to read belong into exclude"
    if pattern.startswith("#") or "\\" in pattern or not pattern.isprintable():
        return "it must not begin with '#', and contain neither a backslash nor a control character; directories end with '/'"
    if ".." in parts or "." in parts:
        return "it must be relative to the directory, without '.' and '..' as parts, such as 'src/' or '*.sql'"
    if any(part.count("*") > _MAX_STARS for part in parts):
        return f"it must have at most {_MAX_STARS} '*' between two '/'"
    return ""


class TaskMixture(FrozenModel):
    """Reformats part of the training examples. The others, and all held-out examples, stay plain text."""

    fill_in_the_middle: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Fraction as fill-in-the-middle examples, for editors (0.5). Needs a base with FIM tokens.",
        ),
    ] = 0.0
    instructions: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="Fraction as chat examples: docstring as prompt, code as answer.",
        ),
    ] = 0.0

    @model_validator(mode="after")
    def _at_most_all_units(self) -> TaskMixture:
        if self.fill_in_the_middle + self.instructions > 1:
            raise ValueError("fill_in_the_middle + instructions must be at most 1: each unit is reformatted once")
        return self


class DataSelection(FrozenModel):
    """Which data is read. Every field is optional."""

    include: Annotated[
        list[Pattern],
        ONE_TEXT_IS_A_LIST,
        Field(
            max_length=50,
            description="Patterns, as in .gitignore, of the files to read, vendored ones too. Omit: all code.",
        ),
    ] = []  # noqa: RUF012 -- pydantic copies defaults
    exclude: Annotated[
        list[Pattern], ONE_TEXT_IS_A_LIST, Field(max_length=50, description="Patterns of files not to read.")
    ] = []  # noqa: RUF012 -- pydantic copies defaults
    more_sources: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=4096)]],
        ONE_TEXT_IS_A_LIST,
        Field(
            max_length=16,
            description="More repositories or .jsonl files.",
        ),
    ] = []  # noqa: RUF012 -- pydantic copies defaults
    skip_unusable_records: Annotated[
        bool, Field(json_schema_extra=ADVANCED, description="Skip unusable records instead of refusing the file.")
    ] = False

    @model_validator(mode="after")
    def _patterns_are_understood(self) -> DataSelection:
        for name, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if problem := _pattern_problem(pattern):
                    raise ValueError(f"{name} has the pattern {pattern!r}: {problem}")
        return self


class Sweep(FrozenModel):
    """Values of one setting to compare: each is trained with, and the adapter with the lowest held-out loss is kept."""

    rank: list[Annotated[int, Field(ge=1, le=512)]] = []  # noqa: RUF012 -- pydantic copies defaults
    learning_rate: list[Annotated[float, Field(gt=0, le=0.1)]] = []  # noqa: RUF012 -- as above

    @model_validator(mode="after")
    def _one_setting(self) -> Sweep:
        if bool(self.rank) == bool(self.learning_rate):
            raise ValueError("sweep must have one setting: rank or learning_rate")
        if not 2 <= len(set(self.values)) == len(self.values) <= MAX_SWEEP_RUNS:
            raise ValueError(f"sweep.{self.setting} must have 2 to {MAX_SWEEP_RUNS} values, all different")
        return self

    @property
    def setting(self) -> Literal["rank", "learning_rate"]:
        return "rank" if self.rank else "learning_rate"

    @property
    def values(self) -> list[int] | list[float]:
        return self.rank or self.learning_rate


class SweepRun(FrozenModel):
    """The place of a training in a sweep."""

    sweep_id: str
    number: int  # 1-based
    setting: Literal["rank", "learning_rate"]


class TrainingConfig(DataSelection):
    """How to train. Omit all for a first run. Resource settings://training describes the others."""

    base_model: Annotated[
        str | None,
        Field(
            description="Model directory, .gguf file, cached hub id or ollama:NAME, see list_base_models. Omit for the default."
        ),
    ] = None
    rank: Annotated[
        int | None,
        Field(ge=1, le=512, description="LoRA rank. Omit to choose (usually 16)."),
    ] = None
    alpha: Annotated[
        float | None,
        Field(
            json_schema_extra=ADVANCED,
            gt=0,
            le=4096,
            description="LoRA alpha; updates are scaled by alpha / rank. Omit for 2 x rank.",
        ),
    ] = None
    dropout: Annotated[
        float,
        Field(
            json_schema_extra=ADVANCED,
            ge=0,
            lt=1,
            description="Dropout on the LoRA input. 0 is best for a single epoch.",
        ),
    ] = 0.0
    use_rslora: Annotated[
        bool,
        Field(
            json_schema_extra=ADVANCED, description="Scale by alpha / sqrt(rank) instead: more stable for rank >= 64."
        ),
    ] = False
    target_modules: Annotated[
        Literal["all-linear"] | list[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]{1,128}$")]],
        Field(
            json_schema_extra=ADVANCED,
            description="'all-linear' (recommended), or module names such as ['q_proj', 'v_proj']; no regular expressions.",
        ),
    ] = "all-linear"
    learning_rate: Annotated[
        float | None,
        Field(
            gt=0,
            le=0.1,
            description="Peak learning rate of LoRA A. Omit to choose.",
        ),
    ] = None
    lora_plus_ratio: Annotated[
        float,
        Field(
            json_schema_extra=ADVANCED,
            ge=1,
            le=64,
            description="LoRA+: learning rate of B / learning rate of A. 1 is plain LoRA.",
        ),
    ] = 8.0
    lr_scheduler: Annotated[
        Literal["linear", "cosine", "constant"],
        Field(json_schema_extra=ADVANCED, description="Learning-rate schedule after warm-up."),
    ] = "linear"
    sweep: Annotated[
        Sweep | None,
        WithJsonSchema({"type": "object", "description": "{rank: [...]} or {learning_rate: [...]}: keeps the best."}),
    ] = None
    num_epochs: Annotated[
        float | None,
        Field(
            gt=0,
            le=100,
            description="Passes over the data, or max_steps. Omit both to choose: at most 2 hours.",
        ),
    ] = None
    max_steps: Annotated[int | None, Field(ge=1, le=1_000_000, description="Optimiser steps.")] = None
    max_minutes: Annotated[
        float | None,
        Field(
            json_schema_extra=ADVANCED,
            gt=0,
            le=100_000,
            description="Stop a run that takes longer than so many minutes, at a checkpoint. It is then interrupted, and "
            "resume_training continues it for as long again. Omit for no limit.",
        ),
    ] = None
    batch_size: Annotated[
        int,
        Field(
            json_schema_extra=ADVANCED,
            ge=1,
            le=256,
            description="Examples per optimiser step. Small batches learn more per token.",
        ),
    ] = 4
    max_length: Annotated[
        int,
        Field(
            json_schema_extra=DEPENDS,
            ge=64,
            le=8192,
            description="Most tokens per example; longer code is split. Omit for 512, or what records need.",
        ),
    ] = 512
    warmup_ratio: Annotated[
        float,
        Field(
            json_schema_extra=ADVANCED, ge=0, le=0.5, description="Fraction of the steps with a rising learning rate."
        ),
    ] = 0.05
    weight_decay: Annotated[float, Field(json_schema_extra=ADVANCED, ge=0, le=1, description="AdamW weight decay.")] = (
        0.0
    )
    max_grad_norm: Annotated[
        float, Field(json_schema_extra=ADVANCED, gt=0, le=100, description="Gradient clipping by global norm.")
    ] = 1.0
    held_out_fraction: Annotated[
        float,
        Field(
            json_schema_extra=ADVANCED,
            ge=0.02,
            le=0.5,
            description="Fraction of the tokens, in whole files, held out of training to evaluate on; at most about 200 "
            "examples.",
        ),
    ] = 0.1
    held_out_by: Annotated[
        HeldOutBy,
        Field(
            json_schema_extra=ADVANCED,
            description="Which files are held out: random ones, or those changed last in git.",
        ),
    ] = "file"
    eval_steps: Annotated[
        int | None,
        Field(
            json_schema_extra=ADVANCED,
            ge=1,
            description="Measure the held-out loss every so many steps. Omit for each quarter of the run.",
        ),
    ] = None
    early_stopping_patience: Annotated[
        int | None,
        Field(
            json_schema_extra=ADVANCED,
            ge=1,
            le=100,
            description="Stop after so many held-out measurements (on a sample) without improvement, and keep the best "
            "weights. Omit to never stop early. Use it with num_epochs > 1.",
        ),
    ] = None
    mixture: Annotated[TaskMixture, Field(description="Which code units are reformatted. Omit for plain text.")] = (
        TaskMixture()
    )
    allow_little_data: Annotated[
        bool, Field(json_schema_extra=ADVANCED, description="Train even with fewer than 50 units.")
    ] = False
    seed: Annotated[
        int,
        Field(json_schema_extra=ADVANCED, ge=0, le=2**32 - 1, description="Same seed, machine and data: same result."),
    ] = 0
    device: Annotated[
        DeviceName,
        Field(json_schema_extra=ADVANCED, description="'auto' uses MPS (Apple silicon), else CUDA, else the CPU."),
    ] = "auto"
    run_on: Annotated[
        Literal["here", "cluster"],
        Field(description="'cluster': on the user's Ray cluster, to which the data are sent."),
    ] = "here"
    precision: Annotated[
        Precision,
        Field(
            json_schema_extra=ADVANCED,
            description="Arithmetic of products with the base weights. 'auto' uses bfloat16 if the CPU or GPU supports it, "
            "else float32. Adapter, gradients and losses are always float32.",
        ),
    ] = "auto"
    make_current: Annotated[
        Literal["unless_it_harms", "always", "never"],
        Field(
            json_schema_extra=ADVANCED,
            description="Whether the new adapter becomes the project's current one. 'unless_it_harms': not if it raises the "
            "held-out loss, or the loss on general code by more than it gains; it is saved anyway.",
        ),
    ] = "unless_it_harms"
    continue_from: Annotated[
        str | None,
        BeforeValidator(lambda given: FROM_SCRATCH if given is False else given),
        Field(
            description="Adapter or project to start from. Omit: the current adapter; 'none': from scratch.",
        ),
    ] = None
    max_memory_mb: Annotated[
        int | None,
        Field(
            json_schema_extra=ADVANCED,
            ge=256,
            description="Memory limit for training in MB (10^6 bytes). Omit for the setting max_memory_mb, else the memory "
            "available now. A run estimated to need more uses a slower plan, or is rejected.",
        ),
    ] = None

    @model_validator(mode="after")
    def _consistent(self) -> TrainingConfig:
        if self.num_epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"num_epochs = {self.num_epochs:g} and max_steps = {self.max_steps} exclude each other: omit one of them"
            )
        if self.sweep is not None and getattr(self, self.sweep.setting) is not None:
            raise ValueError(
                f"{self.sweep.setting} and sweep.{self.sweep.setting} exclude each other: omit one of them"
            )
        if self.target_modules == []:
            raise ValueError("target_modules is empty: it must name at least one module, or be 'all-linear'")
        return self

    @property
    def runs(self) -> list[TrainingConfig]:
        """The settings of each run of the sweep; without one, these."""
        if self.sweep is None:
            return [self]
        return [self.model_copy(update={"sweep": None, self.sweep.setting: value}) for value in self.sweep.values]

    @property
    def lora_rank(self) -> int:
        """The rank, which the planner has set.

        Raises:
            ValueError: it has not.
        """
        if self.rank is None:
            raise ValueError("rank has not been chosen yet")
        return self.rank

    @property
    def lora_alpha(self) -> float:
        """Alpha, or its default."""
        return self.alpha if self.alpha is not None else 2.0 * self.lora_rank

    @property
    def rates(self) -> tuple[float, float]:
        """The peak learning rates of LoRA A and B, which the planner has set.

        Raises:
            ValueError: it has not.
        """
        if self.learning_rate is None:
            raise ValueError("learning_rate has not been chosen yet")
        return self.learning_rate, self.learning_rate * self.lora_plus_ratio


class ContinuedAdapter(FrozenModel):
    """The adapter that a training starts from, its parent."""

    adapter_path: Path
    adapter_id: str
    weights_sha256: str


class EvaluatedAdapter(FrozenModel):
    """The adapter that a job evaluates instead of training one, or the two that it compares."""

    adapter_path: Path
    compared_with: Path | None = None  # adapter B; the other one is A
    accept_unproven_base: bool = False

    @property
    def paths(self) -> dict[str, Path]:
        """The directory of each adapter, by the request field that names it."""
        if self.compared_with is None:
            return {"adapter_path": self.adapter_path}
        return {"adapter_a": self.adapter_path, "adapter_b": self.compared_with}
