"""Unit tests of config_check: which settings are accepted, how they are read, and that no JSON makes it raise."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.adapters.config_check import LoraSettings, check_settings, layer_of

MINIMAL: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
Q_PROJ = "model.layers.{}.self_attn.q_proj"
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
NAMES = [
    *MINIMAL, "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "bias", "task_type",
    "init_lora_weights", "megatron_core", "modules_to_save", "base_model_name_or_path", "of_the_future",
]  # fmt: skip


def accepted(**config: Any) -> LoraSettings:
    """Return the settings of a valid configuration."""
    settings, reasons = check_settings({**MINIMAL, **config})
    assert reasons == []
    assert settings is not None
    return settings


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"peft_type": "LOHA"}, "not_lora"),
        ({"peft_type": None}, "not_lora"),
        ({"r": 0}, "config_value"),
        ({"r": -1}, "config_value"),
        ({"r": 10**9}, "config_value"),
        ({"r": "4"}, "config_value"),
        ({"r": True}, "config_value"),
        ({"lora_alpha": float("nan")}, "config_value"),
        ({"lora_alpha": float("inf")}, "config_value"),
        ({"lora_alpha": 1e38}, "config_value"),
        ({"lora_alpha": 10**400}, "config_value"),
        ({"lora_alpha": "8"}, "config_value"),
        ({"lora_alpha": 0}, "config_value"),
        ({"use_rslora": 1}, "config_value"),
        ({"target_modules": "(([a-z])+)+X"}, "targets_not_literal"),
        ({"target_modules": ["q_proj|v_proj"]}, "targets_not_literal"),
        ({"target_modules": []}, "targets_not_literal"),
        ({"target_modules": None}, "targets_not_literal"),
        ({"target_modules": "all-linear"}, "targets_not_literal"),
        ({"target_modules": ["q_proj\n"]}, "targets_not_literal"),
        ({"rank_pattern": {"q_proj": 10**9}}, "config_value"),
        ({"rank_pattern": {"q_proj": 4.0}}, "config_value"),
        ({"rank_pattern": ["q_proj"]}, "config_value"),
        ({"rank_pattern": {"(([a-z_.0-9])+)+X": 4}}, "targets_not_literal"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "config_value"),
        ({"alpha_pattern": {"q.*": 4}}, "targets_not_literal"),
        ({"layers_to_transform": False}, "config_value"),
        ({"layers_to_transform": "0"}, "config_value"),
        ({"layers_to_transform": [0, -1]}, "config_value"),
        ({"layers_to_transform": [0], "target_modules": [Q_PROJ.format(i) for i in range(20)]}, "config_value"),
        ({"layers_pattern": ["layers"]}, "unsupported_setting"),
        ({"exclude_modules": "(([a-z_.0-9])+)+X"}, "unsupported_setting"),
        ({"use_dora": True}, "unsupported_setting"),
        ({"bias": "all"}, "unsupported_setting"),
        ({"task_type": "SEQ_CLS"}, "unsupported_setting"),
        ({"task_type": "BOGUS"}, "unsupported_setting"),
        ({"fan_in_fan_out": True}, "unsupported_setting"),
        ({"modules_to_save": ["lm_head"]}, "unsupported_setting"),
        ({"trainable_token_indices": [1, 500]}, "unsupported_setting"),
        ({"init_lora_weights": "pissa"}, "unsupported_setting"),
        ({"init_lora_weights": "olora"}, "unsupported_setting"),
        ({"init_lora_weights": 1}, "unsupported_setting"),
        ({"corda_config": {"cache_file": "adapter_model.bin"}}, "unsupported_setting"),
        ({"auto_mapping": {"parent_library": "os"}}, "unsupported_setting"),
        ({"layer_replication": [[0, 4]]}, "unsupported_setting"),
        ({"megatron_config": {"a": 1}}, "unsupported_setting"),
        ({"megatron_core": "antigravity"}, "unsupported_setting"),
        ({"alora_invocation_tokens": [1]}, "unsupported_setting"),
        ({"arrow_config": {"a": 1}}, "unsupported_setting"),
        ({"of_the_future": 1}, "unsupported_setting"),
    ],
)
def test_an_invalid_setting_is_rejected_by_name(config: dict[str, Any], code: str) -> None:
    settings, reasons = check_settings({**MINIMAL, **config})
    assert settings is None
    assert [reason.code for reason in reasons] == [code]
    assert reasons[0].where == next(iter(config))
    assert next(iter(config)) in reasons[0].message
    assert reasons[0].fix


def test_all_invalid_settings_are_reported_together() -> None:
    _, reasons = check_settings({"r": 0, "use_dora": True, "bias": "all"})
    assert [reason.where for reason in reasons] == [
        "peft_type", "r", "lora_alpha", "target_modules", "use_dora", "bias",
    ]  # fmt: skip


def test_many_unsupported_settings_are_summarised() -> None:
    _, reasons = check_settings(MINIMAL | {f"unknown_{number}": 1 for number in range(5000)})
    assert len(reasons) == 11
    assert "4990 more" in reasons[-1].message


def test_settings_without_an_effect_are_accepted() -> None:
    accepted(bias="none", init_lora_weights=True, task_type="CAUSAL_LM", megatron_core="megatron.core", use_dora=False,
             lora_dropout=0.1, modules_to_save=None, rank_pattern={}, alpha_pattern={}, layers_pattern=None,
             layers_to_transform=None, revision=None, peft_version="0.21.2", auto_mapping=None,
             base_model_name_or_path="/somewhere")  # fmt: skip
    accepted(init_lora_weights="gaussian", layers_to_transform=[])


def test_a_target_matches_a_full_name_or_a_dotted_suffix() -> None:
    settings = accepted(target_modules=["q_proj", "mlp.up_proj", "lm_head"])
    assert settings.targets(Q_PROJ.format(0))
    assert settings.targets("lm_head")
    assert settings.targets("model.layers.0.mlp.up_proj")
    assert not settings.targets("model.layers.0.mlp.xq_proj")
    assert not settings.targets("model.layers.0.other.up_proj")
    assert not settings.targets("model.layers.0.self_attn.q_proj.inner")


def test_layers_to_transform_does_not_restrict_full_names() -> None:
    assert [accepted(layers_to_transform=1).targets(Q_PROJ.format(i)) for i in range(3)] == [False, True, False]
    assert [accepted(layers_to_transform=[0, 2]).targets(Q_PROJ.format(i)) for i in range(3)] == [True, False, True]
    full_name = accepted(layers_to_transform=[0], target_modules=[Q_PROJ.format(2)])
    assert [full_name.targets(Q_PROJ.format(i)) for i in range(3)] == [False, False, True]
    assert not accepted(layers_to_transform=0, target_modules=["lm_head"]).targets("a.lm_head")


def test_the_layer_is_the_first_number_in_the_name() -> None:
    assert layer_of("model.layers.3.mlp.experts.7.up_proj") == 3
    assert layer_of("lm_head") is None
    assert layer_of("layers.3.up_proj") is None  # PEFT requires two names before the number


def test_the_first_matching_pattern_determines_the_rank() -> None:
    settings = accepted(
        rank_pattern={"layers.1.self_attn.q_proj": 2, "q_proj": 8}, alpha_pattern={"q_proj": 64, Q_PROJ.format(1): 0.5}
    )
    assert [settings.rank_of(Q_PROJ.format(i)) for i in range(2)] == [8, 2]
    assert settings.rank_of("model.layers.0.self_attn.v_proj") == 4


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=8), JSON, max_size=8))
def test_no_json_object_makes_the_check_raise(config: dict[str, Any]) -> None:
    for candidate in (config, {**MINIMAL, **config}):
        settings, reasons = check_settings(candidate)
        assert (settings is None) == bool(reasons)
        for reason in reasons:
            assert reason.message.isprintable()
            assert len(reason.message) < 600
        if settings is not None:
            assert 1 <= settings.rank_of(Q_PROJ.format(0)) <= 512
            settings.targets(Q_PROJ.format(0))


def test_an_implausibly_large_layer_number_is_ignored() -> None:
    """The check computes with layer numbers, so a name must not determine how much work it does."""
    assert layer_of("model.layers.11.self_attn.q_proj") == 11
    assert layer_of("model.layers.999999.self_attn.q_proj") == 999_999
    assert layer_of(f"model.layers.{10**8}.self_attn.q_proj") is None
    assert layer_of(f"model.layers.{'9' * 5000}.self_attn.q_proj") is None
