"""What conversion makes of GGUF tokenizers, quantisations and split files, compared with independent sources."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from tokenizers import Tokenizer, models

from peft_core.base_models.checkpoint_info import TensorInfo
from peft_core.base_models.families import SPLIT_RULES
from peft_core.base_models.gguf import DEQUANTISABLE, GGML_TYPES
from peft_core.base_models.resolve import resolve
from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer
from peft_core.config import Settings
from peft_core.modeling import convert
from peft_core.modeling.adapter_model import ResidentModel
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.modeling.device import DevicePlan
from peft_core.modeling.load import load_base, load_mapped
from tests.integration.test_bases_convert import TOKENS, TOY, toy
from tests.model_files import ARRAY, BOOL, F32, GGUF_SHAPES, TEXT, U32, gguf_bytes

TEXT_TO_SPLIT = "x = 1234567 + don't\n    HTTPServer"
LLAMA3 = ["x", " =", " ", "123", "456", "7", " +", " don", "'t", "\n", "   ", " HTTPServer"]
QWEN2 = ["x", " =", " ", *"1234567", " +", " don", "'t", "\n", "   ", " HTTPServer"]
GPT2 = ["x", " =", " 1234567", " +", " don", "'t", "\n   ", " HTTPServer"]
DIGITS = ["x", " =", " ", *"1234567", " +", " don", "'t", "\n   ", " HTTPServer"]
TEKKEN = ["x", " =", " ", *"1234567", " +", " don", "'t", "\n", "   ", " HTTPServer"]
PIECES = {
    "gpt-2": GPT2,
    "mellum": GPT2,
    "smollm": DIGITS,
    "starcoder": DIGITS,
    "refact": DIGITS,
    "command-r": DIGITS,
    "llama-bpe": LLAMA3,
    "falcon3": LLAMA3,
    "smaug-bpe": LLAMA3,
    "dbrx": LLAMA3,
    "qwen2": QWEN2,
    "stablelm2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "seed-coder": QWEN2,
    "tekken": TEKKEN,
    "deepseek-coder": ["x", " = ", *"1234567", " +", " don", "'", "t", "\n", "   ", " HTTPServer"],
}


def pieces(rule: str, text: str) -> list[str]:
    tokenizer = Tokenizer(models.BPE())
    convert._set_split(tokenizer, SPLIT_RULES[rule])
    assert tokenizer.pre_tokenizer is not None
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("rule", SPLIT_RULES)
def test_a_rule_splits_text_as_the_tokenizers_of_its_models_do(rule: str) -> None:
    same = next(name for name in PIECES if SPLIT_RULES[name].patterns == SPLIT_RULES[rule].patterns
                and SPLIT_RULES[name].single_digits == SPLIT_RULES[rule].single_digits)  # fmt: skip
    found = pieces(rule, TEXT_TO_SPLIT)
    assert "".join(found) == TEXT_TO_SPLIT
    assert found == PIECES.get(rule, PIECES[same])


def test_tekken_separates_words_where_the_case_changes_and_seed_coder_ends_signs_at_a_line() -> None:
    assert pieces("tekken", "camelCase HTTPServer x;\n") == ["camel", "Case", " HTTPServer", " x", ";\n"]
    assert pieces("qwen2", "camelCase x;\n") == ["camelCase", " x", ";\n"]
    assert pieces("seed-coder", "camelCase x;\n") == ["camelCase", " x", ";", "\n"]


@pytest.mark.parametrize("kind", sorted(DEQUANTISABLE - {"F32", "F16", "BF16"}))
def test_every_quantisation_of_the_package_is_converted(kind: str, tmp_path: Path) -> None:
    _, per_block, block_bytes = next(row for row in GGML_TYPES.values() if row[0] == kind)
    rows, columns = 6, 512
    stored = np.random.default_rng(0).integers(0, 60, (rows, columns // per_block * block_bytes), dtype=np.uint8)
    path = tmp_path / "weights"
    path.write_bytes(bytes(3) + stored.tobytes())
    tensor = TensorInfo("blk.0.ffn_up.weight", kind, (rows, columns), 3, stored.size)
    with np.errstate(all="ignore"):
        found = np.concatenate(list(convert._rows(path, tensor, None)))
        expected = quants.dequantize(stored, GGMLQuantizationType[kind])
    assert found.shape == (rows, columns)
    assert np.array_equal(found, expected, equal_nan=True)


def test_the_list_of_quantisations_is_the_package_s() -> None:
    assert {kind.name for kind in quants._type_traits} | {"F32", "F16"} == DEQUANTISABLE


def tokenizer_of(tmp_path: Path, **metadata: tuple[int, object]) -> BaseTokenizer:
    base = toy(tmp_path / "x.gguf", **metadata)
    return load_tokenizer(ensure_hf_directory(base, tmp_path / "cache", lambda _: None))


BOS = {"tokenizer__ggml__bos_token_id": (U32, 0)}
LLAMA_BPE = {"tokenizer__ggml__pre": (TEXT, "llama-bpe")}


def test_texts_begin_with_bos_where_llama_cpp_s_rule_says_so_and_the_file_is_silent(tmp_path: Path) -> None:
    made = tokenizer_of(tmp_path, **BOS, **LLAMA_BPE)
    assert made.beginning == (0,)
    assert made.ids("ab")[0] == 0
    assert tokenizer_of(tmp_path, **BOS).beginning == ()


def test_the_file_s_own_word_on_bos_and_eos_is_followed_for_bos_alone(tmp_path: Path) -> None:
    flags = {f"tokenizer__ggml__add_{name}_token": (BOOL, value) for name, value in (("bos", False), ("eos", True))}
    made = tokenizer_of(tmp_path, **BOS, **LLAMA_BPE, **flags)
    assert made.beginning == ()
    assert made.tokenizer.encode("ab").ids == made.tokenizer.encode("ab", add_special_tokens=False).ids


@pytest.mark.parametrize("adds_space", [True, False])
def test_a_sentencepiece_vocabulary_puts_a_space_before_a_text_unless_the_file_says_otherwise(
    tmp_path: Path, adds_space: bool
) -> None:
    tokens = ["<unk>", "<s>", "</s>", "\u2581", *"abcdefghijklmnopqrstuvwxyz0123456789_()[]{}=+-"][:48]
    made = tokenizer_of(
        tmp_path,
        tokenizer__ggml__model=(TEXT, "llama"),
        tokenizer__ggml__tokens=(ARRAY, (TEXT, tokens)),
        tokenizer__ggml__scores=(ARRAY, (F32, [0.0] * len(tokens))),
        tokenizer__ggml__token_type=(ARRAY, (U32, [2, 3, 3] + [1] * (len(tokens) - 3))),
        tokenizer__ggml__bos_token_id=(U32, 1),
        **({} if adds_space else {"tokenizer__ggml__add_space_prefix": (BOOL, False)}),
    )
    ids = made.ids("ab ab")
    assert [tokens[token] for token in ids] == ["<s>", *["\u2581"] * adds_space, "a", "b", "\u2581", "a", "b"]
    assert made.text(ids) == "ab ab"
    assert made.text(made.ids(" ab")[-3:]) == ("ab" if adds_space else " ab")


def test_a_turn_ends_with_the_file_s_end_of_turn_token(tmp_path: Path) -> None:
    base = toy(tmp_path / "x.gguf", tokenizer__ggml__eot_token_id=(U32, 1))
    directory = ensure_hf_directory(base, tmp_path / "cache", lambda _: None)
    plan = DevicePlan(device="cpu", weights=torch.float32, autocast=None, note="")
    assert ResidentModel.load(base, directory, plan).ends[:2] == (2, 1)


def test_a_split_file_is_converted_to_the_same_weights_as_a_whole_one(tmp_path: Path) -> None:
    whole = toy(tmp_path / "whole.gguf")
    names = list(GGUF_SHAPES)
    for number, part in enumerate(([], names[::2], names[1::2])):
        split = {"split.no": (U32, number), "split.count": (U32, 3), "split.tensors.count": (U32, len(names))}
        content = gguf_bytes((TOY if number == 0 else {}) | split, {name: GGUF_SHAPES[name] for name in part})
        (tmp_path / f"tiny-{number + 1:05}-of-00003.gguf").write_bytes(content)
    base = resolve(str(tmp_path / "tiny-00002-of-00003.gguf"), Settings())
    directory = ensure_hf_directory(base, tmp_path / "cache", lambda _: None)
    expected = ensure_hf_directory(whole, tmp_path / "cache", lambda _: None)
    assert load_tokenizer(directory).tokenizer.get_vocab() == load_tokenizer(expected).tokenizer.get_vocab()
    first, second = (load_base(path, torch.float32).state_dict() for path in (directory, expected))
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert load_mapped(base, directory) is not None


def test_a_model_in_a_rare_quantisation_stays_in_the_file_of_its_conversion(tmp_path: Path) -> None:
    """A plan that leaves weights in their file must not load them completely: that takes several times the memory."""
    shapes = {
        name: tuple(8 * axis for axis in shape) if len(shape) > 1 else (256,) for name, shape in GGUF_SHAPES.items()
    }
    shapes["token_embd.weight"] = (48, 256)
    sizes = {"llama.embedding_length": (U32, 256), "llama.feed_forward_length": (U32, 512)}
    content = gguf_bytes(TOY | sizes, shapes)
    path = tmp_path / "x.gguf"
    path.write_bytes(_requantised(content, "blk.0.ffn_up.weight", shapes["blk.0.ffn_up.weight"]))
    base = resolve(str(path), Settings())
    assert "IQ4_XS 1" in base.fingerprint.storage
    directory = ensure_hf_directory(base, tmp_path / "cache", lambda _: None)
    mapped = load_mapped(base, directory)
    assert mapped is not None
    matrix = mapped.get_submodule("model.layers.0.mlp.up_proj").stored
    assert (matrix.kind, matrix.mapped) == ("F32", True)


def _requantised(content: bytes, name: str, shape: tuple[int, ...]) -> bytes:
    """Call a tensor of zeros IQ4_XS: zeros in that format too, and shorter."""
    dims = b"".join(axis.to_bytes(8, "little") for axis in reversed(shape))
    entry = name.encode() + (2).to_bytes(4, "little") + dims
    assert content.count(entry + bytes(4)) == 1
    return content.replace(entry + bytes(4), entry + (23).to_bytes(4, "little"))


def test_control_tokens_are_recognised_whole(tmp_path: Path) -> None:
    made = tokenizer_of(tmp_path, tokenizer__ggml__tokens=(ARRAY, (TEXT, TOKENS[:48])))
    assert made.tokenizer.encode("<|im_end|>", add_special_tokens=False).ids == [2]
