"""What goes between the server and the inference process: one JSON object per line, in each direction.

The server writes `Ask` and `Cancel`; the host answers each Ask with any number of `Progress` and then exactly one
`Answered` or `Failed`. It works on one Ask at a time, in order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter

from peft_core.generation import GenerationRequest
from peft_core.results import Problem, Resident
from peft_core.spec import Base, DeviceName, Frozen

IDLE_EXIT = 75  # exit code of a host that ended because nobody asked for anything


class HostConfig(Frozen):
    """The host's one command-line argument, as JSON."""

    base_models_dir: Path  # cache of converted bases
    max_resident_adapters: int
    idle_s: float
    device: DeviceName = "auto"
    log_level: str = "INFO"


class Load(Frozen):
    """Verify the adapter's bytes, load them onto the base, make them active, prove the effect."""

    kind: Literal["load"] = "load"
    adapter_path: Path
    base: Base
    insist: bool = False  # load with the verdict 'shape_only', too


class Unload(Frozen):
    """Take one adapter off; None: the active one."""

    kind: Literal["unload"] = "unload"
    adapter_path: Path | None = None


class Generate(Frozen):
    kind: Literal["generate"] = "generate"
    request: GenerationRequest
    adapter_path: Path | None = None  # None: the active one
    without_adapter: Base | None = None  # the base alone answers; this one is loaded where none is resident


Request = Annotated[Load | Unload | Generate, Field(discriminator="kind")]


class Ask(Frozen):
    kind: Literal["ask"] = "ask"
    id: int
    request: Request


class Cancel(Frozen):
    """Nobody waits for the answer to this Ask any more."""

    kind: Literal["cancel"] = "cancel"
    id: int


class Progress(Frozen):
    kind: Literal["progress"] = "progress"
    id: int
    done: float
    total: float | None
    message: str


class Answered(Frozen):
    kind: Literal["answered"] = "answered"
    id: int
    answer: dict[str, Any]  # LoadedAdapter, UnloadedAdapter or Generation, by the request
    resident: Resident


class Failed(Frozen):
    kind: Literal["failed"] = "failed"
    id: int
    problem: Problem
    resident: Resident


TO_HOST: TypeAdapter[Ask | Cancel] = TypeAdapter(
    Annotated[Ask | Cancel, Field(discriminator="kind")], config=ConfigDict(defer_build=True)
)
FROM_HOST: TypeAdapter[Progress | Answered | Failed] = TypeAdapter(
    Annotated[Progress | Answered | Failed, Field(discriminator="kind")], config=ConfigDict(defer_build=True)
)
