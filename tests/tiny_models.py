"""Language models of two layers with a character-level tokenizer: every operation of a real model, at no cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    Starcoder2Config,
)

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.modeling.batches import Document
from tests.factories import record_base

VOCABULARY = ["<end>", "<begin>", "<unk>", *map(chr, range(32, 127)), "\n"]
_SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,  # large, so that logits differ clearly
}
TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def tiny_model(architecture: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_config(architecture))
    model.eval()
    model.requires_grad_(requires_grad=False)
    return model


def tiny_documents(lengths: tuple[int, ...], seed: int = 0) -> list[Document]:
    generator = torch.Generator().manual_seed(seed)
    documents = []
    for length in lengths:
        learn_T = torch.rand(length, generator=generator) > 0.2
        learn_T[0] = False
        ids_T = torch.randint(3, len(VOCABULARY), (length,), generator=generator, dtype=torch.int32)
        documents.append(Document(ids_T=ids_T, learn_T=learn_T))
    return documents


def write_tiny_base(
    directory: Path,
    architecture: str = "llama",
    *,
    chat_template: str | None = TEMPLATE,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a complete Hugging Face model directory."""
    tiny_model(architecture).to(dtype).save_pretrained(directory)
    write_tiny_tokenizer(directory, chat_template=chat_template)
    return directory


def write_tiny_adapter(directory: Path, base: Path, seed: int, *, scale: float = 0.3, **config: Any) -> Path:
    """Write a LoRA adapter with PEFT, and a manifest that names its base. With `scale` 0, B is zero as before training."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], **config}
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            factor = scale if "lora_B" in name else 0.3
            parameter.data = factor * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(str(directory), save_embedding_layers=False)
    record_base(directory, resolve(str(base), Settings()))
    return directory


def write_trained_adapter(directory: Path, base: Path, texts: Sequence[str], *, steps: int) -> Path:
    """Train a LoRA adapter on the texts, which are of equal length, and write it as `write_tiny_adapter` does."""
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(tiny_model(), config)
    ids_BT = torch.tensor([[VOCABULARY.index(character) for character in text] for text in texts])
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
    model.save_pretrained(str(directory), save_embedding_layers=False)
    record_base(directory, resolve(str(base), Settings()))
    return directory


def write_tiny_tokenizer(directory: Path, *, chat_template: str | None = TEMPLATE) -> None:
    directory.mkdir(exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({token: n for n, token in enumerate(VOCABULARY)}, unk_token="<unk>"))  # noqa: S106 -- a vocabulary token, not a secret
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.add_special_tokens(VOCABULARY[:3])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<end>", "bos_token": {"content": "<begin>"}}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_byte_level_tokenizer(directory: Path, marks: Sequence[str] = (), *, begins: bool = False) -> None:
    """Replace the tokenizer by one that llama.cpp has, too: GPT-2's, with the same number of tokens.

    `begins`: whether it puts <begin> before every text, and its configuration says nothing of that, as with Llama 3.
    """
    tokens = [
        "<|endoftext|>",
        "<begin>",
        "<unk>",
        *map(chr, range(33, 126)),
        "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}",
    ]
    tokens += ["\N{LATIN CAPITAL LETTER C WITH DOT ABOVE}", "de"]
    tokens[5 : 5 + len(marks)] = marks
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, [("d", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([*tokens[:3], *marks])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": tokens[0], "bos_token": tokens[0], "unk_token": tokens[0], "chat_template": TEMPLATE}
    if begins:
        begin = processors.TemplateProcessing(single=f"{tokens[1]} $A", special_tokens=[(tokens[1], 1)])
        tokenizer.post_processor = begin  # type: ignore[assignment]  # typed as read-only
        tokenizer.save(str(directory / "tokenizer.json"))
        config["bos_token"] = tokens[1]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_sentencepiece_tokenizer(directory: Path, *, dummy_space: str, marks: Sequence[str] = ()) -> None:
    """Write a tokenizer like Llama's, which puts a space before every text.

    `dummy_space` names the component that adds the space: "prepend" (a normaliser) or "metaspace" (a pre-tokenizer).
    """
    directory.mkdir(exist_ok=True)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\u2581\u2581"]
    tokens += [*map(chr, range(33, 127)), "de", "def", "\u2581d", "\u2581de", "\u2581def"]
    merges = [("\u2581", "\u2581"), ("d", "e"), ("de", "f"), ("\u2581", "d"), ("\u2581", "de"), ("\u2581", "def")]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))  # noqa: S106 -- a vocabulary token, not a secret
    if dummy_space == "prepend":
        prepend = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(prepend)  # type: ignore[assignment]  # typed as read-only
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *marks])
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>", "bos_token": "<s>"}')


def _config(architecture: str) -> PreTrainedConfig:  # noqa: PLR0911, PLR0912 -- one branch per architecture
    match architecture:
        case "llama":
            return LlamaConfig(**_SIZES)
        case "qwen2":  # q, k and v have biases
            return Qwen2Config(**_SIZES)
        case "qwen3":  # normalises each query and key head
            return Qwen3Config(**_SIZES, head_dim=8)
        case "mistral":
            return MistralConfig(**_SIZES, sliding_window=None)
        case "mistral_window":  # each token attends to the last 8 only
            return MistralConfig(**_SIZES, sliding_window=8)
        case "gemma2":  # soft-caps attention scores and logits
            return Gemma2Config(**_SIZES, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=2.0)
        case "smollm3":  # every fourth layer has no position encoding
            return SmolLM3Config(**_SIZES)
        case "starcoder2":
            return Starcoder2Config(**_SIZES, sliding_window=None)
        case "phi":
            return PhiConfig(**_SIZES | {"tie_word_embeddings": False})
        case "phi3":  # one matrix for query, key and value
            return Phi3Config(**_SIZES, sliding_window=None)
        case "gpt_oss":  # attention sinks; mixture of experts
            return GptOssConfig(**_SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1)
        case "deepseek_v3":  # value heads smaller than key heads; experts from the second layer on
            heads = {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
            ranks = {"q_lora_rank": 16, "kv_lora_rank": 16}
            experts = {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
            return DeepseekV3Config(
                **_SIZES | heads, **ranks, **experts, moe_intermediate_size=16, first_k_dense_replace=1
            )
        case other if other != "gpt2":
            return AutoConfig.for_model(other, **_SIZES)
        case _:  # learned position embeddings, Conv1D layers
            return GPT2Config(
                vocab_size=len(VOCABULARY),
                n_positions=256,
                n_embd=32,
                n_layer=2,
                n_head=4,
                bos_token_id=1,
                eos_token_id=0,
            )
