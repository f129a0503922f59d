"""Malicious base models: each is refused with a readable message, within bounded time and memory, or is harmless."""

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
OTHER_SETTINGS = (
    "rope_parameters",
    "rope_scaling",
    "head_dim",
    "quantization_config",
    "sliding_window",
    "torch_dtype",
    "auto_map",
)
ROPE = st.dictionaries(st.sampled_from(["rope_theta", "rope_type", "type", "factor"]), ANYTHING, max_size=3)


def assert_resolved_or_refused(path: Path) -> None:
    try:
        resolve(str(path), Settings())
    except PeftMcpError as error:
        message = str(error)
    else:
        return
    assert message.replace("\n", "").isprintable()
    assert len(message) < 3_000


HYPOTHESIS = settings(max_examples=300, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])


@HYPOTHESIS
@given(st.dictionaries(st.sampled_from([*CONFIG, *OTHER_SETTINGS]), ANYTHING | ROPE | NUMBERS, min_size=1, max_size=4))
def test_any_configuration_is_accepted_or_refused_with_a_message(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = write_model(tmp_path / "model")
    (model / "config.json").write_text(json.dumps(CONFIG | changes))
    assert_resolved_or_refused(model)


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
def test_any_gguf_metadata_is_accepted_or_refused_with_a_message(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(GGUF_METADATA | changes))
    assert_resolved_or_refused(tmp_path / "x.gguf")


@HYPOTHESIS
@given(st.dictionaries(st.text(max_size=8), ANYTHING, max_size=4) | ANYTHING)
def test_any_index_or_tokenizer_configuration_is_accepted_or_refused_with_a_message(
    tmp_path: Path, content: Any
) -> None:
    model = write_model(tmp_path / "model", shards=2)
    (model / "tokenizer_config.json").write_text(json.dumps(content))
    assert_resolved_or_refused(model)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": content}))
    assert_resolved_or_refused(model)


@pytest.mark.parametrize("key", ["llama.block_count", "llama.context_length", "llama.attention.head_count"])
def test_an_implausible_size_is_refused_before_a_model_is_built(tmp_path: Path, key: str) -> None:
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(GGUF_METADATA | {key: (U32, 2**32 - 1)}))
    with pytest.raises(PeftMcpError, match="no usable"):
        resolve(str(tmp_path / "x.gguf"), Settings())


def test_a_configuration_with_more_layers_than_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeftMcpError, match="1000 layers, but its weights have 2"):
        resolve(str(write_model(tmp_path / "model", num_hidden_layers=1000)), Settings())


KEY = struct.pack("<Q", 1)


def write_many_empty_tensors(path: Path) -> None:
    """Write a GGUF file with the maximum number of tensors, all of which are empty."""
    entry = b"".join(
        struct.pack("<Q", 8) + f"{number:08}".encode() + struct.pack("<IQIQ", 1, 0, 0, 0)
        for number in range(MAX_TENSORS)
    )
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, MAX_TENSORS, 0) + entry + bytes(64))


def write_string_of_128_megabytes(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + b"k" + struct.pack("<IQ", TEXT, 127 << 20))
        file.truncate(128 << 20)


def write_many_strings_of_a_megabyte(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 120))
        for number in range(120):
            file.write(KEY + bytes([number + 1]) + struct.pack("<IQ", TEXT, 1 << 20) + b"\xff" * (1 << 20))


def write_four_million_strings(path: Path) -> None:
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + KEY + b"k" + struct.pack("<IIQ", ARRAY, TEXT, 3_999_999))
        file.truncate(64 << 20)


def write_base_with(header: Callable[[], bytes]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.unlink(missing_ok=True)
        (write_model(path) / "model.safetensors").write_bytes(with_length(header()))

    return make


def empty_tensors() -> bytes:
    rows = (f'"t{number}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(BASE_LIMITS.tensors))
    return f"{{{','.join(rows)}}}".encode()


def write_index_of_lists(path: Path) -> None:
    (write_model(path, shards=2) / "model.safetensors.index.json").write_bytes(
        b'{"weight_map":[' + b",".join([b"[]"] * 10_000_000) + b"]}"
    )


BOMBS: dict[str, Callable[[Path], None]] = {
    "gguf of tensors": write_many_empty_tensors,
    "gguf with a long string": write_string_of_128_megabytes,
    "gguf with many long strings": write_many_strings_of_a_megabyte,
    "gguf with empty strings": write_four_million_strings,
    "safetensors of lists": write_base_with(lambda: b'{"a":[' + b",".join([b"[]"] * 10_000_000) + b"]}"),
    "safetensors of numbers": write_base_with(lambda: b'{"a":[' + b",".join([b"999"] * 7_000_000) + b"]}"),
    "safetensors of objects": write_base_with(lambda: b'{"a":[' + b",".join([b"{}"] * 10_000_000) + b"]}"),
    "safetensors of tensors": write_base_with(empty_tensors),
    "index of lists": write_index_of_lists,
}


@pytest.mark.timeout(180)
def test_a_file_that_grows_in_memory_is_refused_by_a_process_with_little_memory(tmp_path: Path) -> None:
    """The operating system limits the process, including the interpreter, to 384 MB of address space."""
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
