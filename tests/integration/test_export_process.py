"""Exports through the Python API: the child process, its progress, its death, and what is refused before it starts."""

from __future__ import annotations

import os
import signal
from collections import namedtuple
from pathlib import Path

import anyio
import anyio.lowlevel
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_core.adapters.manifest import WEIGHTS
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError, ExportError, InvalidArgument, PeftMcpError, StorageError
from peft_core.export.request import ExportRequest
from peft_core.export.worker import run
from peft_core.llamacpp import runtime
from peft_core.llamacpp.worker import model_gguf
from peft_core.manager import PEFTManager
from tests.factories import record_base
from tests.tiny_models import write_tiny_adapter, write_tiny_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_tiny_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return write_tiny_adapter(tmp_path / "adapter", base, seed=1)


@pytest.fixture
def request_of(tmp_path: Path, base: Path, adapter: Path) -> ExportRequest:
    return ExportRequest(
        adapter_path=adapter,
        adapter_id="adapter",
        base=resolve(str(base), Settings()),
        base_was_named=True,
        to="gguf-lora",
        format="f32",
        directory=tmp_path / "out" / "export",
        overwrite=False,
        token="0123",  # noqa: S106 -- a part of a directory's name
        held_out=None,
        base_models_dir=tmp_path / "bases",
        lock=tmp_path / "exports.lock",
    )


