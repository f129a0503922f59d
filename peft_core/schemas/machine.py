"""What torch can compute on here: the answer of `peft_core.modeling.describe_machine`."""

from __future__ import annotations

from peft_core.schemas.frozen import FrozenModel


class MachineRequest(FrozenModel):
    """There is nothing to say."""


class MachineAnswer(FrozenModel):
    torch: str  # version
    libraries: dict[str, str]  # name -> version
    device: str  # that `auto` takes
    device_name: str = ""  # of a GPU
    device_memory_bytes: int = 0  # of a GPU
    arithmetic: str  # number formats, in words
