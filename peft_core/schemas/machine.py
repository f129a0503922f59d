"""Requests to children that import torch or transformers, and their answers: `peft_core.modeling.describe_machine`,
`peft_core.modeling.write_tokenizer`.
"""

from __future__ import annotations

from pathlib import Path

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


class TokenizerRequest(FrozenModel):
    gguf: Path
    directory: Path  # exists


class TokenizerAnswer(FrozenModel):
    """The files are written."""
