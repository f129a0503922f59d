"""Define everything that depends on a base model's family, in one place.

Most families need no entry: any Hugging Face decoder with linear layers can be trained. An entry makes it cheaper (weights
left in their file or held in bfloat16, fused decoder blocks) or makes its GGUF files readable.

To add a family:
1. Add a row to `FAMILIES`, at first only `model_type` (as in config.json) and `title`. The row states that every weight can
   stay in its file. `tests/integration/test_compute_plans.py` builds a tiny model of each row and checks this; run it. If
   transformers cannot build the tiny model from its default settings, add a case to `_config` in `tests/tiny_models.py`.
2. If its decoder blocks are Llama's (RMS norm, rotary embedding, SiLU-gated MLP), set `fused_blocks=True`. If queries and
   keys are normalised per head, set `head_norms=True`. The same test compares loss, memory and number of fused blocks.
3. If it has fused blocks, llama.cpp converts it and transformers reads its GGUF tokenizer, set `gguf`. Add new tensor names
   to `_IN_BLOCKS` in `gguf_model.py`, and the rule by which its vocabulary splits text to `SPLIT_RULES`.
   `tests/integration/test_bases_convert.py` converts a toy file of each family and compares it with the model that
   transformers builds; add the tensors that Llama does not have to its `EXTRA_TENSORS`.
4. Add its weights to `LAYOUTS` in `layouts.py`, so that files with other weights are refused in milliseconds, not seconds.
   `tests/integration/test_base_weights.py` compares every layout with transformers' class.
5. If its tokenizer has fill-in-the-middle tokens, add them to `FIM_TOKENS`; `tests/unit/base_models/test_fim_tokens.py`
   covers every entry.
6. If its chat turns end with a new token, add it to `END_TOKENS`. If a setting changes its logits after the output head, add
   the setting to `LOGIT_SETTINGS`. If its embedding module has a new name, add it to `EMBEDDING_MODULES`.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_core.schemas.dataset import FillInTheMiddle

# -- families, by the `model_type` of their configuration --------------------------------------------------------------


@dataclass(frozen=True)
class GgufFormat:
    """How llama.cpp stores a family. Its `general.architecture` equals the `model_type`."""

    model_class: str  # in transformers
    # llama.cpp's converter interleaves the two halves of each head's rows of q and k, for its own rotary kernel.
    interleaves_heads: bool = False
    has_bias_settings: bool = False  # its configuration has `attention_bias` and `mlp_bias`


@dataclass(frozen=True)
class Family:
    """A family whose weights can all stay in their file, or be held in bfloat16, while a CPU computes with them."""

    model_type: str
    title: str
    fused_blocks: bool = False  # decoder blocks are computed by modeling.fused_blocks, logits in chunks
    head_norms: bool = False  # each query and key head is normalised: both versions are saved for the backward pass
    gguf: GgufFormat | None = None  # None: only Hugging Face directories are read


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("arcee", "Arcee"),
        Family("cohere", "Cohere"),
        Family("ernie4_5", "Ernie 4.5"),
        Family("exaone4", "EXAONE 4"),
        Family("glm", "GLM"),
        Family("glm4", "GLM-4"),
        Family("gpt_neox", "GPT-NeoX"),
        Family("granite", "Granite"),
        Family("helium", "Helium"),
        Family(
            "llama",
            "Llama",
            fused_blocks=True,
            gguf=GgufFormat("LlamaForCausalLM", interleaves_heads=True, has_bias_settings=True),
        ),
        Family("mistral", "Mistral", fused_blocks=True),  # its GGUF files are Llama's
        Family("olmo", "OLMo"),
        Family("olmo2", "OLMo 2"),
        Family("phi", "Phi"),
        Family("phi3", "Phi-3"),
        Family("qwen2", "Qwen2", fused_blocks=True, gguf=GgufFormat("Qwen2ForCausalLM")),
        Family("qwen3", "Qwen3", fused_blocks=True, head_norms=True, gguf=GgufFormat("Qwen3ForCausalLM")),
        Family("seed_oss", "Seed-OSS"),
        Family("smollm3", "SmolLM3"),
        Family("stablelm", "StableLM"),
        Family("starcoder2", "StarCoder2"),
    )
}


def has_fused_blocks(model_type: str) -> bool:
    return model_type in FAMILIES and FAMILIES[model_type].fused_blocks


def has_head_norms(model_type: str) -> bool:
    return model_type in FAMILIES and FAMILIES[model_type].head_norms


def gguf_format(architecture: str | None) -> GgufFormat | None:
    """Return how llama.cpp stores a GGUF architecture; None if it is not supported."""
    family = FAMILIES.get(architecture or "")
    return family.gguf if family is not None else None


# Both are for error messages. Mistral's GGUF files can be read although it has no `gguf`: their architecture is 'llama'.
FULLY_SUPPORTED = ", ".join(family.title for family in FAMILIES.values() if family.fused_blocks)
GGUF_ARCHITECTURES = ", ".join(name for name, family in FAMILIES.items() if family.gguf is not None)

# -- vocabularies: how text is split before byte-pair encoding ---------------------------------------------------------


@dataclass(frozen=True)
class SplitRule:
    """Split at each pattern in turn, then at single digits, then by GPT-2's pattern."""

    patterns: tuple[str, ...] = ()
    single_digits: bool = False
    gpt2_pattern: bool = False
    whole_words_first: bool = False  # a word that is itself a token is not merged from smaller ones
    adds_bos: bool = False  # a BOS token begins every text, unless the file says otherwise


