"""The allocator's settings are accepted where they exist."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

LIBRARY, VERSION = platform.libc_ver()


@pytest.mark.skipif(
    LIBRARY != "glibc" or tuple(map(int, VERSION.split("."))) < (2, 33), reason="settings and mallinfo2 of glibc"
)
def test_freed_blocks_are_returned_to_the_operating_system() -> None:
    """Glibc counts what it keeps: without the setting, blocks below 32 MB stay in a heap once one of them was freed."""
    script = """
import ctypes, sys
from peft_core.system.allocator import limit_retained_memory
if sys.argv[1] == "limited":
    assert limit_retained_memory()
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = type("Info", (ctypes.Structure,), {"_fields_": [(str(n), ctypes.c_size_t) for n in range(10)]})
blocks = [bytes(4 << 20)]
blocks.clear()
before = getattr(libc.mallinfo2(), "4")  # hblkhd: bytes in blocks that were mapped one by one
blocks.append(bytes(3 << 20))
print(getattr(libc.mallinfo2(), "4") - before)
"""
    mapped = {
        mode: int(
            subprocess.run([sys.executable, "-c", script, mode], capture_output=True, text=True, check=True).stdout
        )
        for mode in ("default", "limited")
    }
    assert mapped["default"] == 0
    assert mapped["limited"] >= 3 << 20
