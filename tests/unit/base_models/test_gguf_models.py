"""GGUF files as people have them: split, renamed, without an end token, converted years ago, or no model at all."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.families import KNOWN_VOCABULARIES, SPLIT_RULES
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError, HeaderError, InvalidArgument
from peft_core.schemas.base_model import Base
from tests.model_files import ARRAY, F32, GGUF_METADATA, GGUF_SHAPES, TEXT, U32, gguf_bytes, weights

Metadata = dict[str, tuple[int, Any]]
PRE, ADD_BOS = "tokenizer.ggml.pre", "tokenizer.ggml.add_bos_token"
BOS: Metadata = {"tokenizer.ggml.bos_token_id": (U32, 1)}


def metadata(*without: str, **changes: tuple[int, Any]) -> Metadata:
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in (GGUF_METADATA | BOS | named).items() if key not in without}


def resolved(path: Path) -> Base:
    return resolve(str(path), Settings())


def refusal(path: Path) -> str:
    with pytest.raises((BaseCheckpointError, InvalidArgument, HeaderError)) as caught:
        resolved(path)
    return str(caught.value)


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def write_split(directory: Path, count: int = 3, *, metadata_alone_first: bool = False) -> list[Path]:
    """Write the toy model as llama.cpp's llama-gguf-split does: the first file has all metadata, and perhaps no tensors."""
    names = list(GGUF_SHAPES)
    parts = [names[number::count] for number in range(count)]
    if metadata_alone_first:
        parts = [[], names[::2], names[1::2]]
    paths = []
    for number, part in enumerate(parts):
        split = {
            "split.no": (U32, number),
            "split.count": (U32, count),
            "split.tensors.count": (U32, len(GGUF_SHAPES)),
        }
        content = gguf_bytes(
            (GGUF_METADATA if number == 0 else {}) | split,
            {name: GGUF_SHAPES[name] for name in part},
            values=weights(),
        )
        paths.append(write(directory / f"tiny-{number + 1:05}-of-{count:05}.gguf", content))
    return paths


@pytest.mark.parametrize("metadata_alone_first", [False, True])
def test_a_split_model_is_one_model_whichever_of_its_files_is_given(metadata_alone_first: bool, tmp_path: Path) -> None:
    whole = resolved(write(tmp_path / "whole.gguf", gguf_bytes(values=weights())))
    paths = write_split(tmp_path / "split", metadata_alone_first=metadata_alone_first)
    for path in paths:
        base = resolved(path)
        assert base.path == paths[0]
        assert base.shape == whole.shape
        assert base.fingerprint == whole.fingerprint
        assert base.size_bytes == sum(file.stat().st_size for file in paths)
    assert {file for file, _ in read_checkpoint(paths[0]).stored} <= set(paths)


def test_a_changed_file_of_a_split_model_is_read_again(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    first = resolved(paths[0]).fingerprint
    paths[2].write_bytes(paths[2].read_bytes()[:-1] + b"\1")
    assert resolved(paths[0]).fingerprint.sample != first.sample


def test_an_incomplete_split_model_is_refused_with_the_missing_files(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].unlink()
    assert "1 of the 3 files of this split model are missing: tiny-00002-of-00003.gguf" in refusal(paths[0])


def test_files_of_different_split_models_are_refused(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].write_bytes(paths[2].read_bytes())
    assert "its 3 files do not belong together" in refusal(paths[0])


def test_a_renamed_file_of_a_split_model_is_refused_with_the_command_that_merges(tmp_path: Path) -> None:
    message = refusal(write_split(tmp_path)[0].rename(tmp_path / "model.gguf"))
    assert "one of the 3 files of a split model" in message
    assert "llama-gguf-split --merge" in message


@pytest.mark.parametrize("name", ["sha256-0123abcd", "model.bin", "MODEL.GGUF", "ggml-model-q4_0"])
def test_a_gguf_file_is_known_by_its_content_not_by_its_name(name: str, tmp_path: Path) -> None:
    base = resolved(write(tmp_path / name, gguf_bytes()))
    assert (base.name, base.format) == ("Tiny", "gguf")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.bin", b"PK\3\4" + bytes(60), "not a GGUF file"),
        ("model.gguf", b"<html>" + bytes(60), "a damaged GGUF file: it does not begin as one"),
        ("model.gguf", b"", "a damaged GGUF file"),
        ("model.gguf", b"GGUF" + struct.pack(">I", 3) + bytes(60), "big-endian"),
    ],
)
def test_another_file_is_refused_with_what_it_is(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    assert message in refusal(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general__type": (TEXT, "adapter")}, "a LoRA adapter in GGUF format"),
        ({"general__type": (TEXT, "imatrix")}, "an importance matrix"),
        ({"general__type": (TEXT, "mmproj")}, "the projector of a vision-language model"),
        ({"general__architecture": (TEXT, "clip")}, "the projector of a vision-language model"),
        ({"general__architecture": (TEXT, "controlvector")}, "a control vector"),
    ],
)
def test_a_gguf_file_without_a_language_model_is_refused_with_what_it_holds(
    changes: Metadata, message: str, tmp_path: Path
) -> None:
    assert message in refusal(write(tmp_path / "x.gguf", gguf_bytes(metadata(**changes))))


def test_a_vocabulary_without_weights_is_refused(tmp_path: Path) -> None:
    assert "it has no weights" in refusal(write(tmp_path / "vocab.gguf", gguf_bytes(metadata(), {})))


def test_a_file_without_an_end_token_is_refused_with_the_key_of_its_metadata(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "x.gguf", gguf_bytes(metadata("tokenizer.ggml.eos_token_id"))))
    assert "it has no tokenizer.ggml.eos_token_id, which ends a text" in message
    assert "--special-token-by-id eos" in message
    assert "tokenizer_config.json" not in message


