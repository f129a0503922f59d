"""The files of an adapter that somebody made to do harm, or that an accident spoiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_core.adapters import files as files_module
from peft_core.adapters.files import read_adapter
from peft_core.adapters.manifest import MANIFEST_NAME
from peft_core.adapters.verify import verify, verify_files
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import BaseMatch
from tests.attacks.adapters import entry
from tests.factories import record_base
from tests.model_files import adapter_shapes, safetensors_bytes, weights, with_length, write_adapter, write_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SOUND = safetensors_bytes(adapter_shapes(), fill=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return resolve(str(write_model(tmp_path_factory.mktemp("base") / "tiny", values=weights())), Settings())


def test_an_empty_or_missing_directory_is_one_finding(tmp_path: Path, base: Base) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        (reason, _) = verify(directory, base).reasons
        assert (reason.code, reason.where) == ("missing_file", f"{WEIGHTS} and {CONFIG}")


def test_an_adapter_of_mlx_is_told_from_nothing(tmp_path: Path, base: Base) -> None:
    (tmp_path / "adapters.safetensors").write_bytes(SOUND)
    fix = verify(tmp_path, base).reasons[0].fix
    assert fix is not None
    assert "MLX" in fix


def test_problems_of_both_files_are_gathered(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    (adapter / CONFIG).write_text("{")
    (adapter / WEIGHTS).write_bytes(SOUND[:-1])
    reasons = read_adapter(adapter).reasons
    assert [(reason.code, reason.where) for reason in reasons] == [("bad_file", CONFIG), ("bad_file", WEIGHTS)]


def test_reading_whole_finds_what_reading_the_header_does(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path)
    headers, with_weights = read_adapter(adapter), read_adapter(adapter, with_weights=True)
    assert headers.tensors == with_weights.tensors
    assert (headers.weights, with_weights.weights) == (None, SOUND)
    assert (headers.settings, headers.reasons) == (with_weights.settings, with_weights.reasons)
    assert with_weights.tensors is not None
    for tensor in with_weights.tensors.values():
        assert with_weights.bytes_of(tensor) == b"\1" * tensor.size


def test_the_bytes_of_an_unsound_file_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_adapter(tmp_path)
    (adapter / WEIGHTS).write_bytes(SOUND + b"\0")
    monkeypatch.setattr(files_module, "read_exactly", lambda *_: pytest.fail("read"))
    assert read_adapter(adapter, with_weights=True).weights is None


def test_a_file_that_is_mostly_a_hole_does_not_fill_the_memory(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path)
    size = 8 << 30
    raw = json.dumps({"a": entry(0, size, shape=(size // 4,))}).encode()
    with (adapter / WEIGHTS).open("wb") as file:
        file.write(with_length(raw))
        file.truncate(8 + len(raw) + size)
    assert read_adapter(adapter).tensors is not None
    files = read_adapter(adapter, with_weights=True)
    assert (files.weights, [reason.code for reason in files.reasons]) == (None, ["bad_file"])


def test_what_is_loaded_is_what_was_checked_even_if_the_file_is_exchanged(tmp_path: Path, base: Base) -> None:
    adapter = record_base(write_adapter(tmp_path), base)
    files = read_adapter(adapter, with_weights=True)
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(adapter_shapes(), fill=0xFF))
    (adapter / CONFIG).write_text("{}")
    result = verify_files(files, base, scan_weights=True)
    assert (result.verdict, result.scanned) == (BaseMatch.SAMPLED, True)
    assert files.weights == SOUND
    assert files.settings is not None
    assert files.settings.rank == 4


def test_a_file_written_to_while_it_is_read_is_checked_as_it_was_read(
    tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path)
    other = safetensors_bytes({f"x{name[1:]}": shape for name, shape in adapter_shapes().items()}, fill=3)
    assert len(other) == len(SOUND)
    monkeypatch.setattr(files_module, "read_exactly", lambda *_: other)
    files = read_adapter(adapter, with_weights=True)
    assert files.weights == other
    assert files.tensors is not None
    assert all(name.startswith("x") for name in files.tensors)
    assert verify_files(files, base, scan_weights=False).verdict is BaseMatch.INCOMPATIBLE


def test_weights_are_only_scanned_where_they_were_read(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    assert not verify_files(read_adapter(adapter), base, scan_weights=True).scanned
    assert not verify_files(read_adapter(adapter, with_weights=True), base, scan_weights=False).scanned


QUICK = settings(deadline=2000, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
MUTATIONS = st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=8)


@QUICK
@given(content=st.binary(max_size=400))
def test_random_bytes_make_reasons_and_no_exception(tmp_path: Path, base: Base, content: bytes) -> None:
    adapter = write_adapter(tmp_path)
    for name in (WEIGHTS, CONFIG, MANIFEST_NAME):
        (adapter / name).write_bytes(content)
    result = verify(adapter, base, scan_weights=True)
    assert result.verdict is BaseMatch.INCOMPATIBLE
    json.loads(result.model_dump_json())


@QUICK
@given(places=MUTATIONS, end=st.integers(0, len(SOUND)) | st.none())
def test_random_damage_makes_reasons_and_no_exception(
    tmp_path: Path, base: Base, places: list[tuple[int, int]], end: int | None
) -> None:
    content = bytearray(SOUND)
    for place, value in places:
        content[place % 1200] = value  # mostly in the header
    adapter = write_adapter(tmp_path)
    (adapter / WEIGHTS).write_bytes(bytes(content)[:end])
    result = verify(adapter, base, scan_weights=True)
    assert result.verdict in (BaseMatch.INCOMPATIBLE, BaseMatch.SHAPE_ONLY)
    json.loads(result.model_dump_json())


@QUICK
@given(name=st.text(max_size=40), value=st.none() | st.booleans() | st.integers() | st.text(max_size=10))
def test_any_name_in_a_file_can_be_reported(tmp_path: Path, base: Base, name: str, value: object) -> None:
    adapter = write_adapter(tmp_path, **{name: value, "target_modules": [name]})
    tensor = f"base_model.model.{name}.lora_A.weight"
    (adapter / WEIGHTS).write_bytes(safetensors_bytes({tensor: (4, 32), name: (2,)}))
    result = verify(adapter, base)
    assert result.verdict is BaseMatch.INCOMPATIBLE
    json.loads(result.model_dump_json())
    assert all(reason.message.isprintable() for reason in result.reasons)
