"""Settings, from environment variables with the prefix CODEBASE_GARDENER_ (shared with Codebase Gardener)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from peft_core.paths import DataPaths


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix="CODEBASE_GARDENER_", frozen=True, extra="ignore")

    data_dir: Annotated[Path, Field(description="Everything that is kept lies below it.")] = Path(
        "~/.codebase-gardener",
    )
    default_base_model: Annotated[str | None, Field(description="Used when a request names no base model.")] = None
    allow_downloads: Annotated[bool, Field(description="Whether a hub id that is not cached may be fetched.")] = False
    max_memory_mb: Annotated[int | None, Field(ge=256, description="Memory that a training may take.")] = None
    max_resident_adapters: Annotated[
        int,
        Field(ge=1, le=64, description="Adapters kept in memory; the least recently used goes first."),
    ] = 3
    idle_unload_s: Annotated[
        float,
        Field(gt=0, le=30 * 86_400, description="The inference process ends after so many seconds without a call."),
    ] = 900.0
    load_during_training: Annotated[
        Literal["if_it_fits", "never", "always"],
        Field(
            description="Loading a model while a training runs: 'if_it_fits', when memory suffices for both; 'never'; "
            "'always', without looking at memory.",
        ),
    ] = "if_it_fits"
    keep_runs: Annotated[
        int,
        Field(ge=1, description="Ended trainings whose files, log and history are kept; older ones go, adapters stay."),
    ] = 100
    launcher: Annotated[
        str | None,
        Field(description="Command that starts each training, for several GPUs: 'accelerate launch …'."),
    ] = None
    allowed_roots: Annotated[
        tuple[Path, ...] | None,
        NoDecode,
        Field(
            description="Directories, separated as in PATH: training data, adapters and base models are read from nowhere "
            "else. Unset: from anywhere but places for credentials.",
        ),
    ] = None
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        Field(description="How much goes to stderr."),
    ] = "INFO"

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.expanduser().resolve()  # one form of each path: they are compared

    @field_validator("allowed_roots", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [part for part in value.split(os.pathsep) if part.strip()] or None if isinstance(value, str) else value

    @field_validator("allowed_roots")
    @classmethod
    def _roots(cls, value: tuple[Path, ...] | None) -> tuple[Path, ...] | None:
        roots = None if value is None else tuple(root.expanduser() for root in value)
        for root in roots or ():
            if not root.is_absolute():
                raise ValueError(f"{root} is no absolute path")
        return None if roots is None else tuple(root.resolve() for root in roots)

    @property
    def paths(self) -> DataPaths:
        return DataPaths(self.data_dir)
