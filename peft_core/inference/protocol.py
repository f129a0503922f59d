"""Messages between the server and the inference worker: one JSON object per line, in each direction.

The server sends `Request` and `Cancel`. The worker answers each `Request` with any number of `Progress` and then exactly one
`Response` or `ErrorResponse`. It processes one request at a time, in order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from peft_core.schemas.base_model import Base
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.generation import EngineChoice, GenerationRequest
from peft_core.schemas.results import ErrorInfo, MemoryState
from peft_core.schemas.retrieval import UnitSource
from peft_core.schemas.training import DeviceName

IDLE_EXIT = 75  # exit code of a worker that ended because no request came


class WorkerConfig(FrozenModel):
    """The worker's only command-line argument, as JSON."""

    base_models_dir: Path  # cache of converted base models
    projects_dir: Path | None = (
        None  # of the adapters that were trained here, and which are not deleted while they are loaded
    )
    activity_file: Path | None = None  # records that a model is in use, see `system.activity`
    data_dir: Path | None = None  # for what the checks of this machine's devices found
    max_resident_adapters: int
    idle_s: float
    device: DeviceName = "auto"
    engine: EngineChoice = "auto"  # of requests that do not name one
    log_level: str = "INFO"


class Load(FrozenModel):
    """Verify an adapter's bytes, load them onto the base model, activate the adapter and measure its effect."""

    kind: Literal["load"] = "load"
    adapter_path: Path
    base: Base
    insist: bool = False  # load even with the verdict 'shape_only'
    engine: EngineChoice | None = None


class Unload(FrozenModel):
    """Unload one adapter; None: the active one."""

    kind: Literal["unload"] = "unload"
    adapter_path: Path | None = None


class Generate(FrozenModel):
    kind: Literal["generate"] = "generate"
    request: GenerationRequest
    adapter_path: Path | None = None  # None: the active one
    without_adapter: Base | None = None  # use the base model alone; this one if none is resident
    stream: bool = False  # report the text so far with the progress
    units: UnitSource | None = None  # code to retrieve from; set if the request asks for it


Command = Annotated[Load | Unload | Generate, Field(discriminator="kind")]


class Request(FrozenModel):
    kind: Literal["ask"] = "ask"
    id: int
    request: Command


class Cancel(FrozenModel):
    """The client no longer waits for the answer to this request."""

    kind: Literal["cancel"] = "cancel"
    id: int


class Progress(FrozenModel):
    kind: Literal["progress"] = "progress"
    id: int
    done: float
    total: float | None
    message: str
    text: str | None = None  # the adapter's text so far, if it was asked for


class Response(FrozenModel):
    kind: Literal["answered"] = "answered"
    id: int
    answer: dict[str, Any]  # LoadedAdapter, UnloadedAdapter or Generation
    resident: MemoryState


class ErrorResponse(FrozenModel):
    kind: Literal["failed"] = "failed"
    id: int
    problem: ErrorInfo
    resident: MemoryState


TO_WORKER: TypeAdapter[Request | Cancel] = TypeAdapter(
    Annotated[Request | Cancel, Field(discriminator="kind")], config=ConfigDict(defer_build=True)
)
FROM_WORKER: TypeAdapter[Progress | Response | ErrorResponse] = TypeAdapter(
    Annotated[Progress | Response | ErrorResponse, Field(discriminator="kind")], config=ConfigDict(defer_build=True)
)
