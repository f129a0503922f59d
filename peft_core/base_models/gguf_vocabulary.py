"""Read from a GGUF file's metadata how its tokenizer works. Where the metadata is silent, llama.cpp's defaults apply.

They are in `llama_vocab::impl::load` of llama.cpp (src/llama-vocab.cpp). Where llama.cpp would only warn that quality suffers,
the file is refused.
"""

from __future__ import annotations

from pathlib import Path

from peft_core.base_models.checkpoint_info import GgufVocabulary, unusable
from peft_core.base_models.families import FULLY_SUPPORTED, KNOWN_VOCABULARIES, SPLIT_RULES
from peft_core.base_models.gguf import GgufHeader, read_gguf_header
from peft_core.errors import sanitize

_KEY = "tokenizer.ggml"
_TOKENS, _PRE = f"{_KEY}.tokens", f"{_KEY}.pre"
_ADD_BOS, _BOS, _EOS = f"{_KEY}.add_bos_token", f"{_KEY}.bos_token_id", f"{_KEY}.eos_token_id"
_END_OF_TURN = f"{_KEY}.eot_token_id"
USE_DIRECTORY = "Use the model's Hugging Face directory"
USE_OTHER_MODEL = f"Use a GGUF file of one of the families {FULLY_SUPPORTED}, or the model's Hugging Face directory"


def read_vocabulary(path: Path, header: GgufHeader, rows: int) -> GgufVocabulary:
    """Return how the tokenizer works. `rows`: of the embedding.

    Raises:
        BaseCheckpointError: The vocabulary is of an unsupported kind, or the file does not say enough about it.
    """
    kind = header.text(f"{_KEY}.model")
    if kind not in ("gpt2", "llama"):
        raise unusable(path, f"its tokenizer has the type {kind!r}; must be gpt2 or llama", USE_OTHER_MODEL)
    size = header.count(_TOKENS)
    order = (f"{_KEY}.merges",) if kind == "gpt2" else (f"{_KEY}.scores", f"{_KEY}.merges")
    if not size or all(header.count(key) is None for key in order):
        raise unusable(path, f"it has no vocabulary ({order[0] if size else _TOKENS} is missing)", USE_DIRECTORY)
    if size > rows:
        raise unusable(path, f"its tokenizer has {size} tokens, but its embedding has {rows} rows", USE_DIRECTORY)
    split_rule = None if kind == "llama" else _split_rule(path, header)
    adds_bos = header.metadata.get(_ADD_BOS, split_rule is None or SPLIT_RULES[split_rule].adds_bos)
    _require_token(path, header, _EOS, "eos", size)
    if adds_bos:
        _require_token(path, header, _BOS, "bos", size)
    end_of_turn = header.integer(_END_OF_TURN)
    return GgufVocabulary(
        split_rule=split_rule,
        adds_bos=bool(adds_bos),
        end_of_turn=end_of_turn if end_of_turn is not None and 0 <= end_of_turn < size else None,
        adds_space=header.metadata.get(f"{_KEY}.add_space_prefix", True) is not False,
    )


def _require_token(path: Path, header: GgufHeader, key: str, name: str, size: int) -> None:
    token = header.integer(key)
    if token is None or not 0 <= token < size:
        problem = f"it has no {key}" if token is None else f"its {key} is {token}, but it has {size} tokens"
        purpose = "which ends a text" if name == "eos" else "which begins a text"
        raise unusable(
            path,
            f"{problem}, {purpose}",
            f"Add it with `gguf-new-metadata --special-token-by-id {name} ID IN OUT` (of the package gguf)",
            "Or use another GGUF file of the model",
        )


def _split_rule(path: Path, header: GgufHeader) -> str:
    """Return the name of the rule that splits text before BPE."""
    name = header.text(_PRE) or "default"
    if name in SPLIT_RULES:
        return name
    if name != "default":
        # llama.cpp rejects it too: a wrong split silently costs quality.
        raise unusable(path, f"its tokenizer splits text by the unknown rule {sanitize(name)!r}", USE_DIRECTORY)
    tokens = read_gguf_header(path, arrays=(_TOKENS,)).metadata.get(_TOKENS)
    for known, rule in KNOWN_VOCABULARIES:
        if isinstance(tokens, tuple) and all(
            index < len(tokens) and tokens[index] == token for index, token in known.items()
        ):
            return rule
    raise unusable(
        path,
        f"it does not say by which rule its tokenizer splits text ({_PRE} is {header.text(_PRE) or 'missing'}), and its "
        "vocabulary is not a known one; a wrong rule would silently give other tokens",
        "Use a GGUF file of the model that was converted after May 2024, or its Hugging Face directory",
        "Or name the rule with `gguf-new-metadata --pre-tokenizer NAME IN OUT` (of the package gguf), if you know it",
    )
