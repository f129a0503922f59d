"""Pass every hostile adapter to every entry point that needs no torch.

Each one must be rejected with a readable error or be harmless, within limits of memory and time.
"""

from __future__ import annotations

import shutil
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from peft_core.adapters.manifest import CARD_NAME, CONFIG
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import PeftMcpError
from peft_core.manager import PEFTManager
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import BaseMatch, Compatibility
from tests.attacks.adapters import ATTACKS, Attack, marker_of
from tests.factories import record_base
from tests.model_files import weights, write_adapter, write_model

MAX_ALLOCATED_BYTES = 64 << 20


@dataclass
class Target:
    """A hostile adapter, and the base model and manager to use it with."""

    attack: Attack
    adapter: Path
    base: Base
    manager: PEFTManager


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return resolve(str(write_model(tmp_path_factory.mktemp("base") / "tiny", values=weights())), Settings())


@pytest.fixture
async def manager(data_dir: Path) -> AsyncIterator[PEFTManager]:
    async with PEFTManager(Settings(data_dir=data_dir)) as opened:
        yield opened


@contextmanager
def limited_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MAX_ALLOCATED_BYTES
    finally:
        tracemalloc.stop()


async def verify(target: Target) -> None:
    assert_verdict(
        target, await target.manager.verify_adapter_compatibility(str(target.adapter), str(target.base.path))
    )


async def verify_without_a_base(target: Target) -> None:
    result = await target.manager.verify_adapter_compatibility(str(target.adapter))
    assert result.verdict is BaseMatch.INCOMPATIBLE


async def verify_and_scan_the_weights(target: Target) -> None:
    result = await target.manager.verify_adapter_compatibility(
        str(target.adapter), str(target.base.path), scan_weights=True
    )
    assert_verdict(target, result, scanned=True)


async def verify_with_it_as_the_base(target: Target) -> None:
    valid = write_adapter(target.adapter.parent / "valid")
    await assert_rejected(target.manager.verify_adapter_compatibility(str(valid), str(target.adapter)))


async def load_without_a_base(target: Target) -> None:
    await assert_rejected(target.manager.load_adapter(str(target.adapter)))


async def evaluate(target: Target) -> None:
    call = target.manager.evaluate_adapter(
        str(target.adapter), "/no/such", str(target.base.path), accept_unproven_base=True
    )
    error = await assert_rejected(call)
    fits = target.attack.code is None or target.attack.scanned  # only the worker reads the weights
    assert error.details["field"] == ("evaluation_data" if fits else "adapter_path")


async def train_with_it_as_the_base(target: Target) -> None:
    await assert_rejected(target.manager.train_adapter("web", "/no/such", {"base_model": str(target.adapter)}))


async def train_on_a_base_that_contains_it(target: Target) -> None:
    """Transformers would load an adapter in a base model's directory together with the model, without a check."""
    for file in target.base.path.iterdir():
        shutil.copy(file, target.adapter)
    error = await assert_rejected(target.manager.train_adapter("web", "/no/such", {"base_model": str(target.adapter)}))
    has_config = (target.adapter / CONFIG).exists() or (target.adapter / CONFIG).is_symlink()
    assert error.code == ("base_model_unusable" if has_config else "invalid_argument")


async def train_with_it_as_the_data(target: Target) -> None:
    await assert_rejected(target.manager.train_adapter("web", str(target.adapter)))


async def get_info(target: Target) -> None:
    try:
        info = await target.manager.get_adapter_info(str(target.adapter))
    except PeftMcpError as error:
        assert_readable(error)
        return
    assert info.rank is None or 1 <= info.rank <= 512
    assert info.alpha is None or 0 < info.alpha <= 100_000
    assert all(name.replace("_", "").replace(".", "").isalnum() for name in info.target_modules)
    assert info.manifest is None or "not trained here" in info.next


async def list_it(target: Target) -> None:
    move_into_the_registry(target)
    valid = record_base(write_adapter(target.manager.settings.paths.adapter("web", "adapter-01")), target.base)
    result = await target.manager.list_adapters()
    assert str(valid) in {adapter.adapter_path for adapter in result.adapters}
    assert {adapter.project_id for adapter in result.adapters} <= {"web", "evil"}


async def read_card(target: Target) -> None:
    move_into_the_registry(target)
    target.manager.settings.paths.current("evil").symlink_to("adapter-09")
    document = await target.manager.read_card("evil")
    assert "root:" not in (document.card or "")  # from /etc/passwd
    if (target.adapter / CARD_NAME).is_symlink():
        assert document.card is None


async def delete(target: Target) -> None:
    """Delete the adapter; the targets of its links must remain."""
    move_into_the_registry(target)
    (outside := target.adapter.parent / "outside").mkdir()
    (outside / "file").write_text("x")
    path = target.manager.settings.paths.adapter("evil", "adapter-09")
    (path / "link").symlink_to(outside)
    await target.manager.delete_adapter("evil", "adapter-09")
    assert not path.exists()
    assert (outside / "file").read_text() == "x"


ENTRY_POINTS: list[Callable[[Target], Awaitable[None]]] = [
    verify,
    verify_without_a_base,
    verify_and_scan_the_weights,
    verify_with_it_as_the_base,
    load_without_a_base,
    evaluate,
    train_with_it_as_the_base,
    train_on_a_base_that_contains_it,
    train_with_it_as_the_data,
    get_info,
    list_it,
    read_card,
    delete,
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("entry_point", ENTRY_POINTS, ids=lambda entry_point: entry_point.__name__)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
async def test_a_hostile_adapter_is_rejected_or_harmless(
    attack: Attack, entry_point: Callable[[Target], Awaitable[None]], tmp_path: Path, base: Base, manager: PEFTManager
) -> None:
    adapter = record_base(write_adapter(tmp_path / "adapter"), base)
    (adapter / "adapter_manifest.json").unlink()  # its hashes would reveal every change
    attack.apply(adapter)
    with limited_memory():
        await entry_point(Target(attack, adapter, base, manager))
    assert not marker_of(adapter).exists()
    assert not manager.settings.paths.database.exists()  # nothing was queued


def assert_verdict(target: Target, result: Compatibility, *, scanned: bool = False) -> None:
    attack = target.attack
    errors = [reason.code for reason in result.reasons if reason.severity == "error"]
    if attack.code is None or (attack.scanned and not scanned):
        assert errors == []
        assert result.verdict is BaseMatch.SHAPE_ONLY  # nothing proves that it belongs to the base model
        return
    assert attack.code in errors
    assert result.verdict is BaseMatch.INCOMPATIBLE
    for reason in result.reasons:
        assert reason.severity == "warning" or reason.fix
        assert all(text.isprintable() for text in (reason.message, reason.found or "", reason.where or ""))
        assert len(reason.message) < 800


async def assert_rejected(call: Awaitable[object]) -> PeftMcpError:
    with pytest.raises(PeftMcpError) as caught:
        await call
    assert_readable(caught.value)
    return caught.value


def assert_readable(error: PeftMcpError) -> None:
    assert str(error).replace("\n", "").isprintable()
    assert len(str(error)) < 2500
    assert error.suggestions


def move_into_the_registry(target: Target) -> None:
    """Move the adapter to where the adapters that were trained here are, without publishing it."""
    path = target.manager.settings.paths.adapter("evil", "adapter-09")
    path.parent.mkdir(parents=True)
    target.adapter.rename(path)
    target.adapter = path
