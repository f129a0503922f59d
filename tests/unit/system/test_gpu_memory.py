"""The memory of a GPU is what nvidia-smi says of the smallest one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from peft_core.system import gpu_memory
from peft_core.system.gpu_memory import device_memory_bytes
from peft_core.system.machine import total_memory_bytes


@pytest.fixture(autouse=True)
def no_answer_is_remembered() -> None:
    gpu_memory._gpu_memory_bytes.cache_clear()


def put_nvidia_smi(directory: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    program = directory / "nvidia-smi"
    program.write_text(f"#!{sys.executable}\nimport sys\n{code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory))


def test_the_smallest_gpu_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    put_nvidia_smi(tmp_path, monkeypatch, "assert '-i' not in sys.argv; print('81559\\n24564')")
    assert device_memory_bytes("cuda") == 24564 << 20


def test_only_the_visible_gpus_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    put_nvidia_smi(tmp_path, monkeypatch, "assert sys.argv[1:3] == ['-i', '1']; print('8192')")
    assert device_memory_bytes("cuda") == 8192 << 20


@pytest.mark.parametrize("code", ["print('[N/A]')", "raise SystemExit(9)", ""])
def test_a_driver_that_does_not_answer_leaves_it_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    put_nvidia_smi(tmp_path, monkeypatch, code)
    assert device_memory_bytes("cuda") is None


def test_without_the_program_it_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device_memory_bytes("cuda") is None


def test_cpu_and_apple_gpu_have_the_memory_of_the_machine() -> None:
    assert device_memory_bytes("cpu") == device_memory_bytes("mps") == total_memory_bytes()
