"""A trained adapter of the bundled base model, exported and answering in llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_core.config import Settings
from peft_core.manager import PEFTManager

pytestmark = [pytest.mark.model, pytest.mark.timeout(1200)]


async def test_a_trained_adapter_computes_the_same_in_llama_cpp(trained: Path) -> None:
    async with PEFTManager(Settings(data_dir=trained)) as manager:
        report = await manager.export_adapter("wsgiref", "gguf-lora")
    verified = report.verification
    assert verified.status == "verified"
    assert 50 <= verified.positions <= 200  # this adapter has few held-out examples
    assert verified.mean_difference is not None
    assert verified.mean_difference < 0.02
    assert verified.effect_error is not None
    assert verified.effect_error < 0.1
    assert verified.text == "held-out examples of the adapter's training"
    assert Path(report.directory).parent.parent == trained / "projects" / "wsgiref" / "exports"
    manifest = json.loads((Path(report.directory) / "export.json").read_text())
    assert manifest["verification"] == verified.model_dump()
    assert manifest["files"][0]["sha256"] == report.files[0].sha256
