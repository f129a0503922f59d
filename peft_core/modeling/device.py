"""The device to compute on and its number formats."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal

import torch

from peft_core.errors import InvalidArgument
from peft_core.modeling import mps
from peft_core.schemas.training import DeviceName, Precision
from peft_core.system.machine import usable_cores

ChosenDevice = Literal["mps", "cuda", "cpu"]

_WHY_FLOAT32: dict[ChosenDevice, str] = {
    "mps": "float32: bfloat16 on MPS needs macOS 14",
    "cuda": "float32: this GPU has no bfloat16 units",
    "cpu": "float32",  # unless the compute plan says bf16: without bf16 units a CPU is five times slower in it
}


@dataclass(frozen=True)
class Machine:
    """The devices that torch can use on this computer."""

    mps: bool = False
    mps_bfloat16: bool = False  # macOS 14 or later
    cuda: bool = False
    cuda_bfloat16: bool = False  # in hardware: emulation is slower than float32
    mps_flops: float | None = None  # floating point operations per second; set if both were timed
    cpu_flops: float | None = None


@dataclass(frozen=True)
class DevicePlan:
    """A device, the type of the frozen weights and of the arithmetic. Adapter, optimiser and losses are always float32."""

    device: ChosenDevice
    weights: torch.dtype
    autocast: Literal["no", "bf16"]  # accelerate's name of the mixed precision
    note: str


def describe() -> Machine:
    """Ask torch about this computer."""
    cuda = torch.cuda.is_available()
    return Machine(
        mps=mps.is_available(),
        mps_bfloat16=mps.has_bfloat16(),
        cuda=cuda,
        cuda_bfloat16=cuda and torch.cuda.is_bf16_supported(including_emulation=False),
    )


def choose(requested: DeviceName, machine: Machine, precision: Precision = "auto") -> DevicePlan:
    """Choose the device of a machine. 'auto' takes MPS, else CUDA, else the CPU; the faster of MPS and CPU if both were timed.

    Raises:
        InvalidArgument: the machine does not have the requested device.
    """
    available: list[ChosenDevice] = ["cpu"]
    if machine.cuda:
        available.insert(0, "cuda")
    if machine.mps:
        available.insert(0, "mps")
    if requested != "auto" and requested not in available:
        raise InvalidArgument(
            "config.device",
            requested,
            f"this machine has {', '.join(available)}",
            suggestions=["Use device='auto' to take the fastest one available."],
        )
    if (
        requested == "auto"
        and available[0] == "mps"
        and machine.mps_flops is not None
        and machine.cpu_flops is not None
    ):
        plan = choose("mps" if machine.mps_flops >= machine.cpu_flops else "cpu", machine, precision)
        speeds = f"MPS {machine.mps_flops / 1e12:.1f} TFLOP/s, CPU {machine.cpu_flops / 1e12:.1f} TFLOP/s"
        return replace(plan, note=f"{plan.note}; {speeds}")
    device = available[0] if requested == "auto" else requested
    if precision == "float32":
        return DevicePlan(device, torch.float32, "no", "float32, as requested")
    match device:
        case "mps" if machine.mps_bfloat16:
            # Not float16: its range overflows in training and gives NaN on MPS.
            return DevicePlan("mps", torch.bfloat16, "no", "frozen weights in bfloat16, adapter in float32")
        case "cuda" if machine.cuda_bfloat16:
            return DevicePlan("cuda", torch.bfloat16, "bf16", "bfloat16 arithmetic, adapter in float32")
        case _:
            return DevicePlan(device, torch.float32, "no", _WHY_FLOAT32[device])


def use_cores() -> None:
    """Use one thread for each usable core, unless the user set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())


def device_memory_bytes(device: torch.device) -> int:
    """Return the accelerator memory that torch holds (MPS) or held at its peak (CUDA); 0 on the CPU."""
    match device.type:
        case "cuda":
            return torch.cuda.max_memory_allocated(device)
        case "mps":
            return mps.memory_bytes()
        case _:
            return 0


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the states of the random generators that dropout uses, by device type."""
    states = {"cpu": torch.get_rng_state()}
    match device.type:
        case "cuda":
            states["cuda"] = torch.cuda.get_rng_state(device)
        case "mps":
            states["mps"] = mps.rng_state()
    return states


def set_rng_state(device: torch.device, states: dict[str, torch.Tensor]) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(states["cpu"])
    match device.type:
        case "cuda" if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], device)
        case "mps" if "mps" in states:
            mps.set_rng_state(states["mps"])


def timed(requested: DeviceName, machine: Machine, precision: Precision = "auto") -> Machine:
    """Return the machine with the speeds of MPS and CPU if 'auto' has to choose between them. Takes up to two seconds."""
    if requested != "auto" or not machine.mps:
        return machine
    plans = choose("mps", machine, precision), choose("cpu", machine, precision)
    of_mps, of_cpu = (mps.flops(plan.device, plan.weights) for plan in plans)
    return replace(machine, mps_flops=of_mps, cpu_flops=of_cpu)
