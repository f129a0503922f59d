"""What the cost model assumes about model families, compared with the modules that compute them."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from torch.autograd.graph import saved_tensors_hooks

from peft_core.base_models.families import FAMILIES, has_fused_blocks
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.modeling import attention
from peft_core.modeling.activation_arena import ActivationArena
from peft_core.modeling.batches import join
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.modeling.device import Machine, choose
from peft_core.modeling.fused_blocks import FusionStats, fuse
from peft_core.modeling.load import FrozenLinear, load_base, load_mapped, load_planned
from peft_core.modeling.objective import Objective, probe_fast_paths
from peft_core.planning.cost_model import activation_bytes, lora_parameters
from peft_core.schemas.base_model import Base
from peft_core.schemas.task import ComputePlan
from peft_core.schemas.training import TrainingConfig
from peft_core.training import lora
from tests.tiny_models import tiny_documents, write_tiny_base

CONFIG = TrainingConfig(rank=4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_mapped_family_can_be_mapped_or_held_in_bf16(family: str, tmp_path: Path) -> None:
    base = resolve(str(write_tiny_base(tmp_path / "base", family)), Settings())
    assert base.model_type == family
    for in_bfloat16 in (False, True):
        assert load_mapped(base, base.path, in_bfloat16=in_bfloat16) is not None


def adapted(base: Base, *, in_bfloat16: bool, config: TrainingConfig = CONFIG) -> tuple[PeftModel, Objective]:
    """With an adapter of random weights: B is zero at first, which would hide half of the gradient."""
    model = load_mapped(base, base.path, in_bfloat16=True) if in_bfloat16 else load_base(base.path, torch.float32)
    assert model is not None
    objective = probe_fast_paths(model, max_length=512)
    with_adapter = lora.attach(model, config, "tiny")
    torch.manual_seed(1)
    for weight in lora.weights(with_adapter).values():
        torch.nn.init.normal_(weight, std=0.05)
    assert fuse(with_adapter).blocks == base.shape.layers
    model.train()
    return with_adapter, objective


@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("family", sorted(filter(has_fused_blocks, FAMILIES)))
def test_every_block_of_a_fused_family_is_fused_and_stores_the_planned_bytes(
    family: str, in_bfloat16: bool, tmp_path: Path
) -> None:
    base = resolve(str(write_tiny_base(tmp_path / "base", family)), Settings())
    model, objective = adapted(base, in_bfloat16=in_bfloat16)
    assert objective.packed
    assert objective.head is not None
    assert sum(weight.numel() for weight in lora.weights(model).values()) == lora_parameters(
        CONFIG.lora_rank, base.shape
    )

    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = join(tiny_documents((192, 64)), torch.device("cpu"))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective.loss(batch)
    loss.backward()
    planned = base.shape.layers * batch.tokens * activation_bytes(CONFIG, base, "cpu", bf16=in_bfloat16)
    beside_layers = batch.tokens * 4 * 3 * base.shape.hidden_size  # the last norm, and the hidden states of the head
    assert sum(kept.values()) == pytest.approx(planned + beside_layers, rel=0.15)


@pytest.mark.parametrize("in_bfloat16", [False, True])
@pytest.mark.parametrize("family", sorted(filter(has_fused_blocks, FAMILIES)))
def test_the_activation_arena_changes_no_bit_of_loss_and_gradient(
    family: str, in_bfloat16: bool, tmp_path: Path
) -> None:
    base = resolve(str(write_tiny_base(tmp_path / "base", family)), Settings())
    model, objective = adapted(base, in_bfloat16=in_bfloat16)
    weights = list(lora.weights(model).values())
    saved = ActivationArena(model)
    for lengths in ((70, 40, 9), (5,), (96, 90)):  # each takes the room of the one before
        batch = join(tiny_documents(lengths), torch.device("cpu"))
        in_heap = objective.loss(batch)
        expected = torch.autograd.grad(in_heap, weights)
        with saved.of_one_pass():
            loss = objective.loss(batch)
        assert torch.equal(loss, in_heap)
        assert all(map(torch.equal, torch.autograd.grad(loss, weights), expected))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"], ["up_proj", "o_proj"], ["down_proj"]])
@pytest.mark.parametrize("family", sorted(filter(has_fused_blocks, FAMILIES)))
def test_loss_and_gradient_in_bf16_match_float32_up_to_rounding(
    family: str, targets: Literal["all-linear"] | list[str], recompute: bool, tmp_path: Path
) -> None:
    base = resolve(str(write_tiny_base(tmp_path / "base", family, dtype=torch.bfloat16)), Settings())
    config = CONFIG.model_copy(update={"target_modules": targets})
    found = []
    for in_bfloat16 in (False, True):
        model, objective = adapted(base, in_bfloat16=in_bfloat16, config=config)
        if recompute:
            objective.enable_gradient_checkpointing()
        loss = objective.loss(join(tiny_documents((70, 40, 9)), torch.device("cpu")))
        gradients = torch.autograd.grad(loss, list(lora.weights(model).values()))
        found.append((loss.item(), torch.cat([gradient.flatten() for gradient in gradients])))
    (loss, gradient), (bf16_loss, bf16_gradient) = found
    assert bf16_loss == pytest.approx(loss, rel=5e-3)
    assert (bf16_gradient - gradient).norm() < 0.05 * gradient.norm()


def test_a_block_that_is_not_fused_in_bf16_leaves_its_weights_in_place(tmp_path: Path) -> None:
    base = resolve(str(write_tiny_base(tmp_path / "base", dtype=torch.bfloat16)), Settings())
    model = load_mapped(base, base.path, in_bfloat16=True)
    assert model is not None
    probe_fast_paths(model, max_length=512)
    layer = model.get_submodule("model.layers.1")
    layer.self_attn.register_forward_hook(lambda _module, _inputs, out: (out[0] * 1.5, out[1]))
    file = layer.self_attn.k_proj.stored.storage.untyped_storage().data_ptr()
    fused = fuse(lora.attach(model, TrainingConfig(rank=4, target_modules=["q_proj", "gate_proj"]), "tiny"))
    assert fused == FusionStats(blocks=1, linears=2)
    assert layer.self_attn.k_proj.stored.storage.untyped_storage().data_ptr() == file
    query = layer.self_attn.q_proj.base_layer.stored
    # The concatenated matrix has additional columns for B only.
    assert query.storage.untyped_storage().nbytes() == query.nbytes + 2 * query.shape[0] * 4


def test_bf16_weights_are_used_without_a_copy(tmp_path: Path) -> None:
    base = resolve(str(write_tiny_base(tmp_path / "base", dtype=torch.bfloat16)), Settings())
    model = load_mapped(base, base.path, in_bfloat16=True)
    assert model is not None
    own = load_base(base.path, torch.float32)
    ids_1T = torch.arange(3, 20)[None]
    assert torch.allclose(model(ids_1T).logits, own(ids_1T).logits, atol=0.1)
    assert model.get_output_embeddings().stored.nbytes == 2 * own.get_output_embeddings().weight.numel()


def test_a_family_that_cannot_be_mapped_is_not_loaded_frozen(tmp_path: Path) -> None:
    base = resolve(str(write_tiny_base(tmp_path / "base", "gemma2")), Settings())
    assert base.model_type not in FAMILIES
    assert load_mapped(base, base.path) is None


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox", "gemma2"])
def test_an_accelerator_loads_a_base_model_in_its_own_formats(family: str, tmp_path: Path) -> None:
    """The loading is done by the CPU, for whichever device."""
    base = resolve(str(write_tiny_base(tmp_path / "base", family)), Settings())
    gpu, old_gpu = (choose("cuda", Machine(cuda=True, cuda_bfloat16=there)) for there in (True, False))
    model, way = load_planned(base, base.path, ComputePlan(weights="file"), gpu)
    assert way == ComputePlan(weights="bfloat16")
    known = family in FAMILIES
    assert model.dtype == (torch.float32 if known else torch.bfloat16)
    assert isinstance(model.get_output_embeddings(), FrozenLinear) == known
    model, way = load_planned(base, base.path, ComputePlan(weights="bfloat16"), old_gpu)
    assert way == ComputePlan(weights="float32")
    assert model.dtype == torch.float32


@pytest.mark.model
@pytest.mark.parametrize("leak", ["none", "one layer", "every layer"])
def test_the_packing_probe_distinguishes_rounding_from_attention_leaks(
    leak: str, converted_bases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on an accelerator, whose attention for many documents is another kernel than that for one."""
    base = resolve(None, Settings())
    directory = ensure_hf_directory(base, converted_bases, lambda _: None)
    calls = count()

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...], **others: Any
    ) -> torch.Tensor:
        layer = next(calls) % base.shape.layers
        leaks = leak == "every layer" or (leak == "one layer" and layer == 15)
        return own(query, key, value, (sum(lengths),) if leaks else lengths, **others)

    own = attention.attend_with_mask
    monkeypatch.setattr(attention, "attend_with_mask", attend)
    monkeypatch.setattr(attention, "fixed_shapes", lambda _device: 256)  # takes the way of one product with a mask
    for model in (load_mapped(base, directory, in_bfloat16=True), load_base(directory, torch.bfloat16)):
        assert model is not None
        objective = probe_fast_paths(model, max_length=512)
        assert objective.packed == (leak == "none")
        assert objective.head is not None
    assert next(calls) > 0
