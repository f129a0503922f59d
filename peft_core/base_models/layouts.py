"""Names and shapes of a model's weights, from its configuration alone: what transformers' class of that family has.

transformers fills weights that a file lacks with random numbers, and ignores those that it does not know; both only cause a
warning in a log. Here a base model is compared with its class when it is requested, from headers, in milliseconds.
`tests/integration/test_base_weights.py` compares each layout with transformers' class. A model without a layout is
compared by transformers itself, in a child process (`planning/base_check.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft_core.base_models.checkpoint_info import join_some, unusable
from peft_core.errors import BaseCheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIED = "tie_word_embeddings"

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """The weights of a family whose names are `model.layers.N.MODULE.weight`.

    A shape is a string with one letter for each axis: H hidden_size, I intermediate_size, G both halves of a gated MLP (2 I),
    Q all query heads, K all key heads, A queries, keys and values (Q + 2 K), D one head.
    """

    model_class: str  # in transformers
    block: Mapping[str, str]  # module -> shape of its weight
    norm: str = "model.norm"  # the module before the output head; "": it has no weights
    norm_bias: bool = False  # all norms have a bias
    biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Setting -> modules that have a bias if it is true. "": always."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """The class's defaults for settings that config.json may omit, where they are neither null nor false."""

    undecided: tuple[str, ...] = ()
    """Settings that, if true, change the names in a way that is not described here."""

    def setting(self, config: Mapping[str, Any], name: str) -> Any:
        return config.get(name, self.defaults.get(name))


_Q, _K, _V, _O = (f"self_attn.{part}_proj" for part in "qkvo")
_QKV, _QKVO = (_Q, _K, _V), (_Q, _K, _V, _O)
_GATE, _UP, _DOWN = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
_BEFORE, _AFTER = "input_layernorm", "post_attention_layernorm"
_AFTER_MLP = "post_feedforward_layernorm"

_ATTENTION = {_Q: "QH", _K: "KH", _V: "KH", _O: "HQ"}
_GATED = {_GATE: "IH", _UP: "IH", _DOWN: "HI"}
_LLAMA = {**_ATTENTION, **_GATED, _BEFORE: "H", _AFTER: "H"}
_HEAD_NORMS = {"self_attn.q_norm": "D", "self_attn.k_norm": "D"}
_GLM = {**_ATTENTION, "mlp.gate_up_proj": "GH", _DOWN: "HI", _BEFORE: "H", _AFTER: "H"}
_GEMMA2 = {**_LLAMA, "pre_feedforward_layernorm": "H", _AFTER_MLP: "H"}
_ATTENTION_BIAS = {"attention_bias": _QKVO}
_LLAMA_BIASES = {"attention_bias": _QKVO, "mlp_bias": (_GATE, _UP, _DOWN)}
_TIED = {TIED: True}

