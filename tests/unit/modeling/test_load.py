"""Models with mapped weights compute the same as models in memory.

T tokens, I input features, O output features
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import BaseCheckpointError
from peft_core.modeling.load import FrozenEmbedding, FrozenLinear, load_base, load_mapped, move
from peft_core.modeling.quantised import QuantisedMatrix
from tests.tiny_models import tiny_model, write_tiny_base


def test_a_frozen_linear_layer_equals_nn_linear() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(6, 4).requires_grad_(requires_grad=False)
    frozen = FrozenLinear(QuantisedMatrix.from_tensor(plain.weight), plain.bias)
    x_TI = torch.randn(5, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(plain(x_TI).square().sum(), x_TI)
    (found,) = torch.autograd.grad(frozen(x_TI).square().sum(), x_TI)
    assert torch.equal(frozen(x_TI), plain(x_TI))
    assert torch.equal(found, expected)
    assert frozen.weight.shape == plain.weight.shape
    assert frozen.weight.untyped_storage().nbytes() == 4


def test_a_frozen_embedding_equals_nn_embedding() -> None:
    table = nn.Embedding(7, 3)
    ids_12 = torch.tensor([[6, 0]])
    assert torch.equal(FrozenEmbedding(QuantisedMatrix.from_tensor(table.weight))(ids_12), table(ids_12))


def test_a_mapped_model_gives_the_logits_of_the_loaded_one(tmp_path: Path) -> None:
    directory = write_tiny_base(tmp_path / "tiny")
    mapped = load_mapped(resolve(str(directory), Settings()), directory)
    assert mapped is not None
    loaded = load_base(directory, torch.float32)
    ids_1T = torch.arange(3, 12)[None]
    with torch.inference_mode():
        assert torch.equal(mapped(ids_1T).logits, loaded(ids_1T).logits)
    assert sum(isinstance(module, FrozenLinear) for module in mapped.modules()) == 15  # the tied head too
    assert not any(parameter.requires_grad for parameter in mapped.parameters())


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_moving_a_model_moves_stored_matrices_and_keeps_sharing(tmp_path: Path, in_bfloat16: bool) -> None:
    directory = write_tiny_base(tmp_path / "tiny")
    base = load_mapped(resolve(str(directory), Settings()), directory, in_bfloat16=in_bfloat16)
    assert base is not None
    moved = move(base, torch.device("meta"))
    assert {parameter.device.type for parameter in moved.parameters()} == {"meta"}
    layers = [module for module in moved.modules() if isinstance(module, FrozenLinear | FrozenEmbedding)]
    assert {layer.stored.storage.device.type for layer in layers} == {"meta"}
    assert {layer.stored.storage.dtype for layer in layers} == {torch.bfloat16 if in_bfloat16 else torch.uint8}
    assert all(layer.weight.untyped_storage().nbytes() == 4 for layer in layers)
    assert moved.get_output_embeddings().stored is moved.get_input_embeddings().stored


def test_bf16_weights_are_equal_after_moving() -> None:
    matrix = QuantisedMatrix.from_tensor(torch.randn(6, 4)).to_bf16()
    moved = matrix.to_device(torch.device("cpu"))
    assert moved.storage.dtype == torch.bfloat16
    assert (moved.shape, moved.nbytes) == (matrix.shape, matrix.nbytes)
    assert torch.equal(moved.dequantise_all(), matrix.dequantise_all())
    assert torch.equal(moved.select(torch.tensor([4, 1])), matrix.select(torch.tensor([4, 1])))
    x_TI, grad_TO = torch.randn(3, 4), torch.randn(3, 6)
    assert torch.equal(moved.matmul(x_TI), matrix.matmul(x_TI))
    assert torch.equal(moved.matmul_t(grad_TO), matrix.matmul_t(grad_TO))


def test_layers_with_a_bias_are_mapped_too(tmp_path: Path) -> None:
    directory = write_tiny_base(tmp_path / "tiny")
    tiny_model("qwen2").save_pretrained(directory)
    mapped = load_mapped(resolve(str(directory), Settings()), directory)
    assert mapped is not None
    assert mapped.get_submodule("model.layers.0.self_attn.q_proj").bias is not None
    ids_1T = torch.arange(3, 12)[None]
    with torch.inference_mode():
        assert torch.equal(mapped(ids_1T).logits, load_base(directory, torch.float32)(ids_1T).logits)


def test_a_model_with_other_kinds_of_layers_is_not_mapped(tmp_path: Path) -> None:
    directory = write_tiny_base(tmp_path / "tiny")
    base = resolve(str(directory), Settings())
    tiny_model("gpt2").config.save_pretrained(directory)  # Conv1D layers, under other names
    assert load_mapped(base, directory) is None


def test_a_model_whose_files_lack_a_bias_is_not_mapped(tmp_path: Path) -> None:
    directory = write_tiny_base(tmp_path / "tiny")
    base = resolve(str(directory), Settings())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "attention_bias": True}))
    assert load_mapped(base, directory) is None
    with pytest.raises(BaseCheckpointError, match=r"missing model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_base(directory, torch.float32)