def left(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.exists() else []


async def test_an_export_reports_its_stages_and_is_not_repeated_unless_asked_for(
    tmp_path: Path, base: Path, adapter: Path, data_dir: Path
) -> None:
    stages: list[str] = []

    async def on_progress(_done: float, _total: float | None, message: str) -> None:
        stages.append(message)

    options = {"base_model": str(base), "output_path": str(tmp_path / "out")}
    async with PEFTManager(Settings(data_dir=data_dir)) as manager:
        report = await manager.export_adapter(str(adapter), "gguf-lora", options, on_progress=on_progress)
        with pytest.raises(InvalidArgument, match="overwrite=true"):
            await manager.export_adapter(str(adapter), "gguf-lora", options)
    assert report.verification.status == "verified"
    assert report.summary.startswith("Exported adapter as a LoRA file for llama.cpp (F32)")
    assert [stage.split()[0] for stage in stages] == ["checking", "writing", "computing", "writing", "comparing"]
    assert report.directory == str(tmp_path / "out")
    assert (
        left(tmp_path / "out") == [Path(report.files[0].path).name, "export.json"] or len(left(tmp_path / "out")) == 2
    )
    assert str(tmp_path) not in (tmp_path / "out" / "export.json").read_text()


async def test_a_cancelled_export_leaves_nothing(tmp_path: Path, base: Path, adapter: Path, data_dir: Path) -> None:
    with anyio.CancelScope() as scope:

        async def cancel(_done: float, _total: float | None, message: str) -> None:
            if message.startswith("computing"):
                assert [name[:1] for name in left(tmp_path / "out")] == ["."]  # only the hidden directory
                scope.cancel()
                await anyio.lowlevel.checkpoint()

        async with PEFTManager(Settings(data_dir=data_dir)) as manager:
            await manager.export_adapter(
                str(adapter),
                "gguf-lora",
                {"base_model": str(base), "output_path": str(tmp_path / "out" / "x")},
                on_progress=cancel,
            )
    assert scope.cancelled_caught
    assert left(tmp_path / "out") == []
    assert psutil.Process().children() == []


async def test_a_killed_export_is_reported_and_leaves_nothing(
    tmp_path: Path, base: Path, adapter: Path, data_dir: Path
) -> None:
    async def kill(_done: float, _total: float | None, message: str) -> None:
        if message.startswith("computing"):
            os.kill(psutil.Process().children()[0].pid, signal.SIGKILL)

    async with PEFTManager(Settings(data_dir=data_dir)) as manager:
        with pytest.raises(ExportError, match=r"was killed by SIGKILL.*Nothing was written") as died:
            await manager.export_adapter(
                str(adapter),
                "vllm",
                {"base_model": str(base), "output_path": str(tmp_path / "out" / "x")},
                on_progress=kill,
            )
    assert died.value.code == "export_died"
    assert left(tmp_path / "out") == []


async def test_an_adapter_of_another_base_is_refused_at_once(tmp_path: Path, adapter: Path, data_dir: Path) -> None:
    other = write_tiny_base(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors")
    async with PEFTManager(Settings(data_dir=data_dir)) as manager:
        with pytest.raises(InvalidArgument, match="is not the model on which it was trained"):
            await manager.export_adapter(str(adapter), "gguf-lora", {"base_model": str(other)})
        with pytest.raises(InvalidArgument, match="adapter_path"):
            await manager.export_adapter(
                str(adapter), "gguf-lora", {"base_model": str(write_tiny_base(tmp_path / "q", "qwen3"))}
            )


async def test_an_adapter_without_a_record_needs_its_base_to_be_named(
    tmp_path: Path, base: Path, adapter: Path, data_dir: Path
) -> None:
    (adapter / "adapter_manifest.json").unlink()
    async with PEFTManager(Settings(data_dir=data_dir)) as manager:
        with pytest.raises(InvalidArgument, match="base_model"):
            await manager.export_adapter(str(adapter), "hub")
        report = await manager.export_adapter(str(adapter), "hub", {"base_model": str(base)})
    assert any("Nothing proves" in warning for warning in report.warnings)
    assert "not recorded" in (Path(report.directory) / "README.md").read_text()


def test_without_llama_cpp_the_file_is_written_and_not_called_verified(
    request_of: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "is_installed", lambda: False)
    report = run.export(request_of, lambda *_: None)
    assert report.verification.status == "not_verified"
    assert report.summary.startswith("Written, not verified")
    assert "pip install 'peft-mcp[llamacpp]'" in report.summary
    assert "llama-perplexity" in report.verification.reason
    assert report.next_step is not None
    assert report.next_step.arguments["overwrite"] is True
    assert Path(report.files[0].path).is_file()


def test_weights_that_are_not_finite_are_refused(request_of: ExportRequest, base: Path) -> None:
    path = request_of.adapter_path / WEIGHTS
    tensors = load_file(path)
    tensors[next(iter(tensors))][0, 0] = torch.nan
    save_file(tensors, path)
    record_base(request_of.adapter_path, resolve(str(base), Settings()))
    with pytest.raises(InvalidArgument, match="NaN"):
        run.export(request_of, lambda *_: None)


def test_a_base_that_has_changed_since_the_request_is_refused(request_of: ExportRequest, base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, base / "model.safetensors")
    with pytest.raises(BaseCheckpointError, match="changed since the request"):
        run.export(request_of, lambda *_: None)


def test_a_base_that_is_gone_is_reported(request_of: ExportRequest, base: Path) -> None:
    base.rename(base.with_name("moved"))
    with pytest.raises(PeftMcpError):
        run.export(request_of, lambda *_: None)
    assert not request_of.directory.exists()


def test_a_full_disk_is_reported_before_anything_is_written(
    request_of: ExportRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 -- as shutil defines it
    monkeypatch.setattr(model_gguf.shutil, "disk_usage", lambda _: usage(100, 93, 7))
    with pytest.raises(StorageError, match=r"needs \d+ bytes in .*, but only 7 are free"):
        run.export(request_of, lambda *_: None)
    assert left(request_of.directory.parent) == []


def test_a_file_that_llama_cpp_refuses_is_deleted(request_of: ExportRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_lora: object, _base: object, path: Path, _kind: str) -> None:
        path.write_bytes(b"GGUF" + bytes(100))

    monkeypatch.setattr("peft_core.export.worker.targets.write_gguf_lora", broken)
    with pytest.raises(ExportError) as refused:
        run.export(request_of, lambda *_: None)
    assert refused.value.code == "export_not_loadable"
    assert left(request_of.directory.parent) == []
