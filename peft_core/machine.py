"""This computer as far as it can be known without torch: what a plan rests on."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")


def expected_device(requested: str) -> str:
    """The device that training will most likely take; the training process decides, with torch at hand."""
    if requested != "auto":
        return requested
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mps"
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


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
