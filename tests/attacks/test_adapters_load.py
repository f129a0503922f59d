"""Every hostile adapter through the door that computes: the real inference process, with a toy base."""

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
MORE_BYTES = 200 << 20  # that the process may grow by, through all of them


@pytest.fixture
async def manager(data_dir: Path) -> AsyncIterator[PEFTManager]:
    async with PEFTManager(Settings(data_dir=data_dir, log_level="ERROR", load_during_training="always")) as opened:
        yield opened


@pytest.mark.model
@pytest.mark.timeout(300)
async def test_no_hostile_adapter_takes_effect_and_the_one_that_was_loaded_stays(
    manager: PEFTManager, tmp_path: Path
) -> None:
    base = write_tiny_base(tmp_path / "base")
    sound = str(write_tiny_adapter(tmp_path / "sound", base, seed=1))
    assert (await manager.load_adapter(sound, str(base))).status == "loaded"
    expected = (await manager.generate(TEXT)).text
    host = psutil.Process(manager._inference._client.pid)
    before = host.memory_info().rss
    for number, attack in enumerate(ATTACKS):
        adapter = write_tiny_adapter(tmp_path / str(number) / "adapter", base, seed=2)
        (adapter / MANIFEST_NAME).unlink()  # its hashes would give every change away
        attack.spoil(adapter)
        answer = await manager.load_adapter(str(adapter), str(base), accept_unproven_base=True)
        assert not marker_of(adapter).exists(), attack.name
        assert manager._inference._client.pid == host.pid, attack.name  # it did not die
        if attack.code is None:
            assert answer.status == "loaded", (attack.name, answer.reason)
            assert (await manager.unload_adapter(str(adapter))).status == "unloaded"
            assert (await manager.load_adapter(sound, str(base))).status == "loaded"
            continue
        assert answer.status == "fallback", attack.name
        assert answer.adapter_path == sound
        assert attack.code in {reason.code for reason in answer.reasons}, attack.name
    assert (await manager.generate(TEXT)).text == expected
    assert host.memory_info().rss < before + MORE_BYTES