_GPT2 = SplitRule(gpt2_pattern=True)
_DIGITS = SplitRule(single_digits=True, gpt2_pattern=True)
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_PUNCTUATION = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_PUNCTUATION}"
_LLAMA3 = SplitRule((_GPT4,), whole_words_first=True, adds_bos=True)
_QWEN2 = SplitRule((rf"{_WORDS}|\p{{N}}|{_PUNCTUATION}",))
_SEED_CODER = SplitRule((rf"{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",))
_BEFORE_WORD, _UPPER, _LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = rf"{_BEFORE_WORD}{_UPPER}*{_LOWER}+|{_BEFORE_WORD}{_UPPER}+{_LOWER}*"
_TEKKEN = SplitRule(
    (rf"{_CASED_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",),
    whole_words_first=True,
    adds_bos=True,
)
_DEEPSEEK_CODER = SplitRule(
    (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"), single_digits=True
)

# The keys are values of `tokenizer.ggml.pre` in a GGUF file, which does not contain the rule itself. A wrong rule gives other
# tokens for the same text, and silently worse results. Names and rules come from `llama_vocab::impl::load` and
# `llm_tokenizer_bpe` in llama.cpp (src/llama-vocab.cpp), which follow the tokenizer.json of the models that use them.
SPLIT_RULES: dict[str, SplitRule] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mellum", "gigachat", "a.x-4.0", "exaone4", "olmo", "mpt", "trillion"), _GPT2),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "codeshell", "exaone", "command-r", "minerva-7b", "mellum2"), _DIGITS
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"), _LLAMA3
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), SplitRule((_GPT4,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "kormo", "megrez", "hunyuan", "grok-2"), _QWEN2),
    "seed-coder": _SEED_CODER,
    "tekken": _TEKKEN,
    "deepseek-coder": _DEEPSEEK_CODER,
}

# Files that were converted before May 2024 do not name their rule, or name it "default". Some vocabularies are known by a few
# of their tokens: {id: token} -> the rule's name.
KNOWN_VOCABULARIES: tuple[tuple[dict[int, str], str], ...] = (
    ({128000: "<|begin_of_text|>", 128001: "<|end_of_text|>"}, "llama-bpe"),
    ({151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"}, "qwen2"),
    ({32013: "<｜begin▁of▁sentence｜>", 32014: "<｜end▁of▁sentence｜>"}, "deepseek-coder"),  # noqa: RUF001
    ({0: "<|endoftext|>", 3: "<repo_name>", 4: "<reponame>", 5: "<file_sep>", 16: "<empty_output>"}, "smollm"),
    ({0: "!", 262: "Ġthe", 50256: "<|endoftext|>"}, "gpt-2"),
)

# -- vocabularies: special tokens, recognised by their text ------------------------------------------------------------

# The method is from Bavarian et al., arXiv 2207.14255; the tokens and their order are from the model cards.
FIM_TOKENS = (
    FillInTheMiddle("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    FillInTheMiddle("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, StarCoder2
    FillInTheMiddle("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    FillInTheMiddle("▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"),  # Code Llama
    FillInTheMiddle("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek-Coder  # noqa: RUF001
    FillInTheMiddle("[PREFIX]", "[SUFFIX]", ""),  # Codestral, as mistral-common writes it
)

# These tokens end an answer, in addition to those that a base model's generation_config.json names.
END_TOKENS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "</s>")

# -- names in models and configurations --------------------------------------------------------------------------------

EMBEDDING_MODULES = ("embed_tokens", "wte", "word_embeddings")

# With these settings a model changes its logits after the output head, so that logits cannot be computed in chunks.
LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "logits_scale",
    "output_multiplier",
    "logits_soft_cap",
)

# modeling.attention does not implement these arguments of transformers' attention.
UNSUPPORTED_ATTENTION = ("softcap", "s_aux")  # soft-capped scores (Gemma 2), attention sinks (GPT-OSS)

# -- LoRA adapters in llama.cpp -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaCppFormat:
    """How llama.cpp stores the matrices that an adapter changes."""

    architecture: str  # `general.architecture` of the base model's GGUF file
    interleaves_heads: bool = False  # as in `GgufFormat`


# From llama.cpp's converters (`undo_permute` and `modify_tensors` in conversion/*.py). Not listed: Helium, which llama.cpp does
# not have, and GPT-NeoX, whose fused q, k and v it reorders. Families that are trained without a row above may be listed too.
LLAMA_CPP: dict[str, LlamaCppFormat] = {
    "arcee": LlamaCppFormat("arcee", interleaves_heads=True),
    "cohere": LlamaCppFormat("command-r"),
    "ernie4_5": LlamaCppFormat("ernie4_5"),
    "exaone4": LlamaCppFormat("exaone4"),
    "gemma": LlamaCppFormat("gemma"),
    "gemma2": LlamaCppFormat("gemma2"),
    "gemma3_text": LlamaCppFormat("gemma3"),
    "glm": LlamaCppFormat("chatglm"),
    "glm4": LlamaCppFormat("glm4"),
    "granite": LlamaCppFormat("granite", interleaves_heads=True),
    "llama": LlamaCppFormat("llama", interleaves_heads=True),
    "mistral": LlamaCppFormat("llama", interleaves_heads=True),
    "olmo": LlamaCppFormat("olmo", interleaves_heads=True),
    "olmo2": LlamaCppFormat("olmo2"),
    "phi": LlamaCppFormat("phi2"),
    "phi3": LlamaCppFormat("phi3"),
    "qwen2": LlamaCppFormat("qwen2"),
    "qwen3": LlamaCppFormat("qwen3"),
    "seed_oss": LlamaCppFormat("seed_oss"),
    "smollm3": LlamaCppFormat("smollm3", interleaves_heads=True),
    "stablelm": LlamaCppFormat("stablelm"),
    "starcoder2": LlamaCppFormat("starcoder2"),
}
