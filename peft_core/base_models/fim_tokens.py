"""Detect fill-in-the-middle tokens in a base model's vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft_core.base_models.families import FIM_TOKENS
from peft_core.base_models.gguf import read_gguf_header
from peft_core.base_models.tokenizer_files import TOKENIZER, json_literals, read_tokenizer
from peft_core.schemas.dataset import FillInTheMiddle

_TOKENS = "tokenizer.ggml.tokens"


def find_fim_tokens(knows: Callable[[str], bool]) -> FillInTheMiddle | None:
    """Return the set of tokens that a vocabulary contains completely, according to `knows`; None if there is no such set."""
    for family in FIM_TOKENS:
        if all(knows(token) for token in (family.prefix, family.suffix, family.middle) if token):
            return family
    return None


def has_fim_tokens(path: Path) -> bool:
    """Return whether a base model (directory or .gguf file) has fill-in-the-middle tokens. No tokenizer is loaded.

    Raises:
        HeaderError: Its vocabulary cannot be read.
    """
    if path.is_dir():
        raw = read_tokenizer(path / TOKENIZER)
        # Search the raw JSON for both ways to escape the token: parsing would take a second and ten times the memory.
        return find_fim_tokens(lambda token: any(literal in raw for literal in json_literals(token))) is not None
    tokens = read_gguf_header(path, arrays=(_TOKENS,)).metadata.get(_TOKENS)
    return isinstance(tokens, tuple) and find_fim_tokens(frozenset(tokens).__contains__) is not None
