from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from peft_core.system.machine import (
    available_memory_bytes,
    cpu_multiplies_bfloat16,
    expected_device,
    torch_builds,
    usable_cores,
    why_no_cuda,
)


def test_an_explicitly_requested_device_is_expected_as_it_is() -> None:
    assert expected_device("cuda") == "cuda"


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no CUDA")
@pytest.mark.parametrize(
    ("builds", "file", "expected", "missing"),
    [
        ({"cuda"}, "dev/nvidiactl", "cuda", None),
        ({"cuda"}, "usr/lib/wsl/lib/libcuda.so.1", "cuda", None),
        ({"hip"}, "dev/kfd", "cuda", None),
        ({"cuda"}, "dev/dxg", "cpu", None),  # WSL 2 with a GPU of an unknown vendor
        ({"hip"}, "dev/dxg", "cpu", None),
        ({"cuda"}, "dev/nvhost-gpu", "cpu", None),
        ({"cuda"}, "dev/null", "cpu", "no GPU driver was found"),
        (set(), "dev/nvidiactl", "cpu", "supports CPUs only"),
    ],
)
def test_a_gpu_is_expected_if_its_driver_exists_and_refused_only_if_none_can_work(
    tmp_path: Path, builds: set[str], file: str, expected: str, missing: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).touch()
    assert expected_device("auto", tmp_path, builds) == expected
    reason = why_no_cuda(tmp_path, builds)
    assert reason is None if missing is None else missing in str(reason)


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no CUDA")
@pytest.mark.parametrize(
    ("visible", "expected"), [("", "cpu"), ("-1", "cpu"), ("-1,0", "cpu"), ("0", "cuda"), ("1,-1", "cuda")]
)
def test_no_gpu_is_expected_that_the_user_has_hidden(
    tmp_path: Path, visible: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidiactl").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert expected_device("auto", tmp_path, {"cuda"}) == expected
    assert (why_no_cuda(tmp_path, {"cuda"}) is None) == (expected == "cuda")


@pytest.mark.parametrize(
    ("text", "builds"),
    [
        ("cuda: Optional[str] = None\nhip: Optional[str] = None\n", set()),
        ("cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", {"cuda"}),
        ("cuda = None\nhip = '7.0.51831'\n", {"hip"}),
    ],
)
def test_torch_builds_are_read_without_importing_torch(
    text: str, builds: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('it was imported')")
    (package / "version.py").write_text(f"__all__ = ['cuda', 'hip']\n{text}")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert torch_builds() == builds


@pytest.mark.parametrize(
    ("flags", "supported"),
    [
        ("fpu avx512_bf16 amx_bf16 amx_tile", True),
        ("fpu avx512_bf16", True),
        ("fpu avx512f", False),
        ("amx_bf16x", False),
    ],
)
def test_bf16_support_is_read_from_the_processor_flags(tmp_path: Path, flags: str, supported: bool) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\nmodel name\t: amx_bf16\nflags\t\t: {flags}\n\n", encoding="ascii")
    assert cpu_multiplies_bfloat16(info) is supported


def test_bf16_support_is_denied_if_there_is_no_cpuinfo(tmp_path: Path) -> None:
    assert not cpu_multiplies_bfloat16(tmp_path / "none")


def test_available_memory_is_positive() -> None:
    assert available_memory_bytes() > 0


def test_usable_cores_are_physical_ones_that_the_process_may_run_on() -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)


def test_a_damaged_torch_is_taken_for_a_build_for_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError")  # no version.py beside it
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert torch_builds() == set()