@pytest.mark.parametrize(
    ("without", "changes", "message"),
    [
        (
            (),
            {"tokenizer.ggml.eos_token_id": (U32, 48)},
            "its tokenizer.ggml.eos_token_id is 48, but it has 48 tokens",
        ),
        (("tokenizer.ggml.bos_token_id",), {PRE: (TEXT, "llama-bpe")}, "no tokenizer.ggml.bos_token_id, which begins"),
        (("tokenizer.ggml.tokens",), {}, "tokenizer.ggml.tokens is missing"),
        (("tokenizer.ggml.merges",), {}, "tokenizer.ggml.merges is missing"),
        ((), {"tokenizer.ggml.tokens": (ARRAY, (TEXT, ["t"] * 49))}, "has 49 tokens, but its embedding has 48 rows"),
    ],
)
def test_an_incomplete_vocabulary_is_refused(
    without: tuple[str, ...], changes: Metadata, message: str, tmp_path: Path
) -> None:
    assert message in refusal(write(tmp_path / "x.gguf", gguf_bytes(metadata(*without) | changes)))


def vocabulary(tmp_path: Path, *without: str, **changes: tuple[int, Any]) -> tuple[str | None, bool]:
    checkpoint = read_checkpoint(write(tmp_path / "x.gguf", gguf_bytes(metadata(*without, **changes))))
    assert checkpoint.vocabulary is not None
    return checkpoint.vocabulary.split_rule, checkpoint.vocabulary.adds_bos


@pytest.mark.parametrize(
    ("pre", "adds_bos"),
    [("llama-bpe", True), ("tekken", True), ("falcon3", True), ("qwen2", False), ("smollm", False), ("dbrx", False)],
)
def test_a_file_that_does_not_say_it_begins_texts_as_llama_cpp_does(pre: str, adds_bos: bool, tmp_path: Path) -> None:
    assert vocabulary(tmp_path, tokenizer__ggml__pre=(TEXT, pre)) == (pre, adds_bos)


def test_a_sentencepiece_vocabulary_adds_a_bos_token_by_default(tmp_path: Path) -> None:
    scores = {"tokenizer.ggml.model": (TEXT, "llama"), "tokenizer.ggml.scores": (ARRAY, (U32, [0] * 48))}
    path = write(tmp_path / "x.gguf", gguf_bytes(metadata(PRE, "tokenizer.ggml.merges") | scores))
    checkpoint = read_checkpoint(path)
    assert checkpoint.vocabulary is not None
    assert (checkpoint.vocabulary.split_rule, checkpoint.vocabulary.adds_bos) == (None, True)


@pytest.mark.parametrize("without", [(PRE,), ()])
def test_a_file_that_does_not_name_its_rule_is_refused_unless_its_vocabulary_is_known(
    without: tuple[str, ...], tmp_path: Path
) -> None:
    changes: Metadata = {} if without else {PRE: (TEXT, "default")}
    message = refusal(write(tmp_path / "x.gguf", gguf_bytes(metadata(*without) | changes)))
    assert "it does not say by which rule its tokenizer splits text" in message
    assert "converted after May 2024" in message


@pytest.mark.parametrize(("known", "rule"), KNOWN_VOCABULARIES, ids=[rule for _, rule in KNOWN_VOCABULARIES])
@pytest.mark.parametrize("named", [False, True])
def test_the_rule_of_a_known_vocabulary_is_recognised(
    known: dict[int, str], rule: str, named: bool, tmp_path: Path
) -> None:
    assert rule in SPLIT_RULES
    size = max(known) + 1
    tokens = [known.get(number, f"t{number}") for number in range(size)]
    shapes = GGUF_SHAPES | {"token_embd.weight": (size, 32)}
    changes: Metadata = {"tokenizer.ggml.tokens": (ARRAY, (TEXT, tokens))}
    path = write(
        tmp_path / "x.gguf",
        gguf_bytes(metadata(PRE) | changes | ({PRE: (TEXT, "default")} if named else {}), shapes),
    )
    found = read_checkpoint(path).vocabulary
    assert found is not None
    assert (found.split_rule, found.adds_bos) == (rule, rule == "llama-bpe")


def test_a_quantisation_that_cannot_be_unpacked_is_refused_when_requested(tmp_path: Path) -> None:
    content = gguf_bytes()
    entry = b"output_norm.weight" + struct.pack("<IQ", 1, 32)
    assert entry + struct.pack("<I", 0) in content
    as_integers = content.replace(entry + struct.pack("<I", 0), entry + struct.pack("<I", 26))
    message = refusal(write(tmp_path / "x.gguf", as_integers))
    assert "formats that cannot be unpacked: I32 (output_norm.weight)" in message


SCALING = "llama.rope.scaling"


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, None),
        ({f"{SCALING}.type": (TEXT, "linear"), f"{SCALING}.factor": (F32, 4.0)}, 4.0),
        ({f"{SCALING}.factor": (F32, 4.0)}, 4.0),
        ({"llama.rope.scale_linear": (F32, 8.0)}, 8.0),
        ({"llama.rope.scale_linear": (F32, 1.0)}, None),
        ({f"{SCALING}.type": (TEXT, "linear")}, None),
        ({f"{SCALING}.type": (TEXT, "none"), f"{SCALING}.factor": (F32, 4.0)}, None),
    ],
)
def test_the_rotary_embedding_is_scaled_as_in_llama_cpp(keys: Metadata, factor: float | None, tmp_path: Path) -> None:
    rope = read_checkpoint(write(tmp_path / "x.gguf", gguf_bytes(GGUF_METADATA | keys))).config["rope_parameters"]
    assert (rope["rope_type"], rope.get("factor")) == ("default" if factor is None else "linear", factor)
