"""Detect fill-in-the-middle tokens in a base model's vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.families import FIM_TOKENS
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
    if path.is_dir():
        raw = read_tokenizer(path / TOKENIZER)
        # Search the raw JSON for both ways to escape the token: parsing would take a second and ten times the memory.
        return find_fim_tokens(lambda token: any(literal in raw for literal in json_literals(token))) is not None
    raw = _before_weights(path)
    return find_fim_tokens(lambda token: len(token.encode()).to_bytes(8, "little") + token.encode() in raw) is not None


def _before_weights(path: Path) -> bytes:
    """Return the metadata of a GGUF file as stored: each text, and so each token, follows its length."""
    size = min((tensor.start for file, tensor in read_checkpoint(path).stored if file == path), default=0)
    with open_regular(path, follow_links=True) as descriptor:
        return read_exactly(descriptor, size, 0, path)
