"""Exports that a running vLLM loads, against a server that keeps its contract and computes with PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_core.config import Settings
from peft_core.errors import VllmError
from peft_core.export.worker.vllm_load import _load
from peft_core.manager import PEFTManager
from peft_core.schemas.export import ExportReport
from peft_core.vllm import VllmClient
from tests.tiny_models import write_tiny_adapter, write_tiny_base
from tests.vllm_server import VllmServer, vllm_server


class Bench:
    """A base model, an adapter of it, and a server."""

    def __init__(self, root: Path, data_dir: Path, server: VllmServer) -> None:
        self.server, self.data_dir = server, data_dir
        self.base = root / "base"
        self.adapter = write_tiny_adapter(root / "adapter", self.base, seed=1)

    async def export(self, *, named: str | None = None, **options: Any) -> ExportReport:
        settings = Settings(data_dir=self.data_dir, vllm_base_url=named)
        given = {"base_model": str(self.base), "model_name": "mine", **options}
        async with PEFTManager(settings) as manager:
            return await manager.export_adapter(str(self.adapter), "vllm", given)


@pytest.fixture
def bench(tmp_path: Path, data_dir: Path) -> Iterator[Bench]:
    with vllm_server(write_tiny_base(tmp_path / "base")) as server:
        yield Bench(tmp_path, data_dir, server)


async def test_an_adapter_is_loaded_into_vllm_and_computes_there_what_peft_computes(bench: Bench) -> None:
    report = await bench.export(vllm_address=f"{bench.server.address}/v1")
    assert bench.server.adapters == {"mine": Path(report.directory)}
    assert report.vllm is not None
    assert (report.vllm.loaded, report.vllm.version, report.vllm.base_model) == (True, "0.32.0", "base")
    assert report.vllm.positions == report.verification.positions == 200
    assert report.vllm.mean_difference == pytest.approx(0, abs=1e-4)
    assert report.vllm.base_difference == pytest.approx(0, abs=1e-4)
    assert f"Loaded into vLLM 0.32.0 at {bench.server.address} as mine." in report.summary
    assert report.next.startswith(f"Use it: curl {bench.server.address}/v1/completions")
    assert "127.0.0.1" not in (Path(report.directory) / "export.json").read_text()

    replaced = await bench.export(named=bench.server.address, overwrite=True)
    assert replaced.vllm is not None
    assert replaced.vllm.loaded


def test_an_adapter_of_the_same_name_in_vllm_is_replaced_only_if_asked_for(bench: Bench) -> None:
    bench.server.adapters["mine"] = Path("/old")
    client = VllmClient(bench.server.address)

    def job(*, overwrite: bool) -> Any:
        return SimpleNamespace(request=SimpleNamespace(overwrite=overwrite, directory=bench.adapter))

    with pytest.raises(VllmError, match="has an adapter mine already"):
        _load(client, "mine", job(overwrite=False))
    with pytest.raises(VllmError, match="serves a base model under the name base"):
        _load(client, "base", job(overwrite=True))
    assert bench.server.adapters == {"mine": Path("/old")}
    assert _load(client, "mine", job(overwrite=True)) == "base"
    assert bench.server.adapters == {"mine": bench.adapter}


async def test_an_adapter_on_other_weights_is_noticed_and_unloaded_again(bench: Bench, tmp_path: Path) -> None:
    other = write_tiny_base(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    save_file(
        {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()},
        other / "model.safetensors",
    )
    bench.server.base = other
    report = await bench.export(vllm_address=bench.server.address)
    assert report.summary.startswith("NOT loaded into vLLM: vLLM computes something else (its base model differs")
    assert bench.server.adapters == {}
    assert report.verification.status == "verified"
    assert Path(report.directory).is_dir()