# By `model_type`.
LAYOUTS: dict[str, Layout] = {
    "arcee": Layout(
        "ArceeForCausalLM",
        {**_ATTENTION, _UP: "IH", _DOWN: "HI", _BEFORE: "H", _AFTER: "H"},
        biases={"attention_bias": _QKVO, "mlp_bias": (_UP, _DOWN)},
    ),
    "cohere": Layout(
        "CohereForCausalLM",
        {**_ATTENTION, **_GATED, _BEFORE: "H"},
        biases=_ATTENTION_BIAS,
        defaults=_TIED,
        undecided=("use_qk_norm",),
    ),
    "exaone4": Layout(
        "Exaone4ForCausalLM",
        {**_ATTENTION, **_HEAD_NORMS, **_GATED, _AFTER: "H", _AFTER_MLP: "H"},
        defaults={"num_key_value_heads": 32},
    ),
    "gemma": Layout(
        "GemmaForCausalLM",
        _LLAMA,
        biases=_ATTENTION_BIAS,
        defaults={"num_key_value_heads": 16, "head_dim": 256, **_TIED},
    ),
    "gemma2": Layout(
        "Gemma2ForCausalLM",
        _GEMMA2,
        biases=_ATTENTION_BIAS,
        defaults={"num_key_value_heads": 4, "head_dim": 256, **_TIED},
    ),
    "gemma3_text": Layout(
        "Gemma3ForCausalLM",
        {**_GEMMA2, **_HEAD_NORMS},
        biases=_ATTENTION_BIAS,
        defaults={"num_key_value_heads": 4, "head_dim": 256, **_TIED},
    ),
    "glm": Layout(
        "GlmForCausalLM",
        _GLM,
        biases={"attention_bias": _QKV},
        defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    ),
    "glm4": Layout(
        "Glm4ForCausalLM",
        {**_GLM, "post_self_attn_layernorm": "H", "post_mlp_layernorm": "H"},
        biases={"attention_bias": _QKV},
        defaults={"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True},
    ),
    "granite": Layout("GraniteForCausalLM", _LLAMA, biases=_LLAMA_BIASES),
    "llama": Layout("LlamaForCausalLM", _LLAMA, biases=_LLAMA_BIASES),
    "mistral": Layout("MistralForCausalLM", _LLAMA, defaults={"num_key_value_heads": 8}),
    "olmo": Layout("OlmoForCausalLM", {**_ATTENTION, **_GATED}, norm="", biases=_ATTENTION_BIAS),
    "olmo2": Layout(
        "Olmo2ForCausalLM",
        {**_ATTENTION, "self_attn.q_norm": "Q", "self_attn.k_norm": "K", **_GATED, _AFTER: "H", _AFTER_MLP: "H"},
        biases=_ATTENTION_BIAS,
    ),
    "phi3": Layout(
        "Phi3ForCausalLM",
        {"self_attn.qkv_proj": "AH", _O: "HQ", "mlp.gate_up_proj": "GH", _DOWN: "HI", _BEFORE: "H", _AFTER: "H"},
    ),
    "qwen2": Layout("Qwen2ForCausalLM", _LLAMA, biases={"": _QKV}, defaults={"num_key_value_heads": 32}),
    "qwen3": Layout(
        "Qwen3ForCausalLM",
        {**_LLAMA, **_HEAD_NORMS},
        biases=_ATTENTION_BIAS,
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    "seed_oss": Layout(
        "SeedOssForCausalLM",
        _LLAMA,
        biases={"attention_bias": _QKV, "attention_out_bias": (_O,), "mlp_bias": (_GATE, _UP, _DOWN)},
        defaults={"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True},
    ),
    "smollm3": Layout("SmolLM3ForCausalLM", _LLAMA, biases=_LLAMA_BIASES, defaults={"num_key_value_heads": 4, **_TIED}),
    "stablelm": Layout(
        "StableLmForCausalLM",
        _LLAMA,
        norm_bias=True,
        biases={"use_qkv_bias": _QKV},
        defaults={"num_key_value_heads": 32},
        undecided=("qk_layernorm", "use_parallel_residual", "head_dim"),
    ),
    "starcoder2": Layout(
        "Starcoder2ForCausalLM",
        {**_ATTENTION, "mlp.c_fc": "IH", "mlp.c_proj": "HI", _BEFORE: "H", _AFTER: "H"},
        norm_bias=True,
        biases={"use_bias": (*_QKVO, "mlp.c_fc", "mlp.c_proj")},
        defaults={"num_key_value_heads": 2, "use_bias": True, **_TIED},
    ),
}


def is_tied(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration makes the output head the embedding."""
    layout = LAYOUTS.get(config["model_type"])
    return bool(layout.setting(config, TIED) if layout is not None else config.get(TIED))


def expected_shapes(config: Mapping[str, Any]) -> dict[str, Shape] | None:
    """Return every weight of the model that transformers builds from a configuration; None if this is not known here.

    A tied output head is not a weight of its own. Sizes must have been checked by `model_shape`.
    """
    layout = LAYOUTS.get(config["model_type"])
    if layout is None or any(layout.setting(config, name) for name in layout.undecided):
        return None
    sizes = _sizes(layout, config)
    if sizes is None:
        return None

    def shape(letters: str) -> Shape:
        return tuple(sizes[letter] for letter in letters)

    with_bias = {
        module
        for name, modules in layout.biases.items()
        if not name or layout.setting(config, name)
        for module in modules
    }
    block: dict[str, Shape] = {}
    for module, letters in layout.block.items():
        block[f"{module}.weight"] = shape(letters)
        if module in with_bias or (layout.norm_bias and len(letters) == 1):
            block[f"{module}.bias"] = shape(letters[:1])
    shapes = {EMBEDDING: shape("VH")}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    if layout.norm:
        shapes[f"{layout.norm}.weight"] = shape("H")
        if layout.norm_bias:
            shapes[f"{layout.norm}.bias"] = shape("H")
    if not is_tied(config):
        shapes[HEAD] = shape("VH")
    return shapes


def _sizes(layout: Layout, config: Mapping[str, Any]) -> dict[str, int] | None:
    heads, hidden, intermediate = (config[name] for name in ("num_attention_heads", "hidden_size", "intermediate_size"))
    kv_heads, head = (layout.setting(config, name) for name in ("num_key_value_heads", "head_dim"))
    kv_heads = heads if kv_heads is None else kv_heads
    head = hidden // heads if head is None else head
    if type(kv_heads) is not int or type(head) is not int:
        return None
    query, key = heads * head, kv_heads * head
    return {
        "V": config["vocab_size"],
        "H": hidden,
        "I": intermediate,
        "G": 2 * intermediate,
        "Q": query,
        "K": key,
        "A": query + 2 * key,
        "D": head,
    }


# -- what a file has instead -------------------------------------------------------------------------------------------

# A part of a name -> how weights with such names come about, and what to do. No model has these names.
_WRAPPERS: tuple[tuple[str, str], ...] = (
    (
        r"modules_to_save|original_module|base_layer|lora_\w+|base_model\.model",
        "They were saved out of a PEFT model: call merge_and_unload() on it, and save what that returns",
    ),
    (r"_orig_mod", "They were saved out of a compiled model: save the model that was given to torch.compile"),
    (
        r"_fsdp_wrapped_module|_checkpoint_wrapped_module|_flat_param",
        "They were saved out of a sharded model: gather its full state dict, and save that",
    ),
)
_WRAPPER = [(re.compile(rf"(?:^|\.)(?:{part})(?:\.|$)", re.ASCII), advice) for part, advice in _WRAPPERS]
# Buffers that were stored in earlier years and are computed today.
_BUFFERS = re.compile(r"(?:^|\.)rotary_emb\.(?:inv_freq|cos_cached|sin_cached)$", re.ASCII)


def is_buffer(name: str) -> bool:
    """Return whether a tensor is no weight, because every model computes it from its configuration."""
    return _BUFFERS.search(name) is not None


def require_exact(path: Path, config: Mapping[str, Any], stored: Mapping[str, Shape]) -> None:
    """Compare the weights in a base model's files with those of its class, as far as its class is known here.

    `stored`: the shapes in the files, without buffers and without an output head that is tied to the embedding.

    Raises:
        BaseCheckpointError: A weight is missing, unknown or has another shape; the message names it.
    """
    wrapped = [name for name in stored if any(pattern.search(name) for pattern, _ in _WRAPPER)]
    expected = expected_shapes(config)
    if expected is None and not wrapped:
        return
    layout = LAYOUTS.get(config["model_type"])
    model_class = layout.model_class if layout is not None else str(config["model_type"])
    missing, unknown = (
        ([], wrapped)
        if expected is None
        else ([name for name in expected if name not in stored], [name for name in stored if name not in expected])
    )
    mismatched = {
        name: (stored[name], shape) for name, shape in (expected or {}).items() if stored.get(name, shape) != shape
    }
    if missing or unknown or mismatched:
        raise not_the_weights(path, model_class, missing, unknown, mismatched)


def not_the_weights(
    path: Path,
    model_class: str,
    missing: Iterable[str],
    unknown: Iterable[str],
    mismatched: Mapping[str, tuple[Shape, Shape]],
) -> BaseCheckpointError:
    """Return the error for weights that are not those of a model class.

    `mismatched`: name -> (shape in the file, shape in the class).
    """
    missing, unknown = list(missing), list(unknown)
    parts = [f"missing {join_some(missing)}"] if missing else []
    parts += [f"unknown {join_some(unknown)}"] if unknown else []
    parts += [
        f"{name} has the shape {list(found)} instead of {list(wanted)}"
        for name, (found, wanted) in list(mismatched.items())[:2]
    ]
    parts += [f"{len(mismatched) - 2} more have another shape"] if len(mismatched) > 2 else []
    return unusable(
        path,
        f"its weights are not those of {model_class}: {'; '.join(parts)}",
        _advice(missing, unknown, mismatched) if path.is_dir() else "Use the model's Hugging Face directory",
    )


def _advice(missing: list[str], unknown: list[str], mismatched: Mapping[str, object]) -> str:
    for pattern, advice in _WRAPPER:
        if any(pattern.search(name) for name in unknown):
            return advice
    if missing == [HEAD] and not unknown:
        return 'If its output head is the embedding, set "tie_word_embeddings": true in its config.json'
    if prefix := _common_prefix(missing, unknown):
        return prefix
    if mismatched and not missing and not unknown:
        return "Use the config.json that belongs to these weights"
    return "Download it again, or save it again with the class and the configuration that it was trained with"


def _common_prefix(missing: list[str], unknown: list[str]) -> str | None:
    """Explain names that differ from the expected ones only in their beginning."""
    if (prefix := _prefix(unknown, missing)) is not None:
        return f"Each of its names begins with {prefix!r}: save the model that lies below it, or rename the weights"
    if (prefix := _prefix(missing, unknown)) is not None:
        return f"Its names lack the prefix {prefix!r}: save the complete model, with its output head"
    return None


def _prefix(longer: list[str], shorter: list[str]) -> str | None:
    """Return what the longer names have before the shorter ones; None if they differ in another way."""
    ends = tuple(f".{name}" for name in shorter[:1])
    prefix = next((name.removesuffix(ends[0]) for name in longer if name.endswith(ends)), None)
    common = {name.removeprefix(f"{prefix}.") for name in longer} & set(shorter)
    return prefix if len(common) == min(len(longer), len(shorter)) > 0 else None
