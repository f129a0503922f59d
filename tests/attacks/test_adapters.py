"""Every hostile adapter through every door that needs no torch: refused in words, or harmless; bounded in memory and time."""

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

MOST_BYTES = 64 << 20


@dataclass
class Place:
    """A hostile adapter, and what one may try with it."""

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
def bounded() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


async def verify(place: Place) -> None:
    judged(place, await place.manager.verify_adapter_compatibility(str(place.adapter), str(place.base.path)))


async def verify_without_a_base(place: Place) -> None:
    found = await place.manager.verify_adapter_compatibility(str(place.adapter))
    assert found.verdict is BaseMatch.INCOMPATIBLE


async def verify_with_its_weights(place: Place) -> None:
    found = await place.manager.verify_adapter_compatibility(
        str(place.adapter), str(place.base.path), scan_weights=True
    )
    judged(place, found, scanned=True)


async def verify_as_a_base(place: Place) -> None:
    sound = write_adapter(place.adapter.parent / "sound")
    await refused(place.manager.verify_adapter_compatibility(str(sound), str(place.adapter)))


async def load_without_a_base(place: Place) -> None:
    await refused(place.manager.load_adapter(str(place.adapter)))


async def evaluate(place: Place) -> None:
    call = place.manager.evaluate_adapter(
        str(place.adapter), "/no/such", str(place.base.path), accept_unproven_base=True
    )
    error = await refused(call)
    fits = place.attack.code is None or place.attack.scanned  # the process that measures reads the weights
    assert error.details["field"] == ("evaluation_data" if fits else "adapter_path")


async def train_on_it_as_a_base(place: Place) -> None:
    await refused(place.manager.train_adapter("web", "/no/such", {"base_model": str(place.adapter)}))


async def train_on_a_base_that_holds_it(place: Place) -> None:
    """Transformers would load an adapter that lies in a base's directory with it, unverified."""
    for file in place.base.path.iterdir():
        shutil.copy(file, place.adapter)
    error = await refused(place.manager.train_adapter("web", "/no/such", {"base_model": str(place.adapter)}))
    there = (place.adapter / CONFIG).exists() or (place.adapter / CONFIG).is_symlink()
    assert error.code == ("base_model_unusable" if there else "invalid_argument")


async def train_on_it_as_data(place: Place) -> None:
    await refused(place.manager.train_adapter("web", str(place.adapter)))


async def info(place: Place) -> None:
    try:
        found = await place.manager.get_adapter_info(str(place.adapter))
    except PeftMcpError as error:
        in_words(error)
        return
    assert found.rank is None or 1 <= found.rank <= 512
    assert found.alpha is None or 0 < found.alpha <= 100_000
    assert all(name.replace("_", "").replace(".", "").isalnum() for name in found.target_modules)
    assert found.manifest is None or "not trained here" in found.next


async def listed(place: Place) -> None:
    published(place)
    sound = record_base(write_adapter(place.manager.settings.paths.adapter("web", "adapter-01")), place.base)
    found = await place.manager.list_adapters()
    assert str(sound) in {adapter.adapter_path for adapter in found.adapters}
    assert {adapter.project_id for adapter in found.adapters} <= {"web", "evil"}


async def card(place: Place) -> None:
    published(place)
    place.manager.settings.paths.current("evil").symlink_to("adapter-09")
    document = await place.manager.read_card("evil")
    assert "root:" not in (document.card or "")  # of /etc/passwd
    if (place.adapter / CARD_NAME).is_symlink():
        assert document.card is None


async def delete(place: Place) -> None:
    """What it points to stays."""
    published(place)
    (outside := place.adapter.parent / "outside").mkdir()
    (outside / "kept").write_text("x")
    path = place.manager.settings.paths.adapter("evil", "adapter-09")
    (path / "out").symlink_to(outside)
    await place.manager.delete_adapter("evil", "adapter-09")
    assert not path.exists()
    assert (outside / "kept").read_text() == "x"


# A door more: a function more, and its name here.
DOORS: list[Callable[[Place], Awaitable[None]]] = [
    verify,
    verify_without_a_base,
    verify_with_its_weights,
    verify_as_a_base,
    load_without_a_base,
    evaluate,
    train_on_it_as_a_base,
    train_on_a_base_that_holds_it,
    train_on_it_as_data,
    info,
    listed,
    card,
    delete,
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
async def test_a_hostile_adapter_is_refused_or_harmless_at(
    attack: Attack, door: Callable[[Place], Awaitable[None]], tmp_path: Path, base: Base, manager: PEFTManager
) -> None:
    adapter = record_base(write_adapter(tmp_path / "adapter"), base)
    (adapter / "adapter_manifest.json").unlink()  # its hashes would give every change away
    attack.spoil(adapter)
    with bounded():
        await door(Place(attack, adapter, base, manager))
    assert not marker_of(adapter).exists()
    assert not manager.settings.paths.database.exists()  # nothing was queued


def judged(place: Place, found: Compatibility, *, scanned: bool = False) -> None:
    attack = place.attack
    errors = [reason.code for reason in found.reasons if reason.severity == "error"]
    if attack.code is None or (attack.scanned and not scanned):
        assert errors == []
        assert found.verdict is BaseMatch.SHAPE_ONLY  # nothing proves that it belongs to the base
        return
    assert attack.code in errors
    assert found.verdict is BaseMatch.INCOMPATIBLE
    for reason in found.reasons:
        assert reason.severity == "warning" or reason.fix
        assert all(text.isprintable() for text in (reason.message, reason.found or "", reason.where or ""))
        assert len(reason.message) < 800


async def refused(call: Awaitable[object]) -> PeftMcpError:
    with pytest.raises(PeftMcpError) as caught:
        await call
    in_words(caught.value)
    return caught.value


def in_words(error: PeftMcpError) -> None:
    assert str(error).replace("\n", "").isprintable()
    assert len(str(error)) < 2500
    assert error.suggestions


def published(place: Place) -> None:
    """As if it had got among the adapters that were trained here."""
    target = place.manager.settings.paths.adapter("evil", "adapter-09")
    target.parent.mkdir(parents=True)
    place.adapter.rename(target)
    place.adapter = target
