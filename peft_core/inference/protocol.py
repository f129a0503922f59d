"""What goes between the server and the inference process: one JSON object per line, in each direction.

The server writes `Ask` and `Cancel`; the host answers each Ask with any number of `Progress` and then exactly one
`Answered` or `Failed`. It works on one Ask at a time, in order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from peft_core.schemas.base_model import Base
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.generation import GenerationRequest
from peft_core.schemas.results import ErrorInfo, MemoryState
from peft_core.schemas.training import DeviceName

IDLE_EXIT = 75  # exit code of a host that ended because nobody asked for anything


class HostConfig(FrozenModel):
    """The host's one command-line argument, as JSON."""

    base_models_dir: Path  # cache of converted bases
    max_resident_adapters: int
    idle_s: float
    device: DeviceName = "auto"
    log_level: str = "INFO"


class Load(FrozenModel):
    """Verify the adapter's bytes, load them onto the base, make them active, prove the effect."""

    kind: Literal["load"] = "load"
    adapter_path: Path
    base: Base
    insist: bool = False  # load with the verdict 'shape_only', too


class Unload(FrozenModel):
    """Take one adapter off; None: the active one."""

    kind: Literal["unload"] = "unload"
    adapter_path: Path | None = None


class Generate(FrozenModel):
    kind: Literal["generate"] = "generate"
    request: GenerationRequest
    adapter_path: Path | None = None  # None: the active one
    without_adapter: Base | None = None  # the base alone answers; this one is loaded where none is resident


Command = Annotated[Load | Unload | Generate, Field(discriminator="kind")]


class Request(FrozenModel):
    kind: Literal["ask"] = "ask"
    id: int
    request: Command


class Cancel(FrozenModel):
    """Nobody waits for the answer to this Ask any more."""

    kind: Literal["cancel"] = "cancel"
    id: int


class Progress(FrozenModel):
    kind: Literal["progress"] = "progress"
    id: int
    done: float
    total: float | None
    message: str


class Response(FrozenModel):
    kind: Literal["answered"] = "answered"
    id: int
    answer: dict[str, Any]  # LoadedAdapter, UnloadedAdapter or Generation, by the request
    resident: MemoryState


class ErrorResponse(FrozenModel):
    kind: Literal["failed"] = "failed"
    id: int
    problem: ErrorInfo
    resident: MemoryState


TO_HOST: TypeAdapter[Request | Cancel] = TypeAdapter(
    Annotated[Request | Cancel, Field(discriminator="kind")],
    config=ConfigDict(defer_build=True),
)
FROM_HOST: TypeAdapter[Progress | Response | ErrorResponse] = TypeAdapter(
    Annotated[Progress | Response | ErrorResponse, Field(discriminator="kind")],
    config=ConfigDict(defer_build=True),
)
