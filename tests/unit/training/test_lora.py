import pytest
import torch
from torch import nn

from peft_core.errors import InvalidArgument
from peft_core.schemas.training import TrainingConfig
from peft_core.training import lora
from tests.tiny_models import tiny_model


def test_all_linear_targets_every_linear_layer_except_the_head() -> None:
    model = lora.attach(tiny_model(), TrainingConfig(rank=4), "tiny")
    targets = lora.target_modules(model)
    assert list(targets) == sorted(targets)
    assert {name.rsplit(".", 1)[-1] for name in targets} == {
        f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    assert not any("lm_head" in name or "embed" in name for name in lora.weights(model))


def test_only_the_adapter_is_trainable_and_it_is_float32_on_a_bfloat16_base() -> None:
    model = lora.attach(tiny_model().to(torch.bfloat16), TrainingConfig(rank=4), "tiny")
    weights = lora.weights(model)
    assert len(weights) == 2 * 14
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)


def test_the_error_for_an_unknown_target_module_lists_the_existing_ones() -> None:
    with pytest.raises(InvalidArgument, match=r"'query'.*down_proj, gate_proj, k_proj, o_proj") as caught:
        lora.attach(tiny_model(), TrainingConfig(rank=4, target_modules=["q_proj", "query"]), "tiny")
    assert caught.value.details["field"] == "config.target_modules"


@pytest.mark.parametrize("name", ["input_layernorm", "embed_tokens", "lm_head"])
def test_norms_embeddings_and_the_head_are_rejected_as_targets(name: str) -> None:
    with pytest.raises(InvalidArgument, match="the linear modules of this base model"):
        lora.attach(tiny_model(), TrainingConfig(rank=4, target_modules=[name]), "tiny")


def test_the_learning_rate_of_b_is_that_of_a_times_the_lora_plus_ratio() -> None:
    model = lora.attach(tiny_model(), TrainingConfig(rank=4), "tiny")
    a, b = lora.build_optimizer(model, TrainingConfig(learning_rate=1e-3, lora_plus_ratio=16)).param_groups
    assert (a["lr"], b["lr"]) == (1e-3, 16e-3)
    assert len(a["params"]) == len(b["params"]) == 14
    assert all(weight.shape[0] == 4 for weight in a["params"])


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant"])
def test_the_rate_is_positive_in_every_step_and_never_exceeds_the_peak(shape: str) -> None:
    factors = [lora.rate_factor(shape, done, warmup=5, total=100) for done in range(100)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[:5] == sorted(factors[:5])
    assert factors[5] == 1.0
    assert factors[5:] == sorted(factors[5:], reverse=True)


def test_a_run_of_one_step_uses_at_least_half_the_peak_rate() -> None:
    assert lora.rate_factor("linear", 0, warmup=0, total=1) == 1.0
    assert lora.rate_factor("linear", 0, warmup=1, total=1) == 0.5


def test_rslora_divides_alpha_by_the_square_root_of_the_rank() -> None:
    model = lora.attach(tiny_model(), TrainingConfig(rank=16, alpha=8, use_rslora=True), "tiny")
    layer: nn.Module = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == pytest.approx(8 / 4)


def test_scaling_multiplies_what_every_module_adds() -> None:
    model = lora.attach(tiny_model(), TrainingConfig(rank=4), "tiny")
    for weight in lora.weights(model).values():
        nn.init.normal_(weight)
    layers = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    before = [layer.get_delta_weight("default") for layer in layers]
    lora.scale(model, 0.8)
    assert len(layers) == 14
    for layer, delta in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), 0.8 * delta)
