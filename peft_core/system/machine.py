"""This computer as far as it can be known without torch: what a plan rests on."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path("/")
# What torch can be built for, with files that are there where such a GPU works. Behind WSL 2 NVIDIA's library is the sign.
_DRIVERS = {"cuda": ("dev/nvidiactl", "usr/lib/wsl/lib/libcuda.so.1"), "hip": ("dev/kfd",)}
# Of a GPU that may be: WSL 2's device for any maker's, Jetson's, a driver whose device files are not made yet.
_SIGNS = ("dev/dxg", "dev/nvhost-gpu", "dev/nvmap", "proc/driver/nvidia/version")
CGROUP = Path("/sys/fs/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")


def expected_device(requested: str, root: Path = _ROOT, builds: Collection[str] | None = None) -> str:
    """The device that training will most likely take; the training process decides, with torch at hand."""
    if requested != "auto":
        return requested
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mps"
    builds = torch_builds() if builds is None else builds
    drivers = (driver for build in builds for driver in _DRIVERS[build])
    return "cuda" if any((root / driver).exists() for driver in drivers) else "cpu"


def why_no_cuda(root: Path = _ROOT, builds: Collection[str] | None = None) -> str | None:
    """What keeps torch from a GPU for certain, in words. None: it may find one, which it calls "cuda" whoever made it."""
    if sys.platform == "darwin":
        return "there is no CUDA on macOS"
    if not (torch_builds() if builds is None else builds):
        return "the installed torch is built for CPUs alone (pytorch.org/get-started has the other builds)"
    signs = (*_DRIVERS["cuda"], *_DRIVERS["hip"], *_SIGNS)
    there = any((root / sign).exists() for sign in signs)
    return None if there else "there is no sign of a GPU's driver, such as /dev/nvidiactl or /dev/kfd"


def torch_builds() -> set[str]:
    """Of `_DRIVERS`, what the installed torch is built for: read from its version.py, as torch is not imported here."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return set()
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    return {build for build in _DRIVERS if re.search(rf"^{build}\b[^=\n]*= *['\"]", text, re.MULTILINE)}


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


def usable_cores() -> int:
    """Return the physical cores that this process may run on: two threads on one core only take turns at its vector units.

    Training uses as many threads, and the cost model plans with them.
    """
    import psutil  # noqa: PLC0415 -- not at the server's start

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    logical = psutil.cpu_count(logical=True) or allowed
    physical = psutil.cpu_count(logical=False) or logical
    return max(1, allowed * physical // logical)


def available_memory_bytes() -> int:
    """Memory that a new process can take without pushing others out: of the machine, and of the container's share."""
    import psutil  # noqa: PLC0415 -- not at the server's start

    available = int(psutil.virtual_memory().available)
    try:  # cgroup v2; "max" where there is no limit
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        used -= next(
            (int(line.split()[1]) for line in lines if line.startswith("inactive_file ")),
            0,
        )  # read files, let go
        available = min(available, limit - used)
    except (OSError, ValueError):
        pass
    return max(0, available)
