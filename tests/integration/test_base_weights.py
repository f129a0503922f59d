"""A base model is exactly what its files say, in every way to load it, or it is refused with the names.

Layouts are compared with transformers' classes, and every code path with what transformers computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.layouts import LAYOUTS, expected_shapes
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError
from peft_core.modeling.adapter_model import ResidentModel
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.modeling.device import DevicePlan
from peft_core.modeling.load import check_weights, load_base, load_mapped
from peft_core.planning import base_check
from peft_core.planning.base_check import require_loadable
from tests.tiny_models import VOCABULARY, tiny_model, write_tiny_base

Tensors = dict[str, torch.Tensor]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 56,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def shapes_in_transformers(config: dict[str, Any]) -> tuple[str, dict[str, tuple[int, ...]]]:
    settings = {name: value for name, value in config.items() if name != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    return type(model).__name__, {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", LAYOUTS)
def test_a_layout_has_the_weights_of_transformers_class_for_every_setting(family: str) -> None:
    layout = LAYOUTS[family]
    switches = [name for name in layout.biases if name] + ["tie_word_embeddings"]
    variants: list[dict[str, Any]] = [{}, {"num_key_value_heads": 2}]
    variants += [] if "head_dim" in layout.undecided else [{"num_key_value_heads": 2, "head_dim": 16}]
    variants += [{"num_key_value_heads": 4, switch: value} for switch in switches for value in (True, False)]
    for variant in variants:
        config = {"model_type": family, **SIZES, **variant}
        expected = expected_shapes(config)
        assert expected is not None
        assert (layout.model_class, expected) == shapes_in_transformers(config), variant
    for setting in layout.undecided:
        assert expected_shapes({"model_type": family, **SIZES, setting: True}) is None


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    weights = load_file(directory / "model.safetensors")
    changed = {name: tensor.clone() for name, tensor in change(weights).items()}
    save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda weights: {name.replace(old, new): tensor for name, tensor in weights.items()}


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if part not in name}


def with_added(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda weights: {**weights, name: torch.ones(*shape)}


WRONG: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "embedding saved from PEFT": (
        renamed("embed_tokens.weight", "embed_tokens.modules_to_save.default.weight"),
        r"LlamaForCausalLM: missing model\.embed_tokens\.weight; unknown model\..*modules_to_save.*merge_and_unload",
    ),
    "norms saved from PEFT": (
        renamed("input_layernorm.weight", "input_layernorm.original_module.weight"),
        r"missing model\.layers\.0\.input_layernorm\.weight.*unknown .*original_module\.weight.*merge_and_unload",
    ),
    "adapter not merged": (
        with_added("model.layers.0.self_attn.q_proj.lora_A.default.weight", 4, 32),
        "merge_and_unload",
    ),
    "compiled": (renamed("model.", "_orig_mod.model."), r"missing .*unknown .*torch\.compile"),
    "wrapped": (renamed("model.", "language_model.model."), "begins with 'language_model'"),
    "without prefix": (renamed("model.", ""), "lack the prefix 'model'"),
    "a layer missing": (without("layers.0."), r"missing model\.layers\.0\..* and 6 more"),
    "a layer too many": (with_added("model.layers.2.mlp.up_proj.weight", 48, 32), r"unknown model\.layers\.2\.mlp"),
    "a bias too many": (with_added("model.layers.1.self_attn.q_proj.bias", 32), r"unknown .*q_proj\.bias"),
    "value head": (with_added("v_head.summary.weight", 1, 32), r"unknown v_head\.summary\.weight"),
    "embedding of another size": (
        with_added("model.embed_tokens.weight", 200, 32),
        r"embed_tokens\.weight has the shape \[200, 32\] instead of \[99, 32\].*config\.json that belongs",
    ),
    "wider MLP": (with_added("model.layers.0.mlp.up_proj.weight", 64, 32), r"\[64, 32\] instead of \[48, 32\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_weights_that_are_not_the_model_s_are_refused_by_name_when_requested_and_when_loaded(
    case: str, tmp_path: Path
) -> None:
    change, message = WRONG[case]
    directory = rewrite(write_tiny_base(tmp_path / "base"), change)
    with pytest.raises(BaseCheckpointError, match=f"(?s){message}") as caught:
        resolve(str(directory), Settings())
    assert len(str(caught.value)) < 700
    if case != "without prefix":  # transformers adds this one itself
        with pytest.raises(BaseCheckpointError, match="its weights are not those of LlamaForCausalLM"):
            load_base(directory, torch.float32)


def test_a_missing_head_is_refused_with_the_setting_that_would_tie_it(tmp_path: Path) -> None:
    directory = write_tiny_base(tmp_path / "base")
    change_config(directory, tie_word_embeddings=False)
    with pytest.raises(BaseCheckpointError, match=r'missing lm_head\.weight.*"tie_word_embeddings": true'):
        resolve(str(directory), Settings())
    with pytest.raises(BaseCheckpointError, match=r"missing lm_head\.weight"):
        load_base(directory, torch.float32)


def test_stored_buffers_are_not_unknown_weights(tmp_path: Path) -> None:
    plain = resolve(str(write_tiny_base(tmp_path / "plain")), Settings())
    directory = write_tiny_base(tmp_path / "old")
    rewrite(directory, with_added("model.layers.0.self_attn.rotary_emb.inv_freq", 4))
    assert resolve(str(directory), Settings()).fingerprint.architecture == plain.fingerprint.architecture
    assert load_base(directory, torch.float32) is not None


def rename_a_weight(directory: Path) -> str:
    name = next(name for name in load_file(directory / "model.safetensors") if ".0." in name)
    rewrite(directory, renamed(name, f"{name}.renamed"))
    return name


@pytest.mark.parametrize("architecture", ["phi", "deepseek_v3"])
def test_a_model_without_a_layout_is_checked_against_transformers_class(architecture: str, tmp_path: Path) -> None:
    directory = write_tiny_base(tmp_path / "base", architecture)
    check_weights(directory)
    name = rename_a_weight(directory)
    with pytest.raises(BaseCheckpointError, match=f"missing {name}.*unknown {name}.renamed"):
        check_weights(directory)


def test_a_model_without_a_layout_is_checked_by_a_child_before_a_job_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_check, "TIMEOUT_S", 500.0)  # the child imports torch, on a busy machine too
    directory = write_tiny_base(tmp_path / "base", "phi")
    require_loadable(resolve(str(directory), Settings()))
    name = rename_a_weight(directory)
    with pytest.raises(BaseCheckpointError, match=f"missing {name}.*unknown {name}.renamed"):
        require_loadable(resolve(str(directory), Settings()))


def change_config(directory: Path, **settings: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | settings))


def loss(model: Any) -> float:
    ids_1T = torch.arange(3, len(VOCABULARY))[None]
    with torch.no_grad():
        return float(model(input_ids=ids_1T, labels=ids_1T).loss)


def own_head(weights: Tensors) -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {**weights, "lm_head.weight": torch.randn(weights["model.embed_tokens.weight"].shape, generator=generator)}


def last_row_trained(weights: Tensors) -> Tensors:
    head = weights["model.embed_tokens.weight"].clone()
    head[-30] += 1  # far from what is sampled for the fingerprint in a larger model
    return {**weights, "lm_head.weight": head}


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("change", [own_head, last_row_trained])
def test_a_head_of_its_own_beside_tied_embeddings_is_used_by_every_code_path(
    change: Callable[[Tensors], Tensors], family: str, tmp_path: Path
) -> None:
    tied = write_tiny_base(tmp_path / "tied", family)
    directory = rewrite(write_tiny_base(tmp_path / "own", family), change)
    assert json.loads((directory / "config.json").read_text())["tie_word_embeddings"] is True
    base = resolve(str(directory), Settings())
    assert "lm_head.weight" in read_checkpoint(base.path).shapes
    assert base.shape.parameters == resolve(str(tied), Settings()).shape.parameters + len(VOCABULARY) * 32
    expected = loss(AutoModelForCausalLM.from_pretrained(directory))
    mapped, bf16 = load_mapped(base, directory), load_mapped(base, directory, in_bfloat16=True)
    assert loss(mapped) == pytest.approx(expected, abs=1e-5)
    assert loss(load_base(base.path, torch.float32)) == expected
    assert loss(bf16) == pytest.approx(expected, abs=0.05)
    assert abs(loss(load_base(tied, torch.float32)) - expected) > 1e-4


def test_a_stored_copy_of_the_embedding_is_a_tied_head(tmp_path: Path) -> None:
    plain = resolve(str(write_tiny_base(tmp_path / "plain")), Settings())
    directory = write_tiny_base(tmp_path / "copied")
    rewrite(directory, lambda weights: {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]})
    base = resolve(str(directory), Settings())
    assert (base.shape, base.fingerprint.architecture) == (plain.shape, plain.fingerprint.architecture)
    mapped = load_mapped(base, directory)
    assert mapped is not None
    assert mapped.get_output_embeddings().stored is mapped.get_input_embeddings().stored
    assert loss(mapped) == pytest.approx(loss(tiny_model()), abs=1e-5)


def test_a_tied_model_that_stores_the_head_alone_is_the_same_model(tmp_path: Path) -> None:
    plain = resolve(str(write_tiny_base(tmp_path / "plain")), Settings())
    directory = rewrite(
        write_tiny_base(tmp_path / "head-alone"), renamed("model.embed_tokens.weight", "lm_head.weight")
    )
    base = resolve(str(directory), Settings())
    assert base.fingerprint.architecture == plain.fingerprint.architecture
    mapped = load_mapped(base, directory)
    expected = loss(AutoModelForCausalLM.from_pretrained(directory))
    assert loss(mapped) == pytest.approx(expected, abs=1e-5)
    assert loss(load_base(directory, torch.float32)) == expected
    assert ensure_hf_directory(base, tmp_path / "cache", lambda _: None) == directory


def test_a_base_model_whose_outputs_are_not_numbers_is_refused_before_it_answers(tmp_path: Path) -> None:
    def spoil(weights: Tensors) -> Tensors:
        weights["model.layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
        return weights

    directory = rewrite(write_tiny_base(tmp_path / "base"), spoil)
    base = resolve(str(directory), Settings())
    with pytest.raises(BaseCheckpointError, match="its outputs are NaN or Inf"):
        ResidentModel.load(base, directory, DevicePlan(device="cpu", weights=torch.float32, autocast="no", note=""))
