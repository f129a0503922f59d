"""GGUF files that are written piece by piece, and metadata that is taken over from files of unknown origin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from peft_core.base_models.gguf import read_gguf_header
from peft_core.errors import HeaderError
from peft_core.llamacpp.worker.gguf_file import GgufTensor, copy_metadata, encode, write_gguf
from tests.model_files import GGUF_METADATA, TEXT, gguf_bytes

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES = st.one_of(
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    TEXTS,
    st.lists(TEXTS, min_size=1, max_size=5),
    st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=5),
)


def write(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    entries = [
        GgufTensor(name, array.shape, F16 if array.dtype == np.float16 else F32) for name, array in tensors.items()
    ]
    with path.open("wb") as stream:
        encoded = {key: encode(value) for key, value in metadata.items()}
        write_gguf(stream, encoded, entries, [[array] for array in tensors.values()])


@given(metadata=st.dictionaries(st.text("abc.", min_size=1, max_size=8), VALUES, max_size=6))
def test_what_is_written_is_read_back(tmp_path_factory: pytest.TempPathFactory, metadata: dict[str, Any]) -> None:
    path = tmp_path_factory.mktemp("gguf") / "a.gguf"
    write(path, metadata, {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.float16)})
    header = read_gguf_header(path, arrays=metadata)
    assert header.metadata == {key: tuple(v) if isinstance(v, list) else v for key, v in metadata.items()}
    assert copy_metadata(path).keys() == metadata.keys()
    assert {name: info.shape for name, info in header.tensors.items()} == {"a": (2, 3), "b": (5,)}


def test_the_gguf_package_reads_the_same(tmp_path: Path) -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    write(
        tmp_path / "a.gguf",
        {"general.architecture": "llama", "n": 3},
        {"first": matrix, "half": matrix.astype(np.float16)},
    )
    reader = GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.architecture"].contents() == "llama"
    assert reader.fields["n"].contents() == 3
    for tensor in reader.tensors:
        np.testing.assert_array_equal(np.asarray(tensor.data, np.float32).reshape(2, 3), matrix)


def test_metadata_is_taken_over_byte_by_byte(tmp_path: Path) -> None:
    original = gguf_bytes(GGUF_METADATA)
    (tmp_path / "a.gguf").write_bytes(original)
    copied = copy_metadata(tmp_path / "a.gguf")
    assert list(copied) == list(GGUF_METADATA)
    for key, value in copied.items():
        assert key.encode() + value in original


def test_descriptions_lose_control_characters_and_a_chat_template_is_kept(tmp_path: Path) -> None:
    hostile = {
        "general.name": (TEXT, "Tiny\x1b[2J\u202e\x00model"),
        "general.url": (TEXT, "x\r\ny"),
        "tokenizer.chat_template": (TEXT, "{{ messages }}\x1b"),
    }
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(GGUF_METADATA | hostile))
    copied = copy_metadata(tmp_path / "a.gguf")
    assert copied["general.name"] == encode("Tiny\ufffd[2J\ufffd\ufffdmodel")
    assert copied["general.url"] == encode("x\ufffd\ny")
    assert copied["tokenizer.chat_template"] == encode("{{ messages }}\x1b")


def test_a_malformed_file_is_refused(tmp_path: Path) -> None:
    whole = gguf_bytes(GGUF_METADATA)
    for broken in (whole[:200], b"GGUF", whole.replace(b"GGUF", b"GGML", 1)):
        (tmp_path / "a.gguf").write_bytes(broken)
        with pytest.raises(HeaderError):
            copy_metadata(tmp_path / "a.gguf")
