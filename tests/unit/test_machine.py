"""What is known of this computer without torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.machine import available_memory_bytes, cpu_multiplies_bfloat16, expected_device


def test_a_device_that_was_asked_for_is_taken_at_its_word() -> None:
    assert expected_device("cuda") == "cuda"
    assert expected_device("auto") in ("mps", "cuda", "cpu")


@pytest.mark.parametrize(
    ("flags", "there"),
    [
        ("fpu avx512_bf16 amx_bf16 amx_tile", True),
        ("fpu avx512_bf16", True),
        ("fpu avx512f", False),
        ("amx_bf16x", False),
    ],
)
def test_units_for_bfloat16_are_read_from_the_processors_flags(tmp_path: Path, flags: str, there: bool) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nmodel name\t: amx_bf16\nflags\t\t: {flags}\n\n", encoding="ascii")
    assert cpu_multiplies_bfloat16(info) is there


def test_without_such_a_file_nothing_is_claimed(tmp_path: Path) -> None:
    assert not cpu_multiplies_bfloat16(tmp_path / "none")


def test_some_memory_is_available() -> None:
    assert available_memory_bytes() > 0
