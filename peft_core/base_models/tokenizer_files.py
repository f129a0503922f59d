"""What the tokenizer files of a model directory say, as far as a request depends on it. No tokenizer is loaded.

Planning refuses by these facts, and the workers use the same functions when they load the tokenizer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from peft_core.base_models.checkpoint_info import join_some, unusable
from peft_core.errors import HeaderError, sanitize
from peft_core.system.files import open_regular, read_exactly

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
MAX_TOKENIZER_BYTES = 128 << 20  # four times the size of Gemma's file, which has 256k tokens
_TEXT, _NUMBER = rb'"content":\s*("(?:[^"\\]|\\.)*")', rb'"id":\s*(\d{1,9})\b'
# One entry of "added_tokens": as the library tokenizers writes it, or in a file whose keys were sorted.
_ADDED = re.compile(_NUMBER + rb",\s*" + _TEXT + rb"|" + _TEXT + rb",\s*" + _NUMBER)
_TOKEN_ID = re.compile(r"\d{1,9}", re.ASCII)
_CONVERT = "Write one with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"


class EndOfText(NamedTuple):
    """The token that ends a text: its text, and its id for a vocabulary that does not have it. At least one is given."""

    text: str | None
    id: int | None


def special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a tokenizer_config.json names, such as {"bos_token": "<s>"}."""
    found = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def listed_tokens(config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the added tokens that a tokenizer_config.json lists, by id. tokenizer.json usually has the same."""
    listed = config.get("added_tokens_decoder")
    return {
        int(number): entry
        for number, entry in (listed.items() if isinstance(listed, dict) else ())
        if _TOKEN_ID.fullmatch(number) and isinstance(entry, dict) and isinstance(entry.get("content"), str)
    }


def end_of_text(special: Mapping[str, str], *configs: Mapping[str, Any]) -> EndOfText | None:
    """Return the token that ends a text; None if nothing names one. `configs`: generation_config.json, config.json."""
    for config in configs:
        value = config.get("eos_token_id")
        if isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, int):
            return EndOfText(special.get("eos_token"), value)
    named = special.get("eos_token")
    return EndOfText(named, None) if named is not None else None


def read_tokenizer(path: Path) -> bytes:
    """Return the content of a tokenizer.json.

    Raises:
        HeaderError: It cannot be read or is too large.
    """
    with open_regular(path, follow_links=True) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > MAX_TOKENIZER_BYTES:
            raise HeaderError(path, f"has {size} bytes; must be at most {MAX_TOKENIZER_BYTES}")
        return read_exactly(descriptor, size, 0, path)


def json_literals(token: str) -> tuple[bytes, bytes]:
    """Return both ways to write a token in JSON. Searching the file for them takes a hundredth of the time of parsing it."""
    return json.dumps(token, ensure_ascii=False).encode(), json.dumps(token).encode()


def require_tokenizer(path: Path, config: Mapping[str, Any], end: EndOfText | None, rows: int) -> None:
    """Check what can be known of a directory's tokenizer without loading it.

    `config`: tokenizer_config.json. `rows`: of the embedding.

    Raises:
        BaseCheckpointError: It is missing or damaged, ends no text, or has tokens without a row in the embedding.
        HeaderError: It cannot be read.
    """
    file = path / TOKENIZER
    if not file.is_file():
        only = ", only tokenizer.model" if (path / "tokenizer.model").is_file() else ""
        raise unusable(path, f"it has no {TOKENIZER}{only}", _CONVERT, _download_again(path))
    raw = read_tokenizer(file)
    if raw.startswith(b"version https://git-lfs"):
        raise HeaderError(file, "is a Git LFS pointer, not the file itself", code="git_lfs_pointer")
    if not (raw.lstrip().startswith(b"{") and raw.rstrip().endswith(b"}")):
        raise unusable(path, f"its {TOKENIZER} is damaged or incomplete", _download_again(path))
    _require_end(path, raw, end, rows)
    # A padding token is never in a text. It is often added without enlarging the embedding.
    padding = special_tokens(config).get("pad_token")
    added = {token: entry["content"] for token, entry in listed_tokens(config).items()} | dict(_added_tokens(raw))
    beyond = [
        f"{sanitize(text)} ({token})" for token, text in sorted(added.items()) if token >= rows and text != padding
    ]
    if beyond:
        listed = join_some(beyond)
        raise unusable(
            path,
            f"its tokenizer has tokens for which its embedding, which has {rows} rows, has none: {listed}",
            "Enlarge the model with resize_token_embeddings, and train the new rows before you train an adapter",
            "Or use the tokenizer.json that belongs to these weights",
        )


def _require_end(path: Path, raw: bytes, end: EndOfText | None, rows: int) -> None:
    if end is not None and end.text is not None and any(literal in raw for literal in json_literals(end.text)):
        return
    if end is not None and end.id is not None and 0 <= end.id < rows:
        return
    named = f"; the eos_token {sanitize(end.text)!r} is not in its vocabulary" if end is not None and end.text else ""
    raise unusable(path, f"it defines no end-of-text token{named}", f"Set eos_token in its {TOKENIZER_CONFIG}")


def _added_tokens(raw: bytes) -> Iterator[tuple[int, str]]:
    start = raw.find(b'"added_tokens"')
    if start < 0:
        return
    end = raw.find(b'"normalizer"', start)
    for match in _ADDED.finditer(raw, start, end if end >= 0 else len(raw)):
        try:
            yield int(match[1] or match[4]), json.loads(match[2] or match[3])
        except ValueError:
            continue


def _download_again(path: Path) -> str:
    return f"If {path.name} is an unfinished download, run `hf download ORG/NAME` again"
