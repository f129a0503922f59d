"""Where to compute, and in which number formats. The only file that knows devices apart."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from peft_core.errors import InvalidArgument
from peft_core.modeling.threads import SHAPE
from peft_core.schemas.training import DeviceName, Precision
from peft_core.system.machine import usable_cores

ChosenDevice = Literal["mps", "cuda", "cpu"]

_WHY_FLOAT32: dict[ChosenDevice, str] = {
    "mps": "float32: bfloat16 on MPS needs macOS 14",
    "cuda": "float32: this GPU has no bfloat16 units",
    "cpu": "float32",  # unless the task says otherwise: a CPU without units for bfloat16 is five times slower in it
}
_MPS_MULTIPLE = 256  # tokens: two shapes at the default max_length, and about a tenth of the work for nothing


@dataclass(frozen=True)
class Machine:
    """What this computer offers to torch."""

    mps: bool = False
    mps_bfloat16: bool = False  # macOS 14 or later
    cuda: bool = False
    cuda_bfloat16: bool = False  # in hardware: emulation is slower than float32
    mps_flops: float | None = None  # floating point operations per second, where both were timed (speed.py)
    cpu_flops: float | None = None


@dataclass(frozen=True)
class DevicePlan:
    """Formats of the frozen weights and of the arithmetic; the adapter, its optimiser and losses are always float32."""

    device: ChosenDevice
    weights: torch.dtype
    autocast: Literal["no", "bf16"]  # accelerate's name of the mixed precision
    note: str


def describe() -> Machine:
    """Ask torch about this computer."""
    mps, cuda = torch.backends.mps.is_available(), torch.cuda.is_available()
    return Machine(
        mps=mps,
        mps_bfloat16=mps and torch.backends.mps.is_macos_or_newer(14, 0),
        cuda=cuda,
        cuda_bfloat16=cuda and torch.cuda.is_bf16_supported(including_emulation=False),
    )


def choose(requested: DeviceName, machine: Machine, precision: Precision = "auto") -> DevicePlan:
    """Decide for a machine. 'auto': MPS, else CUDA, else the CPU; of MPS and CPU the faster, where both were timed.

    Raises:
        InvalidArgument: the requested device is not there.
    """
    there: list[ChosenDevice] = ["cpu"]
    if machine.cuda:
        there.insert(0, "cuda")
    if machine.mps:
        there.insert(0, "mps")
    if requested != "auto" and requested not in there:
        raise InvalidArgument(
            "config.device",
            requested,
            f"this machine has {', '.join(there)}",
            suggestions=["Use device='auto': it takes the fastest one there is."],
        )
    if requested == "auto" and there[0] == "mps" and machine.mps_flops is not None and machine.cpu_flops is not None:
        plan = choose("mps" if machine.mps_flops >= machine.cpu_flops else "cpu", machine, precision)
        speeds = f"MPS {machine.mps_flops / 1e12:.1f} TFLOP/s, CPU {machine.cpu_flops / 1e12:.1f} TFLOP/s"
        return replace(plan, note=f"{plan.note}; {speeds}")
    device = there[0] if requested == "auto" else requested
    if precision == "float32":
        return DevicePlan(device, torch.float32, "no", "float32, as asked for")
    match device:
        case "mps" if machine.mps_bfloat16:
            # Not float16: its range overflows in training and gives NaN on MPS.
            return DevicePlan("mps", torch.bfloat16, "no", "frozen weights in bfloat16, adapter in float32")
        case "cuda" if machine.cuda_bfloat16:
            return DevicePlan("cuda", torch.bfloat16, "bf16", "bfloat16 arithmetic, adapter in float32")
        case _:
            return DevicePlan(device, torch.float32, "no", _WHY_FLOAT32[device])


def use_cores() -> None:
    """One thread for each core that this process may use."""
    if "OMP_NUM_THREADS" not in os.environ:  # whoever set it knows better
        torch.set_num_threads(usable_cores())


def device_memory_bytes(device: torch.device) -> int:
    """Memory of the accelerator that torch holds (MPS) or held at its peak (CUDA); 0 on the CPU."""
    match device.type:
        case "cuda":
            return torch.cuda.max_memory_allocated(device)
        case "mps":
            return torch.mps.driver_allocated_memory()
        case _:
            return 0


def fixed_shapes(device: torch.device) -> int | None:
    """What numbers of tokens must be multiples of: MPS's allocator keeps a pool for each shape, so there are to be few."""
    return _MPS_MULTIPLE if device.type == "mps" else None


def release_cache(device: torch.device) -> None:
    """Return unused blocks on MPS, whose allocator keeps a pool for each shape and grows with every new length."""
    if device.type == "mps":
        torch.mps.empty_cache()


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Generator states that dropout draws from, by device type."""
    states = {"cpu": torch.get_rng_state()}
    match device.type:
        case "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        case "mps":
            states["mps"] = torch.mps.get_rng_state()
    return states


def set_rng_state(device: torch.device, states: dict[str, torch.Tensor]) -> None:
    """Go on drawing where `rng_state` was taken."""
    torch.set_rng_state(states["cpu"])
    match device.type:
        case "cuda" if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
        case "mps" if "mps" in states:
            torch.mps.set_rng_state(states["mps"])


# FOLDED FROM peft_core.modeling.device: How fast a device multiplies matrices. A new Mac's CPU (SME) may be about as
# fast as its GPU: hence both are timed.

_AT_MOST_S = 1.0
_TOGETHER = 8  # products handed over before waiting: one by one a GPU would mostly wait, and training does not


def timed(requested: DeviceName, machine: Machine, precision: Precision = "auto") -> Machine:
    """The machine with the speeds of MPS and CPU, where there is a choice between them; two seconds at most."""
    if requested != "auto" or not machine.mps:
        return machine
    plans = choose("mps", machine, precision), choose("cpu", machine, precision)
    mps, cpu = (flops(plan.device, plan.weights) for plan in plans)
    return replace(machine, mps_flops=mps, cpu_flops=cpu)


def flops(
    device: str,
    dtype: torch.dtype,
    at_most_s: float = _AT_MOST_S,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Floating point operations per second in products of a typical layer, the first ones (compilation) left out."""
    rows, inner, columns = SHAPE
    synchronise = torch.mps.synchronize if device == "mps" else _nothing
    left = torch.ones(rows, inner, dtype=dtype, device=device)
    right = torch.ones(inner, columns, dtype=dtype, device=device)

    def compute() -> None:
        for _ in range(_TOGETHER):
            torch.mm(left, right)
        synchronise()

    end = clock() + at_most_s
    compute()
    began, batches = clock(), 0
    while batches == 0 or clock() < end:
        compute()
        batches += 1
    return 2 * rows * inner * columns * _TOGETHER * batches / (clock() - began)


def _nothing() -> None:
    """The CPU has done what it was told when the call returns."""
