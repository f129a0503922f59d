"""This process as the operating system sees it: peak memory, the allocator, threads."""

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
# Larger blocks go back at once. Where memory is scarce even the inputs of layers are such, of short micro-batches too: in the
# heap each is surrounded by holes of what was freed beside it.
_KEPT_BYTES, _SPARING_BYTES = 8 << 20, 512 << 10


def peak_memory_bytes() -> int:
    """Peak resident memory of this process since it began: VmHWM on Linux, `ru_maxrss` elsewhere."""
    if sys.platform == "linux":
        for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kilobytes


def memory_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def seconds_alive() -> float:
    """Since the operating system started this process: imports count."""
    return time.time() - float(psutil.Process().create_time())


_kept_up_to_bytes = 0


def set_malloc_keep(up_to_bytes: int = 0) -> None:
    """Let glibc reuse freed activations instead of asking the kernel for zeroed pages each time: +7-12 % speed.

    `up_to_bytes`: of the whole process, for `return_surplus_memory`.
    """
    global _kept_up_to_bytes  # noqa: PLW0603 -- there is one heap in a process
    _kept_up_to_bytes = up_to_bytes
    _map_from(_KEPT_BYTES)


def set_malloc_trim() -> None:
    """From now on give what is freed back at once: slower, and without the holes that large blocks leave in glibc's heap.

    Best before anything large is allocated: room that the heap has taken once is filled first, whatever the size.
    """
    global _kept_up_to_bytes  # noqa: PLW0603 -- likewise
    _kept_up_to_bytes = 0
    _map_from(_SPARING_BYTES)


def _map_from(size: int) -> None:
    if (libc := _glibc()) is not None:
        libc.mallopt(_M_MMAP_THRESHOLD, size)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * size)


def return_freed_memory() -> None:
    """Give the holes that freed tensors left in glibc's heap back to the operating system."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def trim_if_above() -> None:
    """The same once the process holds more than it should keep.

    For after a micro-batch: they differ in length, and each leaves holes that the next cannot fill.
    """
    if memory_bytes() > _kept_up_to_bytes:
        return_freed_memory()


def madvise_pageout(address: int, size: int) -> None:
    """Let go of memory that was read from a mapped file, where the system can. What is read again comes from the file."""
    page = os.sysconf("SC_PAGE_SIZE") if sys.platform == "linux" else 0
    if (libc := _glibc()) is not None and page:
        first, end = -(-address // page) * page, (address + size) // page * page
        if first < end:
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_PAGEOUT)  # advice: may be refused


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None  # musl has neither
