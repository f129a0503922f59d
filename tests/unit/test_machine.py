"""What is known of this computer without torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from peft_core.machine import available_memory_bytes, cpu_multiplies_bfloat16, expected_device, why_no_cuda


def test_a_device_that_was_asked_for_is_taken_at_its_word() -> None:
    assert expected_device("cuda") == "cuda"
    assert expected_device("auto") in ("mps", "cuda", "cpu")


@pytest.mark.skipif(sys.platform == "darwin", reason="there is none whatever is looked for")
@pytest.mark.parametrize(
    ("torch", "driver", "missing"),
    [
        ("2.13.0", "nvidiactl", None),
        ("2.13.0+cu130", "dxg", None),
        ("2.13.0+cu130", "kfd", "no NVIDIA GPU"),
        ("2.13.0+rocm7.0", "kfd", None),
        ("2.13.0+rocm7.0", "nvidiactl", "no AMD GPU"),
        ("2.13.0+cpu", "nvidiactl", "built for CPUs alone"),
        ("2.13.0", "null", "no NVIDIA GPU"),
    ],
)
def test_a_gpu_is_expected_where_torchs_build_and_the_driver_are_for_the_same(
    tmp_path: Path, torch: str, driver: str, missing: str | None
) -> None:
    (tmp_path / driver).touch()
    found = why_no_cuda(tmp_path, torch)
    assert found is None if missing is None else missing in str(found)


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
