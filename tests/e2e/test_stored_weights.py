"""The bundled GGUF file holds the same weights as its conversion, and trains within a memory limit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from peft_core.base_models.gguf_model import read_gguf_model
from peft_core.base_models.resolve import bundled_path, resolve
from peft_core.config import Settings
from peft_core.manager import PEFTManager
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.modeling.quantised import open_stored
from peft_core.schemas.results import Status
from tests.e2e.main_job import SHORT_ON_LITTLE_DATA

pytestmark = pytest.mark.model


def test_the_bundled_file_and_its_conversion_hold_the_same_weights_bit_for_bit(converted_bases: Path) -> None:
    converted = ensure_hf_directory(resolve("bundled", Settings()), converted_bases, lambda _: None)
    matrices, vectors = open_stored(read_gguf_model(bundled_path()))
    assert {matrix.kind for matrix in matrices.values()} == {"Q4_1", "Q8_0"}
    with safe_open(converted / "model.safetensors", "pt") as file:
        assert matrices.keys() | vectors.keys() == set(file.keys())
        for name in file.keys():  # noqa: SIM118 - not a mapping
            weight = matrices[name].dequantise_all() if name in matrices else vectors[name]
            assert torch.equal(weight.view(torch.int32), file.get_tensor(name).view(torch.int32)), name


async def test_training_stays_within_a_memory_limit_and_near_its_estimate(
    trained: Path, data_dir: Path, stdlib_repository: Path
) -> None:
    """Repeat the run of the project 'mime' under a limit that only the leanest plan meets, and expect the same losses.

    They differ by rounding if the first run computed in bf16.
    """
    unlimited = await PEFTManager(Settings(data_dir=trained)).get_training_status("mime")
    manager = PEFTManager(Settings(data_dir=data_dir, max_memory_mb=840))
    queued = await manager.train_adapter("mime", str(stdlib_repository / "mime"), SHORT_ON_LITTLE_DATA)
    assert queued.estimate is not None
    assert "the base model's weights stay in their file" in queued.estimate.basis
    assert "gradient checkpointing is on" in queued.estimate.basis
    assert "to keep within CODEBASE_GARDENER_MAX_MEMORY_MB = 840" in queued.estimate.basis
    async for status in manager.watch_training("mime"):
        last = status
    assert last.status is Status.COMPLETED, last.error
    for run in (unlimited, last):
        assert run.metrics is not None
        assert run.estimate is not None
        assert run.metrics.peak_memory_bytes is not None
        # The estimate is for a whole run; three steps of short examples stay below it.
        assert 0.7 < run.metrics.peak_memory_bytes / run.estimate.memory_bytes < 1.15
    assert last.metrics is not None
    assert unlimited.metrics is not None
    assert last.metrics.base_loss == pytest.approx(unlimited.metrics.base_loss, rel=0.005)
    assert last.metrics.adapter_loss == pytest.approx(unlimited.metrics.adapter_loss, rel=0.005)
    assert last.metrics.peak_memory_bytes is not None
    assert last.metrics.peak_memory_bytes < 800 << 20
