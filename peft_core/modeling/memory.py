"""Memory of a worker process: resident size, and how glibc's heap gives memory back.

glibc keeps freed blocks for reuse, which is fast, and fragments them, which costs memory. The policy of the process is one of

- keep (`set_malloc_keep`): freed blocks up to 8 MB stay in the heap; `trim_if_above` returns them above a limit. 7-12 % faster.
- trim (`set_malloc_trim`): blocks of 512 kB and more go back to the kernel when they are freed. About 90 MB less at the peak.

Set the policy at the start of the process, before anything large is allocated, because memory that the heap already has is
reused first under both policies. Switching from keep to trim later, when memory runs out, affects new blocks only. During
training, call `trim_if_above` after each micro-batch. Without glibc (macOS, musl) all of this does nothing.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from pathlib import Path

import psutil

# glibc's <malloc.h>
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MADV_PAGEOUT = 21  # Linux's <sys/mman.h>
# Larger blocks are mapped one by one, and unmapped when they are freed. Where memory is scarce, the limit must be low enough
# for the layer inputs of short micro-batches, because in the heap each of them would be surrounded by fragments.
_KEEP_THRESHOLD_BYTES, _TRIM_THRESHOLD_BYTES = 8 << 20, 512 << 10


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process: VmHWM on Linux, `ru_maxrss` elsewhere."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def memory_bytes() -> int:
    """Return the current resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def seconds_alive() -> float:
    """Return the seconds since the operating system started this process, imports included."""
    return time.time() - float(psutil.Process().create_time())


_keep_up_to_bytes = 0  # resident memory above which `trim_if_above` acts


def set_malloc_keep(up_to_bytes: int = 0) -> None:
    """Let glibc reuse freed activations instead of asking the kernel for zeroed pages each time.

    `up_to_bytes`: resident memory of the process up to which `trim_if_above` leaves the heap alone.
    """
    _set_policy(_KEEP_THRESHOLD_BYTES, up_to_bytes)


def set_malloc_trim() -> None:
    """From now on return large freed blocks to the operating system immediately: slower, with less fragmentation."""
    _set_policy(_TRIM_THRESHOLD_BYTES, 0)


def _set_policy(threshold_bytes: int, keep_up_to_bytes: int) -> None:
    global _keep_up_to_bytes  # noqa: PLW0603 -- a process has one heap
    _keep_up_to_bytes = keep_up_to_bytes
    _set_threshold(threshold_bytes)


def _set_threshold(threshold_bytes: int) -> None:
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, threshold_bytes)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * threshold_bytes)


def return_freed_memory() -> None:
    """Return the free memory in glibc's heap to the operating system."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def trim_if_above() -> None:
    """Call `return_freed_memory` if the process holds more than the policy keeps.

    Call it after each micro-batch: they differ in length, and each leaves free blocks that do not fit the next one.
    """
    if memory_bytes() > _keep_up_to_bytes:
        return_freed_memory()


def madvise_pageout(address: int, size: int) -> None:
    """Drop pages of a mapped file from resident memory, on Linux. They are read from the file again when needed."""
    page = os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 0
    if (libc := _glibc()) is not None and page:
        first, end = -(-address // page) * page, (address + size) // page * page
        if first < end:
            # The kernel may ignore this.
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_PAGEOUT)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None  # musl has neither
