"""T tokens, D model size."""

import torch

from peft_core.spec import TrainingConfig
from peft_core.training import lora
from peft_core.training.fused import Fused, fuse
from tests.toys import toy_model


def test_all_plain_layers_gated_mlps_and_norms_are_fused() -> None:
    model = lora.attach(toy_model("qwen2"), TrainingConfig(rank=4), "toy")
    assert fuse(model) == Fused(linears=14, gated_mlps=2, norms=5)


def test_linear_layers_with_dropout_stay_as_they_are() -> None:
    model = lora.attach(toy_model(), TrainingConfig(rank=4, dropout=0.1), "toy")
    assert fuse(model) == Fused(linears=0, gated_mlps=0, norms=5)


def test_an_mlp_with_another_activation_and_norms_with_an_offset_keep_their_own_forward() -> None:
    model = lora.attach(toy_model("gemma2"), TrainingConfig(rank=4), "toy")
    assert fuse(model) == Fused(linears=14, gated_mlps=0, norms=0)


def test_fusing_draws_no_random_numbers() -> None:
    model = lora.attach(toy_model(), TrainingConfig(rank=4), "toy")
    before = torch.get_rng_state()
    fuse(model)
    assert torch.equal(before, torch.get_rng_state())
