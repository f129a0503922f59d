"""What a check of an accelerator found: does it compute what the CPU computes in float32?"""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import Literal

from peft_core.schemas.frozen import FrozenModel

NumberFormat = Literal["float32", "tf32", "float16", "bfloat16"]


class DeviceKey(FrozenModel):
    """What a check is valid for. It names no user, host, path or base model."""

    machine: str  # digest of the host's name: several machines may share a data directory
    system: str  # "Linux", "macOS 15.1"
    device: str  # "cuda", "mps"
    device_name: str  # "NVIDIA H100"
    driver: str
    torch: str  # version
    number_format: NumberFormat  # of products with the base model's weights
    way: str  # "llama with heads of 64; documents packed; head in chunks"

    @property
    def digest(self) -> str:
        """A name for files."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]


class GradientDifference(FrozenModel):
    """How far loss and gradients of a device are from those of the CPU in float32. All figures are relative to these."""

    loss: float
    gradient: float  # |g - g'| / |g'| of the whole gradient, 2-norms
    worst: float  # the same for the tensor in which it is largest
    worst_tensor: str
    scale: float  # |<g, g'> / <g', g'> - 1|: what rounding, which has no direction, barely changes


class Tolerance(FrozenModel):
    """The largest difference of each kind that rounding explains."""

    loss: float
    gradient: float
    worst: float
    scale: float


class Outcome(StrEnum):
    AGREES = "agrees"
    DIFFERS = "differs"
    OUT_OF_MEMORY = "out_of_memory"  # on the device
    TOO_LARGE = "too_large"  # the run takes more of the device's memory than was estimated, and than it may take
    FAILED = "failed"  # the device raised another error
    SKIPPED = "skipped"


class DeviceCheck(FrozenModel):
    """The result of one check."""

    key: DeviceKey
    outcome: Outcome
    reason: str = ""  # unless it agrees
    memory_note: str = ""  # set if the measured memory differs from the estimate
    difference: GradientDifference | None = None
    rounding: GradientDifference | None = None  # of the CPU with products rounded as on the device
    tolerance: Tolerance | None = None
    tokens: int = 0  # that were compared
    layers: int = 0  # that were compared, of `total_layers`
    total_layers: int = 0
    measured_bytes: int | None = None  # of the device, for the largest micro-batch of the run, without optimiser
    expected_bytes: int | None = None  # the same part of the estimate
    seconds: float = 0.0
    checked_at: str = ""  # ISO 8601, UTC
    version: str = ""  # of peft-mcp

    @property
    def may_train(self) -> bool:
        """Whether the run uses the device."""
        return self.outcome in (Outcome.AGREES, Outcome.SKIPPED)

    @property
    def in_words(self) -> str:
        """The finding as a clause, without what follows from it."""
        match self.outcome:
            case Outcome.AGREES:
                text = f"{self.key.device} computes the same as the CPU within rounding"
            case Outcome.DIFFERS:
                text = f"{self.key.device} computes something else than the CPU: {self.reason}"
            case Outcome.OUT_OF_MEMORY:
                text = f"{self.key.device} ran out of memory when it was checked: {self.reason}"
            case Outcome.TOO_LARGE:
                text = f"{self.key.device} would take too much memory: {self.reason}"
            case Outcome.FAILED:
                text = f"{self.key.device} failed when it was checked: {self.reason}"
            case Outcome.SKIPPED:
                text = f"{self.key.device} was not checked against the CPU: {self.reason}"
        return f"{text}; {self.memory_note}" if self.memory_note else text
