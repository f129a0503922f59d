"""Detect fill-in-the-middle tokens in a base model's vocabulary."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.families import FIM_TOKENS
from peft_core.base_models.gguf import MAX_HEADER_BYTES
from peft_core.base_models.tokenizer_files import TOKENIZER, json_literals, read_tokenizer
from peft_core.schemas.dataset import FillInTheMiddle
from peft_core.system.files import open_regular, read_exactly


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
    return read_fim_tokens(path) is not None


def read_fim_tokens(path: Path) -> FillInTheMiddle | None:
    """Return a base model's tokens for fill-in-the-middle; None if it has none.

    Raises:
        HeaderError: Its vocabulary cannot be read.
    """
    if path.is_dir():
        raw = read_tokenizer(path / TOKENIZER)
        # Search the raw JSON for both ways to escape the token: parsing would take a second and ten times the memory.
        return find_fim_tokens(lambda token: any(literal in raw for literal in set(json_literals(token))))
    raw = _before_weights(path)
    return find_fim_tokens(lambda token: len(token.encode()).to_bytes(8, "little") + token.encode() in raw)


def _before_weights(path: Path) -> bytes:
    """Return the metadata of a GGUF file as stored: each text, and so each token, follows its length."""
    starts = [tensor.start for file, tensor in read_checkpoint(path).stored if file == path]
    with open_regular(path, follow_links=True) as descriptor:
        end = os.fstat(descriptor).st_size  # the first file of a split model may have no weights
        return read_exactly(descriptor, min([*starts, end, MAX_HEADER_BYTES]), 0, path)
