"""Keep the C library's allocator from holding on to freed memory."""

from __future__ import annotations

import ctypes

# From glibc's malloc.h.
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

MAX_ARENAS = 2
MMAP_FROM_BYTES = 256 << 10


def limit_retained_memory() -> bool:
    """Let few threads share each heap, and return large blocks to the operating system when they are freed.

    By default glibc gives each thread a heap of its own, up to eight per core, and after the first large block that is freed
    it keeps blocks of that size in those heaps. Call this before threads start; other C libraries need no such setting.

    Returns:
        Whether the C library has these settings and accepted them.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_ARENA_MAX, MAX_ARENAS), (_M_MMAP_THRESHOLD, MMAP_FROM_BYTES))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
