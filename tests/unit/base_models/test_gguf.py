"""Tests of the GGUF header parser: valid headers are read, malformed ones are refused."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from peft_core.base_models import gguf
from peft_core.base_models.gguf import ArrayInfo, read_gguf_header
from peft_core.errors import HeaderError
from tests.model_files import ARRAY, GGUF_METADATA, GGUF_SHAPES, TEXT, U32, gguf_bytes

VALID = gguf_bytes()
KEY = struct.pack("<Q", 1) + b"k"


def header(pairs: bytes = b"", tensors: bytes = b"", *, counts: tuple[int, int] = (0, 0)) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + pairs + tensors + bytes(64)


def tensor(name: bytes, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<{len(shape)}Q", *shape)
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", len(shape)) + dims + struct.pack("<IQ", kind, offset)


def read(tmp_path: Path, content: bytes, arrays: tuple[str, ...] = ()) -> gguf.GgufHeader:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    return read_gguf_header(path, arrays=arrays)


@pytest.mark.parametrize("version", [2, 3])
def test_a_header_gives_metadata_and_tensors(tmp_path: Path, version: int) -> None:
    parsed = read(tmp_path, gguf_bytes(version=version))
    assert parsed.text("general.architecture") == "llama"
    assert parsed.integer("llama.block_count") == 2
    assert parsed.number("llama.rope.freq_base") == 10_000.0
    assert parsed.count("tokenizer.ggml.tokens") == 48
    assert {name: info.shape for name, info in parsed.tensors.items()} == GGUF_SHAPES
    last = list(parsed.tensors.values())[-1]
    assert (last.dtype, last.start + last.size) == ("F32", len(VALID))


def test_arrays_are_only_counted_unless_they_are_requested(tmp_path: Path) -> None:
    assert read(tmp_path, VALID).metadata["tokenizer.ggml.tokens"] == ArrayInfo(TEXT, 48)
    metadata = read(tmp_path, VALID, arrays=("tokenizer.ggml.tokens",)).metadata
    assert metadata["tokenizer.ggml.tokens"] == tuple(f"t{i}" for i in range(48))
    assert metadata["tokenizer.ggml.token_type"] == ArrayInfo(U32, 48)


def test_a_header_larger_than_the_buffer_is_read_completely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "_CHUNK", 64)
    assert len(read(tmp_path, VALID).tensors) == len(GGUF_SHAPES)


def test_the_size_of_a_quantised_tensor_follows_from_its_blocks(tmp_path: Path) -> None:
    content = header(tensors=tensor(b"q", (64, 3), 3, 0), counts=(1, 0)) + bytes(128)
    info = read(tmp_path, content).tensors["q"]
    assert (info.dtype, info.shape, info.size) == ("Q4_1", (3, 64), 3 * 2 * 20)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(b"", "truncated", id="empty"),
        pytest.param(b"PK\3\4" + bytes(60), "not a GGUF file", id="magic"),
        pytest.param(b"GGUF" + struct.pack("<I", 1) + bytes(60), "version 1", id="version"),
        pytest.param(b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian", id="big-endian"),
        pytest.param(header(counts=(2**63, 0)), "claims", id="tensor count"),
        pytest.param(header(counts=(0, 2**40)), "claims", id="pair count"),
        pytest.param(header(struct.pack("<Q", 2**62), counts=(0, 1)), "must be at most", id="key length"),
        pytest.param(header(KEY + struct.pack("<I", 99), counts=(0, 1)), "unknown type", id="value type"),
        pytest.param(header(KEY + struct.pack("<IQ", TEXT, 2**27 - 1), counts=(0, 1)), "truncated", id="string length"),
        pytest.param(header(KEY + struct.pack("<IIQ", ARRAY, U32, 2**60), counts=(0, 1)), "exceeds", id="array length"),
        pytest.param(header(KEY + struct.pack("<IIQ", ARRAY, ARRAY, 1), counts=(0, 1)), "element type", id="nested"),
        pytest.param(
            header(KEY + struct.pack("<IIQQ", ARRAY, TEXT, 1, 2**63), counts=(0, 1)), "truncated", id="string in array",
        ),
        pytest.param(header((KEY + struct.pack("<II", U32, 1)) * 2, counts=(0, 2)), "occurs twice", id="key twice"),
        pytest.param(header(tensors=tensor(b"t", (1,) * 9, 0, 0), counts=(1, 0)), "dimensions", id="dimensions"),
        pytest.param(header(tensors=tensor(b"t", (1,), 77, 0), counts=(1, 0)), "unknown type 77", id="tensor type"),
        pytest.param(header(tensors=tensor(b"t", (2**60, 2**60), 0, 0), counts=(1, 0)), "invalid shape", id="overflow"),
        pytest.param(header(tensors=tensor(b"t", (33,), 3, 0), counts=(1, 0)), "invalid shape", id="broken block"),
        pytest.param(header(tensors=tensor(b"t", (1000,), 0, 0), counts=(1, 0)), "truncated", id="beyond the end"),
        pytest.param(header(tensors=tensor(b"t", (1,), 0, 2**63), counts=(1, 0)), "truncated", id="offset"),
        pytest.param(header(tensors=tensor(b"t", (1,), 0, 3), counts=(1, 0)), "not aligned", id="alignment"),
        pytest.param(header(tensors=tensor(b"t", (9,), 0, 0) + tensor(b"u", (1,), 0, 32), counts=(2, 0)), "overlaps",
                     id="overlap"),
        pytest.param(header(tensors=tensor(b"t", (1,), 0, 0) + tensor(b"t", (1,), 0, 32), counts=(2, 0)), "twice",
                     id="tensor twice"),
        pytest.param(header(tensors=tensor(b"\0", (1,), 0, 0), counts=(1, 0)), "invalid name", id="name"),
        pytest.param(gguf_bytes(GGUF_METADATA | {"general.alignment": (U32, 3)}), "alignment", id="odd alignment"),
        pytest.param(gguf_bytes(GGUF_METADATA | {"general.alignment": (U32, 0)}), "alignment", id="no alignment"),
    ],
)  # fmt: skip
def test_a_malformed_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, problem: str) -> None:
    with pytest.raises(HeaderError, match=problem):
        read(tmp_path, content)


def test_a_huge_array_in_a_sparse_file_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + struct.pack("<IIQ", ARRAY, 10, 3_900_000_000))
    with path.open("r+b") as file:
        file.truncate(40_000_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError, match="exceeds the limit"):
            read_gguf_header(path)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 2000), st.binary(min_size=1, max_size=8)), max_size=4), st.integers(0, len(VALID))
)
@pytest.mark.slow
@example([(16, b"\xff" * 8)], 0)
def test_a_damaged_file_is_refused_or_read_within_its_bounds(
    tmp_path: Path, changes: list[tuple[int, bytes]], end: int
) -> None:
    content = bytearray(VALID)
    for position, value in changes:
        content[position : position + len(value)] = value
    try:
        parsed = read(tmp_path, bytes(content[: end or None]))
    except HeaderError:
        return
    assert all(info.start + info.size <= parsed.size for info in parsed.tensors.values())


@given(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=20), st.integers(1, 1000), st.data())
def test_the_name_of_any_file_of_a_split_model_gives_all_of_them(name: str, count: int, data: st.DataObject) -> None:
    number = data.draw(st.integers(1, count))
    path = Path("models") / f"{name}-{number:05}-of-{count:05}.gguf"
    paths = gguf.shard_paths(path)
    assert (len(paths), paths[number - 1]) == (count, path)
    assert {gguf.shard_paths(other) for other in (paths[0], paths[-1])} == {paths}


@given(
    st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=30).filter(
        lambda name: name not in (".", "..")
    )
)
def test_any_other_name_stands_for_one_file(name: str) -> None:
    assert gguf.shard_paths(Path(name)) == (Path(name),)
