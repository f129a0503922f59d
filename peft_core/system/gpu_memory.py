"""The memory that a training may take on a device, found out without torch."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess

from peft_core.system.machine import total_memory_bytes

TIMEOUT_S = 5.0  # the driver may have to be loaded first
_MIB = 1 << 20  # the unit of nvidia-smi


def device_memory_bytes(device: str) -> int | None:
    """Return the memory of a device, of several GPUs that of the smallest; None if it is not known.

    Apple GPUs share the memory of the machine.
    """
    return _gpu_memory_bytes() if device == "cuda" else total_memory_bytes()


@functools.cache
def _gpu_memory_bytes() -> int | None:
    program = shutil.which("nvidia-smi")
    if program is None:  # AMD, or WSL without the tool
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").strip()
    selected = ["-i", visible] if visible else []
    command = [program, *selected, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)  # noqa: S603
        sizes = [int(line) * _MIB for line in answer.stdout.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError, ValueError):  # no driver, or a GPU that shares the machine's memory
        return None
    return min(sizes, default=None)
