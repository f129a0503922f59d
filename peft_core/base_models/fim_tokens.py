"""How a base is asked for the text between two others, as its vocabulary tells."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from peft_core.base_models.families import FIM_TOKENS
from peft_core.base_models.gguf import read_gguf_header
from peft_core.errors import HeaderError
from peft_core.schemas.dataset import FillInTheMiddle
from peft_core.system.files import open_regular, read_exactly

MAX_TOKENIZER_BYTES = 128 << 20  # four times Gemma's, of 256k tokens
_TOKENS = "tokenizer.ggml.tokens"


def find_fim_tokens(knows: Callable[[str], bool]) -> FillInTheMiddle | None:
    """The family whose tokens a vocabulary has, `knows` telling of each; None where it has none for this."""
    for family in FIM_TOKENS:
        if all(knows(token) for token in (family.prefix, family.suffix, family.middle) if token):
            return family
    return None


def has_fim_tokens(path: Path) -> bool:
    """Whether a base, a directory or a .gguf file, has tokens for this. No tokenizer is loaded.

    Raises:
        HeaderError: its vocabulary cannot be read.
    """
    if path.is_dir():
        raw = _tokenizer(path / "tokenizer.json")
        # Looked for as it is written, escaped to ASCII or not: parsed, it would take a second and ten times its size.
        return find_fim_tokens(lambda token: any(form in raw for form in _quoted(token))) is not None
    tokens = read_gguf_header(path, arrays=(_TOKENS,)).metadata.get(_TOKENS)
    return isinstance(tokens, tuple) and find_fim_tokens(frozenset(tokens).__contains__) is not None


def _quoted(token: str) -> tuple[bytes, bytes]:
    return json.dumps(token, ensure_ascii=False).encode(), json.dumps(token).encode()


def _tokenizer(path: Path) -> bytes:
    with open_regular(path, follow_links=True) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > MAX_TOKENIZER_BYTES:
            raise HeaderError(path, f"has {size} bytes, more than the {MAX_TOKENIZER_BYTES} that are read")
        return read_exactly(descriptor, size, 0, path)
