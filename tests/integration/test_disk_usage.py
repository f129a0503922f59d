"""What a real process reads, in any server, is not freed by another one."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.errors import AdapterInUse, StorageError
from peft_core.manager import PEFTManager
from peft_core.schemas.storage import DiskItem
from tests.tiny_models import write_byte_level_tokenizer, write_tiny_adapter, write_tiny_base

ADAPTER_ID = "adapter-01"
ADAPTER = f"adapters/web/{ADAPTER_ID}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base model that llama.cpp can read, and an adapter."""
    base = write_tiny_base(tmp_path_factory.mktemp("tiny") / "base")
    write_byte_level_tokenizer(base, [])
    return base, write_tiny_adapter(tmp_path_factory.mktemp("adapter") / ADAPTER_ID, base, seed=1)


@pytest.fixture
def settings(trained: tuple[Path, Path], data_dir: Path) -> Settings:
    base, adapter = trained
    settings = Settings(data_dir=data_dir, default_base_model=str(base), log_level="WARNING")
    draft = shutil.copytree(adapter, data_dir / "jobs" / ADAPTER_ID / "adapter")
    Registry(settings.paths).publish(draft, "web", ADAPTER_ID)
    os.utime(data_dir / "jobs" / ADAPTER_ID, (1, 1))  # no request is writing it
    return settings


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[PEFTManager]:
    async with PEFTManager(settings) as manager:
        yield manager


@pytest.fixture
async def other(settings: Settings) -> AsyncIterator[PEFTManager]:
    async with PEFTManager(settings) as manager:
        yield manager


async def items(manager: PEFTManager) -> dict[str, DiskItem]:
    return {item.name: item for item in (await manager.disk_usage()).items}


async def test_a_loaded_adapter_and_its_base_are_kept_until_they_are_unloaded(
    server: PEFTManager, other: PEFTManager
) -> None:
    loaded = await other.load_adapter("web", engine="llamacpp")
    assert loaded.status == "loaded"
    (base,) = [name for name in await items(server) if name.startswith("base_models/")]
    assert base.endswith(".f16.gguf")
    for name in (ADAPTER, base):
        with pytest.raises(StorageError, match=r"It is in use. Call unload_adapter in the session that has loaded it"):
            await server.disk_usage([name])
    with pytest.raises(AdapterInUse, match="used by another process"):
        await server.delete_adapter("web", ADAPTER_ID)
    assert f"unload_adapter(adapter_path={loaded.adapter_path!r})" in (await items(other))[ADAPTER].reason
    await other.generate({"prompt": "def f", "max_new_tokens": 2})

    await other.unload_adapter()
    unloaded = await items(server)
    assert unloaded[ADAPTER].can_free
    assert unloaded[base].can_free
    assert {freed.name for freed in (await server.disk_usage([base])).freed} == {base}

    await other.load_adapter("web", engine="llamacpp")  # writes the base model again
    assert not (await items(server))[base].can_free
    await other.aclose()
    freed = await server.disk_usage([ADAPTER, base])
    assert {item.name for item in freed.freed} == {ADAPTER, base}
    assert (await server.list_adapters()).adapters == []


def export_workers() -> list[psutil.Process]:
    return [
        child for child in psutil.Process().children(recursive=True) if "peft_core.export.worker" in child.cmdline()
    ]


async def test_what_an_export_reads_is_kept(server: PEFTManager, other: PEFTManager) -> None:
    reasons: dict[str, str] = {}

    async def look(_done: float, _total: float | None, message: str) -> None:
        if message.startswith("writing") and not reasons:
            (worker,) = export_workers()
            worker.suspend()  # a small export would end before everything is looked at
            reasons.update({name: item.reason for name, item in (await items(server)).items()})
            worker.resume()

    await other.export_adapter("web", "gguf-lora", on_progress=look)
    assert reasons[ADAPTER].startswith("It is in use. Possible reasons: an export runs; otherwise")
    assert reasons[f"jobs/{ADAPTER_ID}"] == "An export is reading it. Wait for its end."
    after = await items(server)
    assert after[ADAPTER].can_free
    export = f"exports/web/{ADAPTER_ID}/gguf-lora-f32"
    assert after[export].can_free
    assert (await server.disk_usage([export])).freed[0].bytes == after[export].bytes
