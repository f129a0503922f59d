"""Fill-in-the-middle tokens are detected from the vocabulary alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_core.base_models.families import FIM_TOKENS
from peft_core.base_models.fim_tokens import has_fim_tokens
from peft_core.errors import HeaderError
from peft_core.schemas.dataset import FillInTheMiddle
from tests.model_files import ARRAY, GGUF_METADATA, TEXT, gguf_bytes, write_model

VOCABULARY = "tokenizer.ggml.tokens"


def gguf_with(path: Path, *tokens: str) -> Path:
    others = [f"t{number}" for number in range(48 - len(tokens))]
    path.write_bytes(gguf_bytes({**GGUF_METADATA, VOCABULARY: (ARRAY, (TEXT, [*others, *tokens]))}))
    return path


def directory_with(path: Path, *tokens: str, ensure_ascii: bool = False) -> Path:
    vocabulary = {token: number for number, token in enumerate(["a", *tokens])}
    file = write_model(path) / "tokenizer.json"
    file.write_text(json.dumps({"model": {"vocab": vocabulary}}, ensure_ascii=ensure_ascii), encoding="utf-8")
    return path


@pytest.mark.parametrize("fim", FIM_TOKENS)
def test_every_set_of_fim_tokens_is_detected_in_both_formats(fim: FillInTheMiddle, tmp_path: Path) -> None:
    tokens = [token for token in fim if token]
    assert has_fim_tokens(gguf_with(tmp_path / "model.gguf", *tokens))
    pieces = [segment.text for segment in fim.prompt("before", "after")]
    assert pieces.index("before") == pieces.index(fim.prefix) + 1
    assert has_fim_tokens(directory_with(tmp_path / "plain", *tokens))
    assert has_fim_tokens(directory_with(tmp_path / "escaped", *tokens, ensure_ascii=True))


def test_an_incomplete_set_or_a_longer_word_is_not_detected(tmp_path: Path) -> None:
    prefix, suffix, middle, _ = FIM_TOKENS[0]
    for name, tokens in {"none": [], "two": [prefix, suffix], "one word": [prefix + suffix + middle]}.items():
        assert not has_fim_tokens(gguf_with(tmp_path / f"{name}.gguf", *tokens)), name
        assert not has_fim_tokens(directory_with(tmp_path / name, *tokens)), name


def test_a_missing_vocabulary_is_reported(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    (base / "tokenizer.json").unlink()
    with pytest.raises(HeaderError, match=r"tokenizer.json: cannot be read"):
        has_fim_tokens(base)
