"""Settings, from environment variables with the prefix CODEBASE_GARDENER_ (shared with Codebase Gardener)."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from peft_core.paths import DataPaths

# Variables that are not ours, but say where models and servers are. Blank ones of other names may have a meaning:
# CUDA_VISIBLE_DEVICES="" hides all GPUs.
_READ_BY_LIBRARIES = ("HF_", "HUGGINGFACE_", "LLAMA_CACHE", "OLLAMA_", "OMP_NUM_THREADS", "TRANSFORMERS_", "XDG_")


def remove_blank_variables() -> None:
    """Remove blank variables of libraries from this process's environment, so that they count as unset, as our own do.

    With HF_HOME="" the cache of the Hugging Face Hub would be the directory `hub` in the working directory.
    """
    for name in [
        name for name, value in os.environ.items() if name.startswith(_READ_BY_LIBRARIES) and not value.strip()
    ]:
        del os.environ[name]


class Settings(BaseSettings):
    """Settings of the user, for all requests. Settings of one training are in `schemas.training.TrainingConfig`."""

    model_config = SettingsConfigDict(env_prefix="CODEBASE_GARDENER_", frozen=True, extra="ignore")

    data_dir: Annotated[Path, Field(description="Directory for jobs, adapters, converted base models and logs.")] = (
        Path("~/.codebase-gardener")
    )
    default_base_model: Annotated[
        str | None,
        Field(description="Base model of requests that name none. Unset: the bundled SmolLM2-135M-Instruct."),
    ] = None
    allow_downloads: Annotated[
        bool, Field(description="Whether base models that are not in the local cache may be downloaded from the hub.")
    ] = False
    max_memory_mb: Annotated[
        int | None,
        Field(
            ge=256,
            description="Memory limit for a job in MB (10^6 bytes). A training estimated to need more uses a slower plan, "
            "or is rejected. Unset: the memory available.",
        ),
    ] = None
    lora_rank: Annotated[
        int | None, Field(ge=1, le=512, description="LoRA rank of trainings that set none. Unset: chosen by the data.")
    ] = None
    lora_alpha: Annotated[
        float | None, Field(gt=0, le=4096, description="LoRA alpha of trainings that set none. Unset: 2 x rank.")
    ] = None
    training_batch_size: Annotated[
        int | None, Field(ge=1, le=256, description="Examples per step of trainings that set no batch_size. Unset: 4.")
    ] = None
    max_training_steps: Annotated[
        int | None,
        Field(
            ge=1,
            le=1_000_000,
            description="Most steps of trainings that set neither num_epochs nor max_steps. Unset: at most 2 hours.",
        ),
    ] = None
    max_resident_adapters: Annotated[
        int, Field(ge=1, le=64, description="Adapters held in memory; the least recently used one is unloaded first.")
    ] = 3
    idle_unload_s: Annotated[
        float,
        Field(
            gt=0,
            le=30 * 86_400,
            description="Seconds without a call after which the inference process exits and frees its memory.",
        ),
    ] = 900.0
    engine: Annotated[
        Literal["auto", "torch", "llamacpp"],
        Field(
            description="What load_adapter and generate compute with: torch, or llama.cpp, which is several times faster on a "
            "CPU. 'auto': llama.cpp on a CPU, if the extra llamacpp is installed, for base models of up to 3B parameters. "
            "llama.cpp takes at most 8192 tokens of prompt and answer together, torch as many as the base model."
        ),
    ] = "auto"
    load_during_training: Annotated[
        Literal["if_it_fits", "never", "always"],
        Field(
            description="Whether a model may be loaded for inference while a training runs: 'if_it_fits' in memory next to it, "
            "'never', or 'always', without checking memory."
        ),
    ] = "if_it_fits"
    keep_runs: Annotated[
        int,
        Field(
            ge=1,
            le=1_000_000,
            description="Finished jobs whose files, logs and history are retained. Those of older jobs are deleted; "
            "published adapters are not.",
        ),
    ] = 100
    refresh_max_load: Annotated[
        int,
        Field(
            ge=1,
            le=100,
            description="Percent of the processors that other programs may use while a training runs that started by itself "
            "(retrain_when); above it the training pauses. It begins, or continues, below half of it. 100: it does not matter.",
        ),
    ] = 30
    refresh_on_battery: Annotated[
        bool, Field(description="Whether a training that started by itself may run on battery power.")
    ] = False
    refresh_quiet_s: Annotated[
        float,
        Field(
            ge=0,
            le=86_400,
            description="Seconds for which the machine must have been free, and no loaded model used, before a training that "
            "started by itself begins or continues.",
        ),
    ] = 60.0
    refresh_interval_s: Annotated[
        float,
        Field(
            ge=0,
            le=30 * 86_400,
            description="Seconds between two trainings of a project that start by themselves; after one that failed or was "
            "cancelled, 24 times as long.",
        ),
    ] = 3600.0
    launcher: Annotated[
        str | None, Field(description="Command that starts each training, to use several GPUs: 'accelerate launch …'.")
    ] = None
    cluster: Annotated[
        str | None,
        Field(
            description="Address of a Ray cluster for trainings with run_on = 'cluster': 'ray://HOST:10001', or 'auto' on a "
            "machine of the cluster."
        ),
    ] = None
    cluster_gpus: Annotated[
        int,
        Field(
            ge=1,
            le=64,
            description="GPUs that a training on the cluster uses, if it has GPUs; of several nodes if none has so many.",
        ),
    ] = 1
    allowed_roots: Annotated[
        tuple[Path, ...] | None,
        NoDecode,
        Field(
            description="Directories, separated as in PATH: training data, adapters and base models are read from these only. "
            "Unset: from everywhere except locations of credentials and private data."
        ),
    ] = None
    ollama_base_url: Annotated[
        str | None,
        Field(
            description="Address of Ollama, for exports to it. Unset: OLLAMA_HOST if that is on this machine, else "
            "http://127.0.0.1:11434."
        ),
    ] = None
    vllm_base_url: Annotated[
        str | None,
        Field(
            description="Address of a running vLLM, which loads each adapter that is exported to it; VLLM_API_KEY is sent to "
            "it only. Unset: only a vLLM on this machine that a request names."
        ),
    ] = None
    answer_within_s: Annotated[
        float,
        Field(
            gt=0,
            le=86_400,
            description="Seconds after which load_adapter, export_adapter and calls that ask a cluster answer that they are "
            "still at work, because many clients give up after 60; the same call again waits for the result. Clients that "
            "follow MCP tasks do not need it.",
        ),
    ] = 45.0
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"],
        Field(description="Least severe messages that are logged to stderr."),
    ] = "INFO"

    @model_validator(mode="before")
    @classmethod
    def _blank_is_unset(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Drop blank values: clients pass "" for what the user left open, and Path("") is the working directory."""
        return {name: value for name, value in values.items() if not (isinstance(value, str) and not value.strip())}

    @field_validator("log_level", mode="before")
    @classmethod
    def _level_as_shared(cls, value: object) -> object:
        """Take the level as Codebase Gardener does: in lower case, too, and CRITICAL, which is not used here."""
        level = value.upper() if isinstance(value, str) else value
        return "ERROR" if level == "CRITICAL" else level

    @field_validator("launcher")
    @classmethod
    def _splits_into_words(cls, value: str | None) -> str | None:
        shlex.split(value or "")  # as the runner does; quotation marks without an end are a ValueError
        return value

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return _resolved(value)

    @field_validator("allowed_roots", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part for part in value.split(os.pathsep) if part.strip()] or None if isinstance(value, str) else value

    @field_validator("*", mode="before")  # the last validator of this mode is the first that runs
    @classmethod
    def _is_utf8(cls, value: object) -> object:
        """Refuse bytes of a path that are not UTF-8: the runner gets the settings as JSON."""
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            raise ValueError("it must be UTF-8") from error
        return value

    @field_validator("allowed_roots")
    @classmethod
    def _absolute_roots(cls, value: tuple[Path, ...] | None) -> tuple[Path, ...] | None:
        for root in value or ():
            if not (root.is_absolute() or str(root).startswith("~")):
                raise ValueError(f"{root} must be an absolute path")
        return None if value is None else tuple(map(_resolved, value))

    @property
    def paths(self) -> DataPaths:
        return DataPaths(self.data_dir)


def _resolved(path: Path) -> Path:
    """Return a path with the home directory for `~` and without symbolic links: paths are compared, so each has one form.

    Raises:
        ValueError: the home directory is unknown, or the links form a loop.
    """
    try:
        return path.expanduser().resolve()
    except (RuntimeError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
