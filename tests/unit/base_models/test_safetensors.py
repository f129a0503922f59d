"""Tests of the safetensors header parser: valid headers are read, malformed ones are refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_core.base_models.checkpoint_info import TensorInfo
from peft_core.base_models.safetensors import ADAPTER_LIMITS, HeaderLimits, read_header
from peft_core.errors import HeaderError
from tests.model_files import safetensors_bytes, with_length

VALID = safetensors_bytes({"a": (2, 3), "b": (), "c": (0, 4)})


def entry(**changes: object) -> dict[str, object]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def packed(header: object, data: bytes = bytes(8)) -> bytes:
    return with_length(json.dumps(header).encode(), data)


def test_a_header_gives_names_types_shapes_and_offsets(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID)
    header = read_header(path)
    start = len(VALID) - 28
    assert list(header.tensors.values()) == [
        TensorInfo("a", "F32", (2, 3), start, 24),
        TensorInfo("b", "F32", (), start + 24, 4),
        TensorInfo("c", "F32", (0, 4), start + 28, 0),
    ]
    assert header.size == len(VALID)


def test_metadata_is_separated_from_the_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(packed({"__metadata__": {"format": "pt"}, "a": entry()}))
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == ["a"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        pytest.param(b"", "too few", id="empty"),
        pytest.param(
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer", id="lfs pointer"
        ),
        pytest.param(struct.pack("<Q", 2**63) + b"{}", "longer than the file", id="length bomb"),
        pytest.param(VALID[:-1], "truncated", id="truncated"),
        pytest.param(VALID + b"\0", "bytes follow", id="trailing bytes"),
        pytest.param(with_length(b"[1]"), "not a JSON object", id="array"),
        pytest.param(with_length(b'{"a": NaN}'), "not valid JSON", id="NaN"),
        pytest.param(with_length(b'{"a":' + b"[" * 200_000), "too deep", id="deep JSON"),
        pytest.param(with_length(b'{"a": "\xff"}'), "not valid JSON", id="not UTF-8"),
        pytest.param(with_length(b'{"a":1,"a":1}'), "occurs twice", id="duplicate names"),
        pytest.param(packed({"__metadata__": [], "a": entry()}), "__metadata__", id="metadata"),
        pytest.param(packed({"a": 1}), "malformed", id="no entry"),
        pytest.param(packed({"a": entry(more=1)}), "malformed", id="unknown key"),
        pytest.param(packed({"a": entry(data_offsets=[0, 8.0])}), "malformed", id="fractional offset"),
        pytest.param(packed({"a": entry(dtype="F128")}), "unknown type", id="dtype"),
        pytest.param(packed({"a": entry(shape=[-2])}), "invalid shape", id="negative shape"),
        pytest.param(packed({"a": entry(shape=[True])}), "invalid shape", id="boolean shape"),
        pytest.param(packed({"a": entry(shape=[1] * 99)}), "invalid shape", id="many dimensions"),
        pytest.param(packed({"a": entry(shape=[2**62, 2**62])}), "invalid size", id="overflow"),
        pytest.param(packed({"a": entry(data_offsets=[8, 0])}), "invalid size", id="backwards"),
        pytest.param(packed({"a": entry(data_offsets=[0, 10**4000])}), "invalid size", id="huge offset"),
        pytest.param(packed({"a": entry(shape=[3])}), "but its shape needs", id="size"),
        pytest.param(packed({"a": entry(), "b": entry()}), "overlap", id="overlap"),
        pytest.param(packed({"a": entry(data_offsets=[8, 16])}, bytes(16)), "gap", id="gap"),
        pytest.param(packed({"\ud800": entry()}), "invalid name", id="lone surrogate"),
    ],
)
def test_a_malformed_file_is_refused_with_the_reason(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(HeaderError, match=problem) as caught:
        read_header(path)
    assert caught.value.code == ("git_lfs_pointer" if "LFS" in problem else "bad_weights_file")
    assert len(str(caught.value)) < 500


def test_headers_beyond_the_limits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(VALID)
    with pytest.raises(HeaderError, match="header has"):
        read_header(path, limits=HeaderLimits(header_bytes=10, tensors=10))
    with pytest.raises(HeaderError, match="lists 3 tensors"):
        read_header(path, limits=HeaderLimits(header_bytes=10_000, tensors=2))


def test_links_are_followed_only_if_requested(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(VALID)
    link = tmp_path / "x.safetensors"
    link.symlink_to(tmp_path / "blob")
    assert read_header(link, follow_links=True).tensors
    with pytest.raises(HeaderError, match="symbolic link"):
        read_header(link, follow_links=False)


def test_a_fifo_a_directory_and_a_missing_file_are_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(HeaderError, match="not a regular file"):
            read_header(path, follow_links=False)
    with pytest.raises(HeaderError, match="No such file"):
        read_header(tmp_path / "missing")


@pytest.mark.slow
@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=8), st.integers(0, len(VALID)))
def test_a_damaged_file_is_refused_or_read_within_its_bounds(
    tmp_path: Path, changes: list[tuple[int, int]], end: int
) -> None:
    content = bytearray(VALID)
    for position, value in changes:
        content[position] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(content[: end or None])
    try:
        header = read_header(path, limits=ADAPTER_LIMITS)
    except HeaderError:
        return
    assert all(t.start >= 0 and t.start + t.size <= header.size for t in header.tensors.values())
