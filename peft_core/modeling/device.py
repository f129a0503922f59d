"""The device to compute on and its number formats."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

import torch

from peft_core.errors import InvalidArgument
from peft_core.modeling import mps
from peft_core.schemas.device_check import NumberFormat
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


def without(machine: Machine, requested: DeviceName, distrusted: Collection[str]) -> Machine:
    """Return the machine without devices that a check found to compute something else than the CPU, unless one is asked for."""
    if requested != "auto":
        return machine
    return replace(machine, mps=machine.mps and "mps" not in distrusted, cuda=machine.cuda and "cuda" not in distrusted)


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


@dataclass(frozen=True)
class DeviceIdentity:
    """What an accelerator is called, and what drives it."""

    name: str
    driver: str
    system: str


def identify(device: torch.device) -> DeviceIdentity:
    """Return the name of a device, the version of its driver, and the operating system, which drives Apple's GPUs."""
    match device.type:
        case "cuda":
            driver = f"{'ROCm' if torch.version.hip else 'CUDA'} {torch.version.hip or torch.version.cuda}"
            return DeviceIdentity(torch.cuda.get_device_name(device), driver, platform.system())
        case "mps":
            system = f"macOS {platform.mac_ver()[0]}"
            return DeviceIdentity(mps.name(), system, system)
        case _:
            return DeviceIdentity(platform.machine(), "", platform.system())


def number_format(weights: torch.dtype, device: torch.device) -> NumberFormat:
    """Return the format of products with weights of this type: float32 products of a GPU may be rounded to TF32."""
    if weights == torch.bfloat16:
        return "bfloat16"
    if weights == torch.float16:
        return "float16"
    return "tf32" if device.type == "cuda" and torch.get_float32_matmul_precision() != "highest" else "float32"


def forget_peak_memory(device: torch.device) -> None:
    """Let `device_memory_bytes` report what is held from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def release_memory(device: torch.device) -> None:
    """Return the unused memory of torch's allocator to the device's driver. Does nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    mps.release_cache(device)


def device_memory_bytes(device: torch.device) -> int:
    """Return the accelerator memory that torch holds (MPS) or held at its peak (CUDA); 0 on the CPU."""
    match device.type:
        case "cuda":
            return torch.cuda.max_memory_allocated(device)
        case "mps":
            return mps.memory_bytes()
        case _:
            return 0


def recommended_memory_bytes(device: torch.device) -> int | None:
    """Return the most that should be taken of a device which shares the computer's memory; None for any other."""
    return mps.recommended_memory_bytes() if device.type == "mps" else None


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
