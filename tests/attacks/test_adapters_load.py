"""Load every hostile adapter in a real inference worker, with a tiny base model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from peft_core.adapters.manifest import MANIFEST_NAME
from peft_core.config import Settings
from peft_core.manager import PEFTManager
from tests.attacks.adapters import ATTACKS, marker_of
from tests.tiny_models import write_tiny_adapter, write_tiny_base

TEXT = {"prompt": "def f", "max_new_tokens": 8}
MAX_GROWTH_BYTES = 200 << 20  # of the worker's resident memory, over all attacks


@pytest.fixture
async def manager(data_dir: Path) -> AsyncIterator[PEFTManager]:
    async with PEFTManager(Settings(data_dir=data_dir, log_level="ERROR", load_during_training="always")) as opened:
        yield opened


@pytest.mark.model
@pytest.mark.timeout(300)
async def test_a_rejected_hostile_adapter_leaves_the_loaded_one_active(manager: PEFTManager, tmp_path: Path) -> None:
    base = write_tiny_base(tmp_path / "base")
    valid = str(write_tiny_adapter(tmp_path / "valid", base, seed=1))
    assert (await manager.load_adapter(valid, str(base))).status == "loaded"
    expected = (await manager.generate(TEXT)).text
    worker = psutil.Process(manager._inference._client.pid)
    rss_before = worker.memory_info().rss
    for number, attack in enumerate(ATTACKS):
        adapter = write_tiny_adapter(tmp_path / str(number) / "adapter", base, seed=2)
        (adapter / MANIFEST_NAME).unlink()  # its hashes would reveal every change
        attack.apply(adapter)
        result = await manager.load_adapter(str(adapter), str(base), accept_unproven_base=True)
        assert not marker_of(adapter).exists(), attack.name
        assert manager._inference._client.pid == worker.pid, attack.name  # the worker did not die
        if attack.code is None:
            assert result.status == "loaded", (attack.name, result.reason)
            assert (await manager.unload_adapter(str(adapter))).status == "unloaded"
            assert (await manager.load_adapter(valid, str(base))).status == "loaded"
            continue
        assert result.status == "fallback", attack.name
        assert result.adapter_path == valid
        assert attack.code in {reason.code for reason in result.reasons}, attack.name
    assert (await manager.generate(TEXT)).text == expected
    assert worker.memory_info().rss < rss_before + MAX_GROWTH_BYTES
