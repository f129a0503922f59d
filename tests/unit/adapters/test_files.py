"""Unit tests of files: malicious and damaged files of an adapter become findings and exhaust no memory."""

from __future__ import annotations

import json
import tracemalloc
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
VALID = safetensors_bytes(adapter_shapes(), fill=1)
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return resolve(str(write_model(tmp_path_factory.mktemp("base") / "tiny", values=weights())), Settings())


def test_an_empty_or_missing_directory_is_one_error(tmp_path: Path, base: Base) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        (reason, _) = verify(directory, base).reasons
        assert (reason.code, reason.where) == ("missing_file", f"{WEIGHTS} and {CONFIG}")


def test_problems_in_both_files_are_reported(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    (adapter / CONFIG).write_text("{")
    (adapter / WEIGHTS).write_bytes(VALID[:-1])
    reasons = read_adapter(adapter).reasons
    assert [(reason.code, reason.where) for reason in reasons] == [("bad_file", CONFIG), ("bad_file", WEIGHTS)]


def test_reading_the_weights_gives_the_same_header_and_findings(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path)
    headers, with_weights = read_adapter(adapter), read_adapter(adapter, weights="keep")
    assert headers.tensors == with_weights.tensors
    assert (headers.weights, with_weights.weights) == (None, VALID)
    assert (headers.settings, headers.reasons) == (with_weights.settings, with_weights.reasons)


@pytest.mark.parametrize("change", [{}, {"fill": 0xFF}, {"fill": 0}, {"fill": 2}])
def test_scanning_in_pieces_finds_what_keeping_the_whole_file_finds(
    tmp_path: Path, base: Base, change: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files_module, "PIECE_BYTES", 64)  # several pieces for each tensor
    adapter = record_base(write_adapter(tmp_path), base)
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(adapter_shapes(), **{"fill": 1, **change}))
    scanned, kept = read_adapter(adapter, weights="scan"), read_adapter(adapter, weights="keep")
    assert (scanned.weights, kept.weights) == (None, (adapter / WEIGHTS).read_bytes())
    assert (scanned.reasons, scanned.weight_reasons) == (kept.reasons, kept.weight_reasons)
    assert bool(scanned.reasons) == bool(change)  # the manifest has the hash of the first content


def test_a_scan_needs_little_memory_however_large_the_file_is(tmp_path: Path, base: Base) -> None:
    """The server scans in threads, for each of which the C library keeps what was freed."""
    adapter = record_base(write_adapter(tmp_path, targets=MATRICES, rank=512), base)
    verify(adapter, base, scan_weights=True)  # imports and caches
    tracemalloc.start()
    try:
        result = verify(adapter, base, scan_weights=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert result.scanned
    assert peak < (adapter / WEIGHTS).stat().st_size / 5


def test_the_weights_of_a_malformed_file_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = write_adapter(tmp_path)
    (adapter / WEIGHTS).write_bytes(VALID + b"\0")
    monkeypatch.setattr(files_module, "read_exactly", lambda *_: pytest.fail("the weights were read"))
    assert read_adapter(adapter, weights="keep").weights is None


def test_a_huge_sparse_file_is_not_read_into_memory(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path)
    size = 8 << 30
    raw = json.dumps({"a": entry(0, size, shape=(size // 4,))}).encode()
    with (adapter / WEIGHTS).open("wb") as file:
        file.write(with_length(raw))
        file.truncate(8 + len(raw) + size)
    assert read_adapter(adapter).tensors is not None
    files = read_adapter(adapter, weights="keep")
    assert (files.weights, [reason.code for reason in files.reasons]) == (None, ["bad_file"])


def test_replacing_the_files_after_reading_them_has_no_effect(tmp_path: Path, base: Base) -> None:
    adapter = record_base(write_adapter(tmp_path), base)
    files = read_adapter(adapter, weights="keep")
    (adapter / WEIGHTS).unlink()
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(adapter_shapes(), fill=0xFF))
    (adapter / CONFIG).write_text("{}")
    result = verify_files(files, base)
    assert (result.verdict, result.scanned) == (BaseMatch.SAMPLED, True)
    assert files.weights == VALID
    assert files.settings is not None
    assert files.settings.rank == 4


def test_the_check_uses_the_bytes_that_were_read_if_a_file_changes_meanwhile(
    tmp_path: Path, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = write_adapter(tmp_path)
    other = safetensors_bytes({f"x{name[1:]}": shape for name, shape in adapter_shapes().items()}, fill=3)
    assert len(other) == len(VALID)
    monkeypatch.setattr(files_module, "read_exactly", lambda *_: other)
    files = read_adapter(adapter, weights="keep")
    assert files.weights == other
    assert files.tensors is not None
    assert all(name.startswith("x") for name in files.tensors)
    assert verify_files(files, base).verdict is BaseMatch.INCOMPATIBLE


def test_the_weights_count_as_scanned_only_if_they_were_read(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    uses = ("skip", "scan", "keep")
    assert [verify_files(read_adapter(adapter, weights=use), base).scanned for use in uses] == [False, True, True]


QUICK = settings(deadline=2000, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
MUTATIONS = st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=8)


@QUICK
@given(content=st.binary(max_size=400))
def test_random_bytes_cause_findings_and_no_exception(tmp_path: Path, base: Base, content: bytes) -> None:
    adapter = write_adapter(tmp_path)
    for name in (WEIGHTS, CONFIG, MANIFEST_NAME):
        (adapter / name).write_bytes(content)
    result = verify(adapter, base, scan_weights=True)
    assert result.verdict is BaseMatch.INCOMPATIBLE
    json.loads(result.model_dump_json())


@QUICK
@given(mutations=MUTATIONS, end=st.integers(0, len(VALID)) | st.none())
def test_random_damage_causes_findings_and_no_exception(
    tmp_path: Path, base: Base, mutations: list[tuple[int, int]], end: int | None
) -> None:
    content = bytearray(VALID)
    for position, value in mutations:
        content[position % 1200] = value  # mostly in the header
    adapter = write_adapter(tmp_path)
    (adapter / WEIGHTS).write_bytes(bytes(content)[:end])
    result = verify(adapter, base, scan_weights=True)
    assert result.verdict in (BaseMatch.INCOMPATIBLE, BaseMatch.SHAPE_ONLY)
    json.loads(result.model_dump_json())


@QUICK
@given(name=st.text(max_size=40), value=st.none() | st.booleans() | st.integers() | st.text(max_size=10))
def test_findings_are_printable_whatever_names_the_files_contain(
    tmp_path: Path, base: Base, name: str, value: object
) -> None:
    adapter = write_adapter(tmp_path, **{name: value, "target_modules": [name]})
    tensor = f"base_model.model.{name}.lora_A.weight"
    (adapter / WEIGHTS).write_bytes(safetensors_bytes({tensor: (4, 32), name: (2,)}))
    result = verify(adapter, base)
    assert result.verdict is BaseMatch.INCOMPATIBLE
    json.loads(result.model_dump_json())
    assert all(reason.message.isprintable() for reason in result.reasons)
