"""A Hugging Face tokenizer as metadata of a GGUF file.

Only byte-level BPE whose way of splitting text llama.cpp has under a known name: with any other, the same text would give other
tokens, silently.
"""

from __future__ import annotations

import json
from typing import Any

from peft_core.base_models.families import SPLIT_RULES
from peft_core.base_models.tokenizer import load_tokenizer
from peft_core.llamacpp.worker.gguf_file import Value
from peft_core.schemas.base_model import Base
from peft_core.system.files import open_regular, read_exactly

MAX_TOKENIZER_BYTES = 64 << 20
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def artificial_vocabulary(size: int) -> dict[str, Value]:
    """Return a vocabulary of made-up tokens, for a model that is only ever given token ids."""
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [f"t{token}" for token in range(size)],
        "tokenizer.ggml.token_type": [_NORMAL] * size,
        "tokenizer.ggml.merges": ["t 0"],
        "tokenizer.ggml.add_bos_token": False,
    }


def read_vocabulary(base: Base) -> dict[str, Value] | None:
    """Return the tokenizer of a Hugging Face directory as metadata, or None if llama.cpp has none that splits text alike."""
    tokenizer = _read_json(base, "tokenizer.json")
    config = _read_json(base, "tokenizer_config.json")
    model = tokenizer.get("model") or {}
    rule = _rule_name(tokenizer)
    if model.get("type") != "BPE" or model.get("byte_fallback") or rule is None or tokenizer.get("normalizer"):
        return None
    tokens = [f"[PAD{token}]" for token in range(base.shape.vocab_size)]
    types = [_UNUSED] * len(tokens)
    added = tokenizer.get("added_tokens") or []
    numbered = [
        *((text, number, _NORMAL) for text, number in model["vocab"].items()),
        *((t["content"], t["id"], _CONTROL if t.get("special") else _USER_DEFINED) for t in added),
    ]
    for text, number, kind in numbered:
        if not 0 <= number < len(tokens):
            return None
        tokens[number], types[number] = text, kind
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    if not merges:
        return None
    values: dict[str, Value] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    for key in ("bos", "unk", "pad"):
        text = config.get(f"{key}_token")
        text = text.get("content") if isinstance(text, dict) else text
        if isinstance(text, str) and text in tokens:
            name = {"unk": "unknown", "pad": "padding"}.get(key, key)
            values[f"tokenizer.ggml.{name}_token_id"] = tokens.index(text)
    if (template := _chat_template(base, config)) is not None:
        values["tokenizer.chat_template"] = template
    return values


def read_beginning_and_end(base: Base) -> dict[str, Value]:
    """Return what a directory's tokenizer puts before every text, and the token that ends one, as metadata.

    Its configuration may name neither: Llama 3's BOS token is in tokenizer.json only. llama.cpp would take token 11 for a
    missing end.
    """
    tokenizer = load_tokenizer(base.path)
    values: dict[str, Value] = {
        "tokenizer.ggml.add_bos_token": bool(tokenizer.beginning),
        "tokenizer.ggml.eos_token_id": tokenizer.end_of_text,
    }
    if tokenizer.beginning:
        values["tokenizer.ggml.bos_token_id"] = tokenizer.beginning[0]
    return values


def _chat_template(base: Base, config: dict[str, Any]) -> str | None:
    path = base.path / "chat_template.jinja"
    if path.is_file():
        with open_regular(path, follow_links=True) as descriptor:
            return read_exactly(descriptor, min(path.stat().st_size, 1 << 20), 0, path).decode("utf-8", "replace")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def _rule_name(tokenizer: dict[str, Any]) -> str | None:
    """Return llama.cpp's name of the rule by which this tokenizer splits text before BPE."""
    found = _rule(tokenizer)
    whole_words = bool((tokenizer.get("model") or {}).get("ignore_merges"))
    for name in ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "seed-coder", "tekken", "deepseek-coder"):
        rule = SPLIT_RULES[name]
        if found == (rule.patterns, rule.single_digits, rule.gpt2_pattern) and rule.whole_words_first == whole_words:
            return name
    return None


def _rule(tokenizer: dict[str, Any]) -> tuple[tuple[str, ...], bool, bool] | None:
    """Return the patterns, whether single digits are split off, and whether GPT-2's pattern follows; None for other steps."""
    top = tokenizer.get("pre_tokenizer") or {}
    patterns: list[str] = []
    digits = gpt2 = byte_level = False
    for step in top.get("pretokenizers", [top]):
        match step:
            case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", **rest} if not rest.get(
                "invert"
            ):
                patterns.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                digits = True
            case {"type": "ByteLevel", "add_prefix_space": False, **rest}:
                byte_level, gpt2 = True, bool(rest.get("use_regex", True))
            case _:
                return None
    return (tuple(patterns), digits, gpt2) if byte_level else None


def _read_json(base: Base, name: str) -> dict[str, Any]:
    path = base.path / name
    if not path.is_file():
        return {}
    with open_regular(path, follow_links=True) as descriptor:
        raw = read_exactly(descriptor, min(path.stat().st_size, MAX_TOKENIZER_BYTES), 0, path)
    value = json.loads(raw)
    return value if isinstance(value, dict) else {}
