"""Exports that a running vLLM loads, against a server that keeps its contract and computes with PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_core.config import Settings
from peft_core.export.request import VllmPlan
from peft_core.export.worker.compare import HeldOutText, Reference
from peft_core.export.worker.run import _with_vllm
from peft_core.export.worker.vllm_load import load_in_vllm
from peft_core.manager import PEFTManager
from peft_core.schemas.export import ExportReport, Verification
from tests.tiny_models import write_tiny_adapter, write_tiny_base
from tests.vllm_server import VllmServer, vllm_server

WRITTEN = ExportReport(
    summary="Exported.",
    to="vllm",
    format="f32",
    directory="/export",
    files=[],
    adapter_path="/adapter",
    adapter_id="adapter",
    base_model="base",
    base_fingerprint={},
    verification=Verification(status="verified"),
    usage=["vllm serve"],
    created_at="2026-01-01T00:00:00+00:00",
    elapsed_s=1.0,
)


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


def job(bench: Bench, *, overwrite: bool, compared: tuple[HeldOutText, Reference] | None = None) -> Any:
    request = SimpleNamespace(overwrite=overwrite, directory=bench.adapter)
    return SimpleNamespace(request=request, name="mine", compared=compared, say=lambda _: None)


def plan(bench: Bench, name: str = "mine") -> VllmPlan:
    return VllmPlan(address=bench.server.address, model=name, sends_key=False)


def test_an_adapter_of_the_same_name_in_vllm_is_replaced_only_if_asked_for(bench: Bench) -> None:
    bench.server.adapters["mine"] = Path("/old")
    kept = load_in_vllm(job(bench, overwrite=False), plan(bench))
    assert kept.reason == "vLLM has an adapter mine already. Give another model_name, or set overwrite=true."
    base = load_in_vllm(job(bench, overwrite=True), plan(bench, "base"))
    assert base.reason == "vLLM serves a base model under the name base. Give another model_name."
    assert bench.server.adapters == {"mine": Path("/old")}
    replaced = load_in_vllm(job(bench, overwrite=True), plan(bench))
    assert (replaced.loaded, replaced.base_model) == (True, "base")
    assert bench.server.adapters == {"mine": bench.adapter}


def test_an_earlier_adapter_that_was_unloaded_for_one_that_is_refused_is_mentioned(bench: Bench) -> None:
    bench.server.max_rank = 1
    first = load_in_vllm(job(bench, overwrite=True), plan(bench))
    assert "max-lora-rank" in first.reason
    assert "earlier" not in first.reason
    bench.server.adapters["mine"] = Path("/old")
    second = load_in_vllm(job(bench, overwrite=True), plan(bench))
    assert second.loaded is False
    gone = "The earlier adapter mine had been unloaded before, so vLLM does not serve it any more."
    assert second.reason == f"{first.reason} {gone}"
    assert bench.server.adapters == {}


def test_an_earlier_adapter_that_cannot_be_unloaded_stays_and_is_named(bench: Bench) -> None:
    bench.server.adapters["mine"] = Path("/old")
    bench.server.permits_unloading = False
    found = load_in_vllm(job(bench, overwrite=True), plan(bench))
    assert found.reason == "The earlier adapter mine could not be unloaded: vLLM answers 500: The engine is busy."
    assert bench.server.adapters == {"mine": Path("/old")}


def test_an_adapter_that_differs_and_cannot_be_unloaded_must_not_be_used(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def log_probs(_model: str, ids: list[int]) -> list[dict[str, Any] | None]:
        return [None, *({str(token): {"logprob": -3.0}} for token in ids[1:])]

    monkeypatch.setattr(bench.server, "log_probs", log_probs)
    bench.server.permits_unloading = False
    ours_TV = np.full((2, 8), -1.0, dtype=np.float32)
    compared = HeldOutText(((1, 2, 3),), "a text"), Reference((ours_TV,), (ours_TV,))
    loaded = load_in_vllm(job(bench, overwrite=False, compared=compared), plan(bench))
    assert (loaded.loaded, loaded.is_wrong, loaded.mean_difference, loaded.base_difference) == (True, True, 2.0, 2.0)
    assert loaded.reason == (
        "vLLM computes something else (its base model differs: log-probabilities differ by 2.00), and it could not be unloaded "
        "again: vLLM answers 500: The engine is busy."
    )
    report = _with_vllm(WRITTEN, loaded)
    assert report.summary == f"Do NOT use mine in vLLM at {bench.server.address}: {loaded.reason} Exported."
    command = f"curl {bench.server.address}/v1/unload_lora_adapter -H 'Content-Type: application/json'"
    assert report.next == f"""Unload it from vLLM: {command} -d '{{"lora_name": "mine"}}'"""
    assert report.usage == [report.next, "vllm serve"]


async def test_an_adapter_on_other_weights_is_noticed_and_unloaded_again(bench: Bench, tmp_path: Path) -> None:
    other = write_tiny_base(tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    save_file(
        {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()},
        other / "model.safetensors",
    )
    bench.server.base = other
    bench.server.adapters["mine"] = Path("/old")
    report = await bench.export(vllm_address=bench.server.address, overwrite=True)
    assert report.summary.startswith("NOT loaded into vLLM: vLLM computes something else (its base model differs")
    assert "The earlier adapter mine had been unloaded before" in report.summary
    assert bench.server.adapters == {}
    assert report.verification.status == "verified"
    assert Path(report.directory).is_dir()
