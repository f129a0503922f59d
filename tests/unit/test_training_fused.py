"""T tokens, D model size."""

import torch

from peft_core.spec import TrainingConfig
from peft_core.training import lora
from peft_core.training.fused import fuse
from tests.toys import toy_model


def test_all_plain_layers_and_gated_mlps_are_fused() -> None:
    model = lora.attach(toy_model("qwen2"), TrainingConfig(rank=4), "toy")
    assert fuse(model) == (14, 2)


def test_layers_with_dropout_stay_as_they_are() -> None:
    model = lora.attach(toy_model(), TrainingConfig(rank=4, dropout=0.1), "toy")
    assert fuse(model) == (0, 0)


def test_an_mlp_with_another_activation_keeps_its_own_forward() -> None:
    model = lora.attach(toy_model("gemma2"), TrainingConfig(rank=4), "toy")
    linears, gated = fuse(model)
    assert (linears, gated) == (14, 0)


def test_fusing_draws_no_random_numbers() -> None:
    model = lora.attach(toy_model(), TrainingConfig(rank=4), "toy")
    before = torch.get_rng_state()
    fuse(model)
    assert torch.equal(before, torch.get_rng_state())
