"""How text is split before BPE, by the name that GGUF files give the rule (`tokenizer.ggml.pre`).

The vocabulary was learned on text split like this; splitting differently gives other tokens for the same text and
silently costs quality. Names and rules: `llama_vocab::impl::load` and `llm_tokenizer_bpe` in llama.cpp (src/llama-vocab.cpp).
Each was given to llama.cpp from the original tokenizer.json of its models.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SplitRule:
    """Split at each pattern in turn, then at single digits, then by GPT-2's pattern."""

    patterns: tuple[str, ...] = ()
    single_digits: bool = False
    gpt2_pattern: bool = False
    whole_words_first: bool = False  # a word that is a token is taken whole, whatever the merges say


_GPT2 = SplitRule(gpt2_pattern=True)
_DIGITS = SplitRule(single_digits=True, gpt2_pattern=True)
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = SplitRule((rf"{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}",), whole_words_first=True)
_QWEN2 = SplitRule((rf"{_WORDS}|\p{{N}}|{_OTHERS}",))
_DEEPSEEK_CODER = SplitRule(
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"), single_digits=True
)

SPLIT_RULES: dict[str, SplitRule] = {
    **dict.fromkeys(("default", "gpt-2", "phi-2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell", "exaone"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2),
    "deepseek-coder": _DEEPSEEK_CODER,
}
