"""Facts about this computer that plans are based on, found out without importing torch."""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path("/")
# GPU platforms that torch can be built for, and files that exist where such a GPU works (under WSL 2, NVIDIA's library).
_DRIVERS = {"cuda": ("dev/nvidiactl", "usr/lib/wsl/lib/libcuda.so.1"), "hip": ("dev/kfd",)}
# Files that suggest a GPU: WSL 2's device for any vendor, Jetson's, and a driver whose device files do not exist yet.
_HINTS = ("dev/dxg", "dev/nvhost-gpu", "dev/nvmap", "proc/driver/nvidia/version")
_VISIBLE = "CUDA_VISIBLE_DEVICES"  # torch reads it for GPUs of all vendors
CGROUP = Path("/sys/fs/cgroup")
_CPU_INFO = Path("/proc/cpuinfo")


def expected_device(requested: str, root: Path = _ROOT, builds: Collection[str] | None = None) -> str:
    """Predict the device that the worker will use; the worker decides, with torch."""
    if requested != "auto":
        return requested
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return "mps"
    if _gpus_are_hidden():
        return "cpu"
    builds = torch_builds() if builds is None else builds
    drivers = (driver for build in builds for driver in _DRIVERS[build])
    return "cuda" if any((root / driver).exists() for driver in drivers) else "cpu"


def why_no_cuda(root: Path = _ROOT, builds: Collection[str] | None = None) -> str | None:
    """Explain why torch cannot use a GPU here, or return None if it may. torch calls GPUs of all vendors "cuda"."""
    if sys.platform == "darwin":
        return "there is no CUDA on macOS"
    if not (torch_builds() if builds is None else builds):
        return "the installed torch supports CPUs only (pytorch.org/get-started has other builds)"
    if _gpus_are_hidden():
        return f"{_VISIBLE} hides all GPUs from the server"
    files = (*_DRIVERS["cuda"], *_DRIVERS["hip"], *_HINTS)
    if any((root / file).exists() for file in files):
        return None
    return "no GPU driver was found (no /dev/nvidiactl or /dev/kfd, for instance)"


def _gpus_are_hidden() -> bool:
    """Return whether the environment hides all GPUs: they are visible up to the first number that none of them has."""
    return os.environ.get(_VISIBLE, "0").partition(",")[0].strip() in ("", "-1")


def torch_builds() -> set[str]:
    """Return the platforms of `_DRIVERS` that the installed torch supports, read from its version.py without importing it."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return set()
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:  # its installation is damaged; the worker says how
        return set()
    return {build for build in _DRIVERS if re.search(rf"^{build}\b[^=\n]*= *['\"]", text, re.MULTILINE)}


def cpu_multiplies_bfloat16(cpu_info: Path = _CPU_INFO) -> bool:
    """Return whether the CPU multiplies bf16 matrices in hardware; training in bf16 is then 1.5 times as fast as in float32.

    Matrix units (Intel AMX) and vector units (AVX-512 BF16, AMD since Zen 4) were measured at 7 and 2.1 times the speed of
    float32. Without either, bf16 is emulated and five times slower.
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


def total_memory_bytes() -> int:
    """Return the memory of this machine, or of the container that limits it (cgroup v2)."""
    import psutil  # noqa: PLC0415 -- not at the server's start

    total = int(psutil.virtual_memory().total)
    try:
        return min(total, int((CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # memory.max contains "max" if there is no limit
        return total


def available_memory_bytes() -> int:
    """Return the memory that a new process can use without swapping, within the limit of the container (cgroup v2)."""
    import psutil  # noqa: PLC0415 -- not at the server's start

    available = int(psutil.virtual_memory().available)
    try:  # memory.max contains "max" if there is no limit
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        # The kernel frees cached files on demand:
        used -= next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
        available = min(available, limit - used)
    except (OSError, ValueError):
        pass
    return max(0, available)
