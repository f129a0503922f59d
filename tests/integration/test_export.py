"""Exports of small models in llama.cpp and PEFT: every conversion rule, and that a wrong one is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_core.base_models.gguf import read_gguf_header
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import ExportError
from peft_core.export.request import ExportRequest
from peft_core.export.worker import gguf_lora, run
from peft_core.schemas.export import ExportReport
from tests.factories import record_base
from tests.tiny_models import tiny_model, write_tiny_base

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "down_proj": 6}, "alpha_pattern": {"k_proj": 3, "up_proj": 20}},
}


def write_adapter(directory: Path, base: Path, architecture: str, **config: Any) -> Path:
    """Write an adapter of large effect on every linear layer."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **config}
    model = get_peft_model(tiny_model(architecture), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return record_base(directory, resolve(str(base), Settings()))


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Return a function that exports an adapter of a tiny model."""

    def export(architecture: str, to: str, form: str, **config: Any) -> ExportReport:
        base = write_tiny_base(tmp_path / "base", architecture)
        adapter = write_adapter(tmp_path / "adapter", base, architecture, **config)
        request = ExportRequest(
            adapter_path=adapter,
            adapter_id="adapter",
            base=resolve(str(base), Settings()),
            base_was_named=False,
            to=to,
            format=form,
            directory=tmp_path / "out" / "export",
            overwrite=False,
            token="0123",  # noqa: S106 -- a part of a directory's name
            held_out=None,
            base_models_dir=tmp_path / "bases",
            lock=tmp_path / "exports.lock",
        )
        return run.export(request, lambda *_: None)

    return export


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", "plain"),
        ("llama", "rslora"),
        ("llama", "patterns"),
        ("qwen2", "patterns"),
        ("qwen3", "rslora"),
        ("gemma", "patterns"),
    ],
)
def test_a_lora_file_computes_in_llama_cpp_what_peft_computes(make: Any, architecture: str, settings: str) -> None:
    report = make(architecture, "gguf-lora", "f32", **SETTINGS[settings])
    verified = report.verification
    assert verified.status == "verified"
    assert verified.positions == 200
    assert verified.mean_difference < 0.01
    assert verified.effect > 0.3
    assert verified.effect_error < 0.02
    assert verified.runtime_gain == pytest.approx(verified.gain, abs=0.01)
    metadata = read_gguf_header(Path(report.files[0].path)).metadata
    assert metadata["adapter.lora.alpha"] == 8.0
    assert metadata["peft_mcp.base.fingerprint.sample"] == report.base_fingerprint["sample"]


@pytest.mark.parametrize("mistake", ["rows of q and k in PEFT's order", "rsLoRA taken for LoRA"])
def test_a_file_that_computes_something_else_is_refused_and_deleted(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    config = {}
    if mistake == "rsLoRA taken for LoRA":
        config = {"use_rslora": True}
        too_much = math.sqrt(4)  # of the rank
        monkeypatch.setattr(
            "peft_core.export.worker.lora_pairs.LoraPair.folded",
            lambda pair, remaining=1.0: pair.b_OR * (pair.scale / too_much / remaining),
        )
    else:
        monkeypatch.setattr(gguf_lora, "permuted", lambda rows, *_: rows)
    with pytest.raises(ExportError, match="computes something else") as refused:
        make("llama", "gguf-lora", "f32", **config)
    assert refused.value.code == "export_not_equal"
    assert refused.value.details["effect_error"] > 0.1
    assert list((tmp_path / "out").iterdir()) == []
