"""What the planner says of families of models, held against the engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from peft_core.bases import resolve
from peft_core.compute.base import load_base
from peft_core.compute.frozen import load_frozen
from peft_core.config import Settings
from peft_core.estimate import FUSED, MAPPED, kept_bytes, lora_parameters
from peft_core.spec import TrainingConfig
from peft_core.training import lora
from peft_core.training.batches import join
from peft_core.training.fused import fuse
from peft_core.training.objective import choose_objective
from tests.toys import toy_documents, write_toy_base

CONFIG = TrainingConfig(rank=4)


@pytest.mark.parametrize("family", sorted(MAPPED))
def test_every_weight_of_a_mapped_family_can_stay_in_its_file_or_be_in_bfloat16(family: str, tmp_path: Path) -> None:
    base = resolve(str(write_toy_base(tmp_path / "base", family)), Settings())
    assert base.model_type == family
    for in_bfloat16 in (False, True):
        assert load_frozen(base, base.path, in_bfloat16=in_bfloat16) is not None


@pytest.mark.parametrize("family", sorted(FUSED))
def test_of_a_fused_family_every_block_is_fused_and_keeps_what_the_plan_says(family: str, tmp_path: Path) -> None:
    base = resolve(str(write_toy_base(tmp_path / "base", family)), Settings())
    model = load_base(base.path, torch.float32)
    objective = choose_objective(model, max_length=512)
    adapted = lora.attach(model, CONFIG, "toy")
    assert fuse(adapted).blocks == base.shape.layers
    assert objective.packed
    assert objective.head is not None
    assert sum(weight.numel() for weight in lora.weights(adapted).values()) == lora_parameters(CONFIG.rank, base.shape)

    weights = {parameter.untyped_storage().data_ptr() for parameter in adapted.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = join(toy_documents((200, 56)), torch.device("cpu"))
    model.train()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective.loss(batch)
    loss.backward()
    planned = base.shape.layers * batch.tokens * kept_bytes(CONFIG, base, "cpu", narrow=False)
    beside_layers = batch.tokens * 4 * 3 * base.shape.hidden_size  # the last norm, and the hidden states of the head
    assert sum(kept.values()) == pytest.approx(planned + beside_layers, rel=0.15)


def test_weights_of_16_bits_are_used_where_they_lie(tmp_path: Path) -> None:
    base = resolve(str(write_toy_base(tmp_path / "base", dtype=torch.bfloat16)), Settings())
    model = load_frozen(base, base.path, in_bfloat16=True)
    assert model is not None
    own = load_base(base.path, torch.float32)
    ids_1T = torch.arange(3, 20)[None]
    assert torch.allclose(model(ids_1T).logits, own(ids_1T).logits, atol=0.1)
    assert model.get_output_embeddings().stored.nbytes == 2 * own.get_output_embeddings().weight.numel()


def test_a_base_that_cannot_be_mapped_is_told_as_what_it_is(tmp_path: Path) -> None:
    base = resolve(str(write_toy_base(tmp_path / "base", "gemma2")), Settings())
    assert base.model_type not in MAPPED
    assert load_frozen(base, base.path) is None
