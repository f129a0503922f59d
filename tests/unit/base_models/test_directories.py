"""Model directories as people have them: unfinished downloads, other formats, tokenizers of another model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import PeftMcpError
from tests.model_files import CONFIG, SHAPES, safetensors_bytes, weights, write_model

HEAD = {**SHAPES, "lm_head.weight": (48, 32)}


def refusal(path: Path) -> str:
    with pytest.raises(PeftMcpError) as caught:
        resolve(str(path), Settings())
    message = str(caught.value)
    assert "trust_remote_code" not in message
    return message


def remove(*names: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return change


def add(name: str, content: str = "{}") -> Callable[[Path], None]:
    def change(path: Path) -> None:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)

    return change


def with_config(**settings: Any) -> Callable[[Path], None]:
    return add("config.json", json.dumps(CONFIG | settings))


def tokenizer_with(*added: tuple[str, int]) -> str:
    entries = [{"id": number, "content": text, "special": True} for text, number in added]
    return json.dumps({"version": "1.0", "added_tokens": entries, "normalizer": None, "model": {}}, indent=2)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
CASES: dict[str, tuple[tuple[Callable[[Path], None], ...], str]] = {
    "remote code": (
        (with_config(model_type="xmodel", architectures=["XForCausalLM"], auto_map={"AutoModelForCausalLM": "x.X"}),),
        r"its model code is part of its repository \(auto_map in .*'xmodel'\).*never run here\. Use .* of the families Llama",
    ),
    "newer than transformers": ((with_config(model_type="llama9"),), "'llama9' is not a causal language model.*update"),
    "an encoder": ((with_config(model_type="vit"),), "'vit' is not a causal language model"),
    "only Mistral's weights": (
        (remove("model.safetensors"), add("consolidated.safetensors")),
        "only consolidated.safetensors, which is Mistral's own format",
    ),
    "only Meta's files": (
        (remove("config.json", "model.safetensors"), add("params.json")),
        "only params.json: it is in Meta's or Mistral's own format",
    ),
    "the directory above": (
        (remove("config.json"), add("inner/config.json")),
        r"a directory in it has\. Give that directory: .*inner",
    ),
    "a repository of the cache": (
        (remove("config.json"), add("snapshots/0123/config.json")),
        "Give that directory: .*snapshots/0123",
    ),
    "an unfinished download": (
        (remove("model.safetensors"), add(".cache/huggingface/download/x.incomplete")),
        "its download is unfinished",
    ),
    "shards without an index": (
        (remove("model.safetensors"), add("model-00001-of-00002.safetensors")),
        "no model.safetensors and no model.safetensors.index.json, only model-00001-of-00002.safetensors",
    ),
    "tokenizer.model alone": (
        (remove("tokenizer.json"), add("tokenizer.model")),
        r"no tokenizer\.json, only tokenizer\.model.*save_pretrained",
    ),
    "a tokenizer that is a pointer": ((add("tokenizer.json", POINTER),), "Git LFS pointer.*git lfs pull"),
    "half a tokenizer": ((add("tokenizer.json", '{"model": {'),), r"its tokenizer\.json is damaged or incomplete"),
    "an empty tokenizer": ((add("tokenizer.json", ""),), r"its tokenizer\.json is damaged or incomplete"),
    "no end token": (
        (with_config(eos_token_id=None), add("tokenizer_config.json")),
        "defines no end-of-text token.*Set eos_token",
    ),
    "an end token beyond the vocabulary": (
        (with_config(eos_token_id=48), add("tokenizer_config.json")),
        "defines no end-of-text token",
    ),
    "an end token that the vocabulary lacks": (
        (with_config(eos_token_id=None), add("tokenizer_config.json", '{"eos_token": "</s>"}')),
        "the eos_token '</s>' is not in its vocabulary",
    ),
    "listed tokens without a row": (
        (add("tokenizer_config.json", '{"added_tokens_decoder": {"48": {"content": "<think>"}}}'),),
        r"has none: <think> \(48\)",
    ),
    "added tokens without a row": (
        (add("tokenizer.json", tokenizer_with(("<a>", 3), ("<|im_start|>", 48), ("<|im_end|>", 49))),),
        r"its embedding, which has 48 rows, has none: <\|im_start\|> \(48\), <\|im_end\|> \(49\).*resize_token_embeddings",
    ),
    "added tokens without a row, with sorted keys": (
        (add("tokenizer.json", json.dumps(json.loads(tokenizer_with(("<think>", 48))), sort_keys=True)),),
        r"has none: <think> \(48\)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_directory_that_cannot_be_used_is_refused_when_requested_with_the_reason(case: str, tmp_path: Path) -> None:
    changes, message = CASES[case]
    directory = write_model(tmp_path / "model")
    for change in changes:
        change(directory)
    text = refusal(directory)
    assert re.search(message, text, re.DOTALL), text
    assert len(text) < 600


def test_auto_map_beside_a_known_model_type_is_ignored(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert resolve(str(directory), Settings()).model_type == "llama"


@pytest.mark.parametrize("number", ["9" * 5000, "first", "-1"])
def test_a_listed_token_whose_number_is_none_of_a_vocabulary_is_ignored(number: str, tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    add("tokenizer_config.json", json.dumps({"added_tokens_decoder": {number: {"content": "<think>"}}}))(directory)
    assert resolve(str(directory), Settings()).shape.vocab_size == 48


def test_a_padding_token_without_a_row_is_no_obstacle(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model")
    add("tokenizer.json", tokenizer_with(("[PAD]", 48)))(directory)
    add("tokenizer_config.json", '{"pad_token": {"content": "[PAD]"}}')(directory)
    assert resolve(str(directory), Settings()).shape.vocab_size == 48


def test_an_end_token_may_be_given_by_text_or_by_number(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", eos_token_id=None)
    add("tokenizer.json", tokenizer_with(("</s>", 2)))(directory)
    add("tokenizer_config.json", '{"eos_token": "</s>"}')(directory)
    resolve(str(directory), Settings())
    (directory / "tokenizer_config.json").unlink()
    add("generation_config.json", '{"eos_token_id": [2, 3]}')(directory)
    resolve(str(directory), Settings())


def test_an_index_that_lists_a_tensor_for_a_file_that_lacks_it_is_refused(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", shards=2)
    index = directory / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(mapping.values()))
    moved = next(name for name, file in mapping.items() if file == first)
    index.write_text(json.dumps({"weight_map": mapping | {moved: second}}))
    assert f"its files lack {moved}, which model.safetensors.index.json lists for {second}" in refusal(directory)


def test_a_truncated_shard_is_refused(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", shards=2)
    shard = directory / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "it is truncated" in refusal(directory)


def test_eight_bit_floats_without_a_quantisation_config_are_refused(tmp_path: Path) -> None:
    assert "its weights are quantised (F8_E4M3)" in refusal(write_model(tmp_path / "model", dtype="F8_E4M3"))


@pytest.mark.parametrize("differs", [False, True])
def test_a_stored_head_is_a_weight_of_its_own_only_if_it_differs_from_the_embedding(
    differs: bool, tmp_path: Path
) -> None:
    values = weights(shapes=HEAD)
    values["lm_head.weight"] = list(values["model.embed_tokens.weight"])
    if differs:
        values["lm_head.weight"][700] += 1
    directory = write_model(tmp_path / "model", shapes=HEAD, values=values)
    checkpoint = read_checkpoint(directory)
    assert ("lm_head.weight" in checkpoint.shapes) is differs
    assert checkpoint.config["tie_word_embeddings"] is not differs


def test_a_head_in_another_number_format_is_a_weight_of_its_own(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", shards=2, values=weights())
    (directory / "head.safetensors").write_bytes(safetensors_bytes({"lm_head.weight": (48, 32)}, "BF16"))
    index = directory / "model.safetensors.index.json"
    mapping = json.loads(index.read_text())["weight_map"] | {"lm_head.weight": "head.safetensors"}
    index.write_text(json.dumps({"weight_map": mapping}))
    assert "lm_head.weight" in read_checkpoint(directory).shapes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, r"missing model\.layers\.1\.mlp\.up_proj\.weight\."),
        ({"model.layers.1.mlp.up_proj.bias": (64,)}, r"unknown model\.layers\.1\.mlp\.up_proj\.bias\."),
        (
            {"model.embed_tokens.weight": (32, 32)},
            r"embed_tokens\.weight has the shape \[32, 32\] instead of \[48, 32\]",
        ),
        ({"lm_head.modules_to_save.default.weight": (48, 32)}, "merge_and_unload"),
    ],
)
def test_names_and_shapes_are_compared_with_the_class_without_torch(
    changes: dict[str, tuple[int, ...] | None], message: str, tmp_path: Path
) -> None:
    shapes = {name: shape for name, shape in (SHAPES | changes).items() if shape is not None}
    with pytest.raises(PeftMcpError, match=f"those of LlamaForCausalLM: .*{message}"):
        read_checkpoint(write_model(tmp_path / "model", shapes=shapes))
