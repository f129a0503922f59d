"""Which modules are fused, and why others are not. T tokens, D model size."""

from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from peft_core.modeling.fused_blocks import FusionStats, fuse
from peft_core.modeling.objective import probe_fast_paths
from peft_core.schemas.training import TrainingConfig
from peft_core.training import lora
from tests.tiny_models import tiny_model


def fused(architecture: str, **config: Any) -> FusionStats:
    model = tiny_model(architecture)
    probe_fast_paths(model, max_length=64)  # sets the attention
    return fuse(lora.attach(model, TrainingConfig(rank=4, **config), "tiny"))


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_llama_like_blocks_are_fused(architecture: str) -> None:
    assert fused(architecture) == FusionStats(blocks=2, linears=0)


def test_a_partly_adapted_block_is_fused() -> None:
    assert fused("llama", target_modules=["q_proj", "v_proj"]) == FusionStats(blocks=2, linears=0)


def test_layers_with_dropout_are_not_fused() -> None:
    assert fused("llama", dropout=0.1) == FusionStats(blocks=0, linears=0)


def test_the_log_says_why_blocks_are_not_fused() -> None:
    with capture_logs() as logs:
        fused("llama", dropout=0.1)
    (entry,) = (entry for entry in logs if entry["event"] == "blocks_not_fused")
    assert entry["reasons"] == ["not true that projections are plain frozen or LoRA layers"]


def test_only_the_linear_layers_of_other_blocks_are_fused() -> None:
    assert fused("gemma2") == FusionStats(blocks=0, linears=14)


def test_blocks_with_another_attention_are_not_fused() -> None:
    assert fused("mistral_window") == FusionStats(blocks=0, linears=14)


def test_a_block_whose_fused_output_differs_is_not_fused() -> None:
    model = tiny_model()
    probe_fast_paths(model, max_length=64)
    model.model.layers[1].self_attn.scaling *= 1.5
    model.model.layers[1].self_attn.register_forward_hook(lambda _module, _inputs, out: (out[0] * 1.1, out[1]))
    assert fuse(lora.attach(model, TrainingConfig(rank=4), "tiny")) == FusionStats(blocks=1, linears=7)


def test_fusing_leaves_the_random_sequence_unchanged() -> None:
    model = lora.attach(tiny_model(), TrainingConfig(rank=4), "tiny")
    before = torch.get_rng_state()
    fuse(model)
    assert torch.equal(before, torch.get_rng_state())
