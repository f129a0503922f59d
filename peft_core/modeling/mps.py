"""Everything that is special about Apple's GPUs (MPS). None of it has been run on Apple hardware yet.

MPS's allocator keeps a pool for each tensor shape, so training pads micro-batches to few shapes (`fixed_shapes`, which
`batches.join` and the masked attention in `attention.py` follow) and empties the pools after each step (`release_cache`).
Recent Macs have CPUs that multiply about as fast as their GPU, so both are timed (`flops`) before 'auto' chooses one.
`fused_blocks.fuse` leaves MPS alone (`can_fuse`): `out=` with a slice as its target is silently ignored by older versions.
Sums of many losses are float32 there (`sum_dtype`), because MPS has no float64.

No other file calls torch.mps or asks whether a device is one, except `device.choose`, which decides from a description, and
what plans without torch: `system/machine.py` and `planning/cost_model.py`. A test checks this.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from peft_core.modeling.threads import PROBE_SHAPE

_MULTIPLE = 256  # tokens: at the default max_length this gives two shapes, and a tenth of the work is padding
_PROBE_S = 1.0
_PRODUCTS_PER_WAIT = 8  # waiting after each product would leave a GPU idle, which training does not


def is_available() -> bool:
    return torch.backends.mps.is_available()


def has_bfloat16() -> bool:
    """Whether this computer's MPS computes in bfloat16, which needs macOS 14."""
    return is_available() and torch.backends.mps.is_macos_or_newer(14, 0)


def name() -> str:
    """Return the name of Apple's chip, such as "Apple M2 Pro"; "" where torch does not know it (before 2.10)."""
    get_name = getattr(torch.backends.mps, "get_name", None)
    return str(get_name()) if get_name is not None else ""


def is_mps(device: torch.device) -> bool:
    return device.type == "mps"


def can_fuse(device: torch.device) -> bool:
    """Return whether `fused_blocks` may replace a model's modules on this device."""
    return not is_mps(device)


def sum_dtype(device: torch.device) -> torch.dtype:
    """Return the widest type that this device can add up."""
    return torch.float32 if is_mps(device) else torch.float64


def recommended_memory_bytes() -> int:
    """Return how much memory Metal recommends to take at most."""
    return torch.mps.recommended_max_memory()


def memory_bytes() -> int:
    """Return the memory that Metal's driver holds for this process."""
    return torch.mps.driver_allocated_memory()


def rng_state() -> torch.Tensor:
    return torch.mps.get_rng_state()


def set_rng_state(state: torch.Tensor) -> None:
    torch.mps.set_rng_state(state)


def fixed_shapes(device: torch.device) -> int | None:
    """Return the number that token counts must be multiples of on this device; None if any count is fine."""
    return _MULTIPLE if is_mps(device) else None


def release_cache(device: torch.device) -> None:
    """Return unused blocks of MPS's allocator, which grows with every new shape. Does nothing on other devices."""
    if is_mps(device):
        torch.mps.empty_cache()


def flops(
    device: str, dtype: torch.dtype, at_most_s: float = _PROBE_S, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Return the floating point operations per second in products of a typical layer, after a warm-up batch."""
    rows, inner, columns = PROBE_SHAPE
    left = torch.ones(rows, inner, dtype=dtype, device=device)
    right = torch.ones(inner, columns, dtype=dtype, device=device)

    def compute() -> None:
        for _ in range(_PRODUCTS_PER_WAIT):
            torch.mm(left, right)
        if is_mps(left.device):
            torch.mps.synchronize()

    end = clock() + at_most_s
    compute()
    began, batches = clock(), 0
    while batches == 0 or clock() < end:
        compute()
        batches += 1
    return 2 * rows * inner * columns * _PRODUCTS_PER_WAIT * batches / (clock() - began)
