"""Bases that somebody made to do harm: whatever their headers and configuration hold, a clean refusal, within bounds."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_core.base_models.gguf import MAX_TENSORS
from peft_core.base_models.resolve import resolve
from peft_core.base_models.safetensors import BASE_LIMITS
from peft_core.config import Settings
from peft_core.errors import PeftMcpError
from tests.model_files import ARRAY, CONFIG, GGUF_METADATA, TEXT, U32, gguf_bytes, with_length, write_model

ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**32 - 1])
MORE = (
    "rope_parameters",
    "rope_scaling",
    "head_dim",
    "quantization_config",
    "sliding_window",
    "torch_dtype",
    "auto_map",
)
ROPE = st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "type", "factor"]), ANYTHING, max_size=3)


def refused_or_fine(path: Path) -> None:
    try:
        resolve(str(path), Settings())
    except PeftMcpError as error:
        said = str(error)
    else:
        return
    assert said.replace("\n", "").isprintable()
    assert len(said) < 3_000


HYPOTHESIS = settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@HYPOTHESIS
@given(st.dictionaries(st.sampled_from([*CONFIG, *MORE]), ANYTHING | ROPE | NUMBERS, min_size=1, max_size=4))
def test_whatever_a_configuration_holds_it_is_refused_in_words_or_fine(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = write_model(tmp_path / "model")
    (model / "config.json").write_text(json.dumps(CONFIG | changes))
    refused_or_fine(model)


@HYPOTHESIS
@given(
    st.dictionaries(
        st.sampled_from([*GGUF_METADATA, "llama.expert_count", "llama.rope.scaling.type", "split.count"]),
        st.tuples(st.just(U32), NUMBERS.filter(lambda n: n >= 0))
        | st.tuples(st.just(TEXT), st.text(max_size=9))
        | st.just((ARRAY, (U32, [1, 2]))),
        min_size=1,
        max_size=4,
    )
)
def test_whatever_metadata_a_gguf_file_holds_it_is_refused_in_words_or_fine(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(GGUF_METADATA | changes))
    refused_or_fine(tmp_path / "x.gguf")


@HYPOTHESIS
@given(st.dictionaries(st.text(max_size=8), ANYTHING, max_size=4) | ANYTHING)
def test_whatever_an_index_or_a_tokenizer_configuration_holds(tmp_path: Path, content: Any) -> None:
    model = write_model(tmp_path / "model", shards=2)
    (model / "tokenizer_config.json").write_text(json.dumps(content))
    refused_or_fine(model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": content}))
    refused_or_fine(model)


@pytest.mark.parametrize("key", ["llama.block_count", "llama.context_length", "llama.attention.head_count"])
def test_a_count_beyond_every_model_is_refused_before_a_model_is_built_of_it(tmp_path: Path, key: str) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(GGUF_METADATA | {key: (U32, 2**32 - 1)}))
    with pytest.raises(PeftMcpError, match="no usable"):
        resolve(str(tmp_path / "x.gguf"), Settings())


def test_more_layers_than_there_are_weights_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PeftMcpError, match="1000 layers, its weights 2"):
        resolve(str(write_model(tmp_path / "model", num_hidden_layers=1000)), Settings())


KEY = struct.pack("<Q", 1)


def a_header_of_tensors(path: Path) -> None:
    """As many tensors as are read, of nothing."""
    entry = b"".join(
        struct.pack("<Q", 8) + f"{number:08}".encode() + struct.pack("<IQIQ", 1, 0, 0, 0)
        for number in range(MAX_TENSORS)
    )
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, MAX_TENSORS, 0) + entry + bytes(64))


def a_text_of_128_megabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + b"k" + struct.pack("<IQ", TEXT, 127 << 20))
        file.truncate(128 << 20)


def many_texts_of_a_megabyte(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 120))
        for number in range(120):
            file.write(KEY + bytes([number + 1]) + struct.pack("<IQ", TEXT, 1 << 20) + b"\xff" * (1 << 20))


def four_million_strings(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + b"k" + struct.pack("<IIQ", ARRAY, TEXT, 3_999_999))
        file.truncate(64 << 20)


def as_base(header: Callable[[], bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        (write_model(path) / "model.safetensors").write_bytes(with_length(header()))

    return make


def tensors_of_nothing() -> bytes:
    rows = (f'"t{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(BASE_LIMITS.tensors))
    return f"{{{','.join(rows)}}}".encode()


def index_of_lists(path: Path) -> None:
    (write_model(path, shards=2) / "model.safetensors.index.json").write_bytes(
        b'{"weight_map":[' + b",".join([b"[]"] * 10_000_000) + b"]}"
    )


BOMBS: dict[str, Callable[[Path], None]] = {
    "gguf of tensors": a_header_of_tensors,
    "gguf with a long text": a_text_of_128_megabytes,
    "gguf with many texts": many_texts_of_a_megabyte,
    "gguf with empty strings": four_million_strings,
    "safetensors of lists": as_base(lambda: b'{"a":[' + b",".join([b"[]"] * 10_000_000) + b"]}"),
    "safetensors of numbers": as_base(lambda: b'{"a":[' + b",".join([b"999"] * 7_000_000) + b"]}"),
    "safetensors of objects": as_base(lambda: b'{"a":[' + b",".join([b"{}"] * 10_000_000) + b"]}"),
    "safetensors of tensors": as_base(tensors_of_nothing),
    "an index of lists": index_of_lists,
}


@pytest.mark.timeout(180)
def test_what_swells_is_refused_within_the_memory_of_a_small_process(tmp_path: Path) -> None:
    """The operating system's own count, not Python's: 384 MB of address space, interpreter included."""
    (tmp_path / "model").mkdir()
    for number, bomb in enumerate(BOMBS.values()):
        bomb(tmp_path / f"{number}.gguf")
    program = """
        import sys
        from pathlib import Path
        from peft_core.base_models.resolve import resolve
        from peft_core.config import Settings
        from peft_core.errors import PeftMcpError
        for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
            try:
                resolve(str(path), Settings())
            except PeftMcpError:
                print("refused")
    """
    limit = 384 << 20
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.split() == ["refused"] * len(BOMBS), done.stderr[-500:]
