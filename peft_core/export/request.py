"""What the export service and its worker tell each other: an `ExportRequest` in, `ExportProgress` lines and the report out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from peft_core.schemas.base_model import Base
from peft_core.schemas.export import ExportTarget
from peft_core.schemas.frozen import FrozenModel

MANIFEST_NAME = "export.json"  # beside the exported files; written last


class OllamaPlan(FrozenModel):
    """How a model is created in Ollama."""

    model: str  # its name
    address: str | None  # of the server; None: it is not created, only the files and a Modelfile are written
    reason: str = ""  # why it is not created
    version: str = ""
    base_model: str | None = None  # the server's own name of the base model, with exactly these weights


class VllmPlan(FrozenModel):
    """Which vLLM loads the exported adapter."""

    address: str
    model: str | None  # its name there; None: that of the exported files
    sends_key: bool  # whether the user's VLLM_API_KEY is for this server


class ExportRequest(FrozenModel):
    adapter_path: Path
    adapter_id: str
    base: Base
    base_was_named: bool  # by the user; otherwise it was found by the adapter's manifest
    to: ExportTarget
    format: str
    directory: Path  # to create
    overwrite: bool
    token: str  # of this request: part of the name of its hidden directory
    held_out: Path | None  # held-out examples of the adapter's training, if they are still there
    base_models_dir: Path  # cache of converted base models
    ollama: OllamaPlan | None = None  # for that target
    vllm: VllmPlan | None = None  # for that target
    in_use: tuple[Path, ...] = ()  # what it reads of the data directory, and which is not deleted meanwhile
    lock: Path  # held during an export: one at a time


class ExportProgress(FrozenModel):
    kind: Literal["progress"] = "progress"
    done: int
    total: int
    message: str
