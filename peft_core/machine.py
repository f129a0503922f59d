"""This computer as far as it can be known without torch: what a plan rests on."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_DEVICES = Path("/dev")
CGROUP = Path("/sys/fs/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")


def expected_device(requested: str) -> str:
    """The device that training will most likely take; the training process decides, with torch at hand."""
    if requested != "auto":
        return requested
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mps"
    return "cuda" if why_no_cuda() is None else "cpu"


def why_no_cuda(devices: Path = _DEVICES, torch: str | None = None) -> str | None:
    """What keeps torch from a GPU that it calls "cuda", in words; None where nothing is seen to. `torch`: its version."""
    if sys.platform == "darwin":
        return "there is no CUDA on macOS"
    try:
        build = (torch or version("torch")).partition("+")[2]  # "" of PyPI's, which is for CUDA
    except PackageNotFoundError:
        return "torch is not installed"
    if build.startswith("cpu"):
        return "the installed torch is built for CPUs alone (pytorch.org/get-started has the other builds)"
    if build.startswith("rocm"):
        return None if (devices / "kfd").exists() else "there is no AMD GPU with a driver (/dev/kfd is missing)"
    drivers = ("nvidiactl", "dxg")  # dxg: Windows's driver, behind WSL 2
    there = any((devices / driver).exists() for driver in drivers)
    return None if there else "there is no NVIDIA GPU with a driver (/dev/nvidiactl is missing)"


def cpu_multiplies_bfloat16(cpu_info: Path = _CPU_INFO) -> bool:
    """Whether the CPU has units for products in bfloat16, with which a whole training is half as fast again as in float32.

    Matrix units (Intel's AMX) or vector units (AVX-512 BF16, AMD since Zen 4): their products were measured 7 and 2.1 times as
    fast as float32's. By emulation they are five times slower.
    """
    try:
        with cpu_info.open(encoding="ascii", errors="replace") as lines:
            flags = next((line.split() for line in lines if line.startswith("flags")), [])
    except OSError:  # not Linux
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def available_memory_bytes() -> int:
    """Memory that a new process can take without pushing others out: of the machine, and of the container's share."""
    import psutil  # noqa: PLC0415 -- not at the server's start

    available = int(psutil.virtual_memory().available)
    try:  # cgroup v2; "max" where there is no limit
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        used -= next(
            (int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0
        )  # read files, let go
        available = min(available, limit - used)
    except (OSError, ValueError):
        pass
    return max(0, available)
