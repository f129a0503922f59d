"""Tests of the conversion of GGUF base models: of its rules with toy files, of its result with the bundled model."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_core.base_models.families import FAMILIES
from peft_core.base_models.fingerprint import fingerprint
from peft_core.base_models.gguf_model import read_gguf_model
from peft_core.base_models.resolve import resolve
from peft_core.base_models.safetensors import read_header
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError, StorageError
from peft_core.modeling import convert
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.schemas.base_model import Base, Fingerprint
from peft_core.system import in_use
from tests.model_files import ARRAY, F32, GGUF_METADATA, GGUF_SHAPES, SHAPES, TEXT, U32, gguf_bytes, write_model

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefghijklmnopqrstuvwxyz0123456789_():=,.+-", "ab"]
TOY = GGUF_METADATA | {
    "tokenizer.ggml.tokens": (ARRAY, (TEXT, TOKENS[:48])),
    "tokenizer.ggml.token_type": (ARRAY, (U32, [3, 3, 3] + [1] * 45)),
    "tokenizer.ggml.merges": (ARRAY, (TEXT, [])),
}


def ignore(_message: str) -> None:
    pass


def toy(path: Path, shapes: dict[str, tuple[int, ...]] = GGUF_SHAPES, **metadata: tuple[int, Any]) -> Base:
    named = {key.replace("__", "."): value for key, value in metadata.items()}
    path.write_bytes(gguf_bytes(TOY | named, shapes))
    return resolve(str(path), Settings())


def test_a_hugging_face_directory_is_returned_unchanged(tmp_path: Path) -> None:
    base = resolve(str(write_model(tmp_path / "m")), Settings())
    assert ensure_hf_directory(base, tmp_path / "cache", ignore) == base.path
    assert not (tmp_path / "cache").exists()


def test_a_base_model_that_has_changed_since_it_was_resolved_is_refused(tmp_path: Path) -> None:
    base = resolve(str(write_model(tmp_path / "m")), Settings())
    write_model(tmp_path / "m", fill=1)
    with pytest.raises(BaseCheckpointError, match="changed since"):
        ensure_hf_directory(base, tmp_path / "cache", ignore)


def test_a_base_model_with_an_old_fingerprint_is_still_recognised(tmp_path: Path) -> None:
    base = resolve(str(write_model(tmp_path / "m")), Settings())
    old = Fingerprint(architecture=base.fingerprint.architecture, sample=base.fingerprint.sample)
    assert ensure_hf_directory(base.model_copy(update={"fingerprint": old}), tmp_path / "cache", ignore) == base.path


def test_a_conversion_is_cached_by_content(tmp_path: Path) -> None:
    messages: list[str] = []
    base = toy(tmp_path / "a.gguf")
    first = ensure_hf_directory(base, tmp_path / "cache", messages.append)
    assert {name: info.shape for name, info in read_header(first / "model.safetensors").tensors.items()} == SHAPES
    assert ensure_hf_directory(toy(tmp_path / "moved.gguf"), tmp_path / "cache", messages.append) == first
    assert len(messages) == 1
    assert fingerprint(first).architecture == base.fingerprint.architecture


def test_a_converted_base_names_its_rope_theta_where_mlx_reads_it(tmp_path: Path) -> None:
    theta = {"llama__rope__freq_base": (F32, 250_000.0)}
    directory = ensure_hf_directory(toy(tmp_path / "a.gguf", **theta), tmp_path / "cache", ignore)
    config = json.loads((directory / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 250_000.0
    assert AutoConfig.from_pretrained(directory).rope_parameters["rope_theta"] == 250_000.0


def test_the_remains_of_a_killed_conversion_are_removed_by_the_next(tmp_path: Path) -> None:
    leftover = tmp_path / "cache" / ".converting-dead"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    ensure_hf_directory(toy(tmp_path / "a.gguf"), tmp_path / "cache", ignore)
    assert not leftover.exists()


def test_a_failed_conversion_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    base = toy(tmp_path / "a.gguf")
    monkeypatch.setattr(convert, "_write_weights", fail)
    with pytest.raises(OSError, match="No space"):
        ensure_hf_directory(base, tmp_path / "cache", ignore)
    left = [
        path for path in (tmp_path / "cache").iterdir() if path.suffix != ".in_use"
    ]  # an empty file that was locked
    assert [path.name for path in left] == [".lock"]


def test_a_full_disk_is_reported_before_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - as shutil defines it
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda _: usage(100, 93, 7))
    with pytest.raises(StorageError, match=r"needs \d+ bytes in .*cache, but only 7 are free"):
        ensure_hf_directory(toy(tmp_path / "a.gguf"), tmp_path / "cache", ignore)


def test_concurrent_conversions_share_one_result(tmp_path: Path) -> None:
    toy(tmp_path / "a.gguf")
    code = (
        "import sys, pathlib\nfrom peft_core.base_models.resolve import resolve\n"
        "from peft_core.modeling.convert import ensure_hf_directory\n"
        "from peft_core.config import Settings\n"
        "print(ensure_hf_directory(resolve(sys.argv[1], Settings()), pathlib.Path(sys.argv[2]), lambda _: None))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.gguf"), str(tmp_path / "cache")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    results = {process.communicate()[0].strip() for process in running}
    assert len(results) == 1
    assert Path(results.pop()).is_dir()


def test_a_tensor_that_the_architecture_does_not_have_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseCheckpointError, match=r"unknown model\.layers\.0\.self_attn\.k_norm\.weight"):
        toy(tmp_path / "a.gguf", {**GGUF_SHAPES, "blk.0.attn_k_norm.weight": (8,)})


EXTRA_TENSORS: dict[str, dict[str, tuple[int, ...]]] = {
    "qwen2": {
        f"blk.{block}.attn_{part}.bias": (rows,)
        for block in range(2)
        for part, rows in (("q", 32), ("k", 16), ("v", 16))
    },
    "qwen3": {f"blk.{block}.attn_{part}_norm.weight": (8,) for block in range(2) for part in "qk"},
}


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.gguf])
def test_a_toy_gguf_file_of_every_supported_family_is_converted(family: str, tmp_path: Path) -> None:
    metadata = {key.replace("llama.", f"{family}.", 1): value for key, value in TOY.items()}
    path = tmp_path / "a.gguf"
    path.write_bytes(
        gguf_bytes(metadata | {"general.architecture": (TEXT, family)}, GGUF_SHAPES | EXTRA_TENSORS.get(family, {}))
    )
    base = resolve(str(path), Settings())
    converted = resolve(str(ensure_hf_directory(base, tmp_path / "cache", ignore)), Settings())
    assert (converted.model_type, converted.shape) == (family, base.shape)
    assert converted.fingerprint.architecture == base.fingerprint.architecture


def test_llama_3_s_rotary_scaling_is_recovered_from_its_factors(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, num_hidden_layers=0, vocab_size=8,
                         max_position_embeddings=131_072, rope_parameters=scaling)  # fmt: skip
    plain = 1 / 500_000.0 ** (np.arange(32) / 32)
    factors = plain / LlamaForCausalLM(config).model.rotary_emb.inv_freq.numpy()
    path = tmp_path / "a.gguf"
    metadata = {"llama__rope__freq_base": (F32, 500_000.0), "llama__rope__dimension_count": (U32, 64)}
    path.write_bytes(_with_factors(metadata, factors))
    assert read_gguf_model(path).config["rope_parameters"] == scaling
    factors[20] *= 1.01
    path.write_bytes(_with_factors(metadata, factors))
    with pytest.raises(BaseCheckpointError, match="not those of Llama 3"):
        read_gguf_model(path)


def _with_factors(metadata: dict[str, tuple[int, Any]], factors: Any) -> bytes:
    named = {key.replace("__", "."): value for key, value in metadata.items()}
    heads_of_64 = {32: 256, 16: 128}
    shapes = {name: tuple(heads_of_64.get(axis, axis) for axis in shape) for name, shape in GGUF_SHAPES.items()}
    named["llama.embedding_length"] = (U32, 256)
    content = gguf_bytes(TOY | named, {**shapes, "rope_freqs.weight": (len(factors),)})
    raw = struct.pack(f"<{len(factors)}f", *factors)
    return content[: -len(raw)] + raw


@pytest.fixture(scope="session")
def bundled() -> Base:
    return resolve("bundled", Settings())


@pytest.fixture(scope="session")
def converted(bundled: Base, converted_bases: Path) -> Path:
    return ensure_hf_directory(bundled, converted_bases, ignore)


def test_a_converted_base_is_held_by_the_process_that_uses_it_and_says_its_name(tmp_path: Path) -> None:
    base = toy(tmp_path / "a.gguf")
    converted = ensure_hf_directory(base, tmp_path / "cache", ignore)
    assert ensure_hf_directory(base, tmp_path / "cache", ignore) == converted
    assert in_use.is_in_use(converted)
    in_use.keep_only(())
    assert not in_use.is_in_use(converted)
    assert json.loads((converted / "config.json").read_text())["_name_or_path"] == base.name


@pytest.mark.model
def test_the_converted_model_agrees_with_an_independent_reading_of_the_gguf_file(
    bundled: Base, converted: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted, local_files_only=True).eval()
    reference = LlamaForCausalLM(_published_config()).eval()
    reference.load_state_dict(_read_independently(bundled.path), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(converted, local_files_only=True)
    ids = tokenizer("def fibonacci(n):\n    if n < 2:\n        return", return_tensors="pt").input_ids
    with torch.no_grad():
        difference = (model(ids).logits - reference(ids).logits).abs().max()
        text = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0])
    assert difference < 1e-4
    assert "fibonacci(n" in text[40:]


def _published_config() -> LlamaConfig:
    """Return the configuration of SmolLM2-135M as its authors publish it."""
    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )


def _read_independently(path: Path) -> dict[str, torch.Tensor]:
    """Read the weights with the `gguf` package; the names and the order of rows are written out here."""
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    parts = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    state: dict[str, torch.Tensor] = {}
    for tensor in GGUFReader(path).tensors:
        weights = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        stem = tensor.name.removesuffix(".weight")
        if stem in names:
            state[f"{names[stem]}.weight"] = weights
            continue
        _, block, part = stem.split(".")
        heads = {"attn_q": 9, "attn_k": 3}.get(part)
        if heads is not None:  # the inverse of `permute` in llama.cpp's convert_hf_to_gguf.py
            out, size = weights.shape
            weights = weights.view(heads, out // heads // 2, 2, size).transpose(1, 2).reshape(out, size)
        state[f"model.layers.{block}.{parts[part]}.weight"] = weights
    return state | {"lm_head.weight": state["model.embed_tokens.weight"]}


@pytest.mark.model
def test_the_converted_tokenizer_is_smollm2_s(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted, local_files_only=True)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token) == (1, 2, "<|endoftext|>")
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert rendered.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer("<|im_end|>").input_ids == [2]


@pytest.mark.model
def test_the_tokenizer_preserves_code_and_separates_digits(converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(converted, local_files_only=True)
    unusual = "x\t=\r\n  1 \u00e9\u4e2d\U0001f600 '''\n\n\n"
    for text in (Path(__file__).read_text(), Path(struct.__file__).read_text(), unusual):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # The spaces before a digit stay together: GPT-2's pattern alone would leave the last one to the digit.
    assert tokenizer.tokenize("[\n    12") == ["[", "ĊĠĠĠĠ", "1", "2"]


def test_the_tokenizer_that_is_written_alone_is_that_of_the_conversion(tmp_path: Path) -> None:
    base = toy(tmp_path / "a.gguf")
    converted = ensure_hf_directory(base, tmp_path / "cache", ignore)
    alone = tmp_path / "alone"
    alone.mkdir()
    convert.write_tokenizer(base.path, alone)
    names = {path.name for path in alone.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} < names
    assert "model.safetensors" not in names
    for name in names - {"config.json"}:  # which has a name for people in the conversion
        assert (alone / name).read_bytes() == (converted / name).read_bytes(), name
