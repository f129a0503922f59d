"""Codebase Gardener's names for settings of a training, as names of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, ValidationError

from peft_core.errors import InvalidArgument
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.training import TrainingConfig
from peft_core.schemas.validation import invalid_argument, parse_config

ALIASES = {
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "training_batch_size": "batch_size",
    "max_training_steps": "max_steps",
    "training_timeout_minutes": "max_minutes",
    "memory_limit_mb": "max_memory_mb",
    "memory_limit_gb": "max_memory_mb",
}
_THRESHOLD = "training_data_quality_threshold"


class PipelineOptions(FrozenModel):
    """Settings of its training pipeline that `TrainingConfig` has no field for."""

    min_training_chunks: Annotated[
        int | None, Field(ge=1, description="Fewest units or records that are trained on.")
    ] = None
    max_training_chunks: Annotated[
        int | None, Field(ge=1, description="Most units or records that are trained on, counting every epoch.")
    ] = None
    progress_update_interval: Annotated[
        float | None, Field(ge=0, description="Least number of seconds between two calls of on_progress.")
    ] = None


def parse_names(config: TrainingConfig | Mapping[str, Any] | None) -> tuple[TrainingConfig, PipelineOptions]:
    """Return the settings of a training, given by names of ours or of Codebase Gardener's.

    Raises:
        InvalidArgument: a setting is given by both names, it is unknown, or its value is out of range.
    """
    if config is None or isinstance(config, TrainingConfig):
        return parse_config(config), PipelineOptions()
    ours: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in config.items():
        if name == _THRESHOLD:
            raise InvalidArgument(
                f"config.{name}",
                value,
                "units are not scored here: duplicates, generated and vendored code are left out by rules",
                suggestions=["Omit it", "Or give training_data as a list of the chunks that are good enough"],
            )
        if name in PipelineOptions.model_fields:
            options[name] = value
            continue
        known = ALIASES.get(name, name)
        if known in ours:
            both = " and ".join(f"config.{given}" for given in config if ALIASES.get(given, given) == known)
            raise InvalidArgument(
                f"config.{name}", value, f"{both} mean the same; one of them must be given", suggestions=["Omit one"]
            )
        ours[known] = _megabytes(value) if name == "memory_limit_gb" else value
    try:
        parsed = PipelineOptions.model_validate(options)
    except ValidationError as error:
        raise invalid_argument(error, PipelineOptions.model_json_schema(), prefix=("config",)) from error
    if parsed.min_training_chunks is not None:
        ours.setdefault("allow_little_data", True)  # the limit is checked instead
    return parse_config(ours), parsed


def refuse(options: PipelineOptions, name: str, method: str) -> None:
    """Raise InvalidArgument for an option that another method takes."""
    if (value := getattr(options, name)) is not None:
        raise InvalidArgument(f"config.{name}", value, f"it has no effect here; it belongs to {method}")


def _megabytes(gigabytes: Any) -> Any:
    """Return what a limit in GB (10^9 bytes) is in MB; what is no number stays as it is, to be refused."""
    is_number = isinstance(gigabytes, int | float) and not isinstance(gigabytes, bool)
    return round(gigabytes * 1000) if is_number and abs(gigabytes) < 1e9 else gigabytes
