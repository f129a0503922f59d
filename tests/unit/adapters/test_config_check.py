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
    "init_lora_weights", "megatron_core", "exclude_modules", "ensure_weight_tying", "auto_mapping",
    "modules_to_save", "base_model_name_or_path", "of_the_future",
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
        ({"target_modules": 7}, "targets_not_literal"),
        ({"target_modules": [["q_proj"]]}, "targets_not_literal"),
        ({"target_modules": ["q_proj"] * 20_001}, "targets_not_literal"),
        ({"exclude_modules": {"a": 1}}, "config_value"),
        ({"layers_pattern": 7}, "config_value"),
        ({"rank_pattern": {"q_proj": 10**9}}, "config_value"),
        ({"rank_pattern": {"q_proj": 4.0}}, "config_value"),
        ({"rank_pattern": ["q_proj"]}, "config_value"),
        ({"alpha_pattern": {"q_proj": float("nan")}}, "config_value"),
        ({"layers_to_transform": False}, "config_value"),
        ({"layers_to_transform": "0"}, "config_value"),
        ({"layers_to_transform": [0, -1]}, "config_value"),
        ({"ensure_weight_tying": "yes"}, "config_value"),
        ({"bias": "some"}, "unsupported_setting"),
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


# What a program writes beside plain LoRA weights, and why the mathematics stays the same.
NEUTRAL: dict[str, dict[str, Any]] = {
    "written by Unsloth": {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM", "unsloth_fixed": True}},
    "written by PEFT without a task": {"auto_mapping": {"base_model_class": "LlamaForCausalLM"}, "task_type": None},
    "a mapping to any module": {"auto_mapping": {"parent_library": "os", "base_model_class": "system"}},
    "names and versions": {"base_model_name_or_path": "/somewhere", "revision": "main", "peft_version": "0.21.2"},
    "dropout": {"lora_dropout": 0.1, "inference_mode": True},
    "initialised from the defaults": {"init_lora_weights": True},
    "initialised at random": {"init_lora_weights": False},
    "initialised by a normal distribution": {"init_lora_weights": "gaussian"},
    "initialised by EVA": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "initialised orthogonally": {"init_lora_weights": "orthogonal"},
    "initialised by MiCA": {"init_lora_weights": "mica"},
    "converted from CorDA": {"init_lora_weights": True, "corda_config": {"cache_file": "/etc/passwd"}},
    "converted from LoRA-GA": {"init_lora_weights": True, "lora_ga_config": {"direction": "ArB2r"}},
    "a block of LoftQ that was not used": {"init_lora_weights": True, "loftq_config": {"loftq_bits": 4}},
    "a compressed backward pass": {"velora_config": {"num_groups": 64}},
    "noise in training": {"monteclora_config": {"monteclora_n": 8}},
    "the layout of the base's weights": {"fan_in_fan_out": True},
    "the name of a module that is not used": {"megatron_core": "evil", "megatron_config": None},
    "settings of the run": {"runtime_config": {"ephemeral_gpu_offload": True}, "qalora_group_size": 32},
    "learning rates of LoRA+": {"lora_dtype": "float32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-06},
    "PEFT 0.2": {"enable_lora": None, "merge_weights": True, "fan_in_fan_out": False},
    "unknown and unset": {"of_the_future": None, "other": False, "more": [], "empty": {}, "blank": ""},
    "patterns that are empty": {"rank_pattern": {}, "alpha_pattern": {}, "layers_pattern": None, "layers_to_transform": []},
    "patterns that are null": {"rank_pattern": None, "alpha_pattern": None, "exclude_modules": None, "layers_pattern": ""},
    "tied weights without an adapted head": {"ensure_weight_tying": True},
    "no rank stabilisation": {"use_rslora": None, "bias": None, "use_dora": None},
}  # fmt: skip


@pytest.mark.parametrize("config", NEUTRAL.values(), ids=NEUTRAL.keys())
def test_a_setting_that_changes_no_number_is_accepted(config: dict[str, Any]) -> None:
    assert accepted(**config) == accepted(ensure_weight_tying=config.get("ensure_weight_tying"))


CHANGES_MEANING: dict[str, tuple[str, Any]] = {
    "DoRA": ("use_dora", True),
    "QALoRA": ("use_qalora", True),
    "a bias of B": ("lora_bias", True),
    "KaSA": ("kasa_config", {"beta": 1e-4}),
    "BD-LoRA": ("use_bdlora", {"nblocks": 2}),
    "aLoRA": ("alora_invocation_tokens", [1]),
    "Arrow": ("arrow_config", {"top_k": 3}),
    "parameters": ("target_parameters", ["experts.gate_up_proj"]),
    "parts of a fused matrix": ("enable_lora", [True, False, True]),
    "Megatron": ("megatron_config", {"a": 1}),
    "repeated layers": ("layer_replication", [[0, 4]]),
    "rows of the embedding": ("trainable_token_indices", [1, 500]),
    "rows of a named embedding": ("trainable_token_indices", {"embed_tokens": [1]}),
    "whole modules": ("modules_to_save", ["lm_head", "embed_tokens"]),
    **{f"initialised by {name}": ("init_lora_weights", name) for name in (
        "pissa", "pissa_niter_16", "olora", "OLoRA", "corda", "lora_ga", "loftq", "bogus", 7, 1)},
}  # fmt: skip


@pytest.mark.parametrize(("setting", "value"), CHANGES_MEANING.values(), ids=CHANGES_MEANING.keys())
def test_a_setting_that_changes_the_base_or_the_computation_is_refused(setting: str, value: object) -> None:
    settings, reasons = check_settings({**MINIMAL, setting: value})
    assert settings is None
    assert [(reason.code, reason.where) for reason in reasons] == [("unsupported_setting", setting)]
    assert setting in reasons[0].message
    assert len(f"{reasons[0].message} {reasons[0].fix}") < 400


def test_an_initialisation_that_changes_the_base_is_one_reason_that_names_the_conversion() -> None:
    _, (reason,) = check_settings({**MINIMAL, "init_lora_weights": "corda", "corda_config": {"corda_method": "ipm"}})
    assert reason.where == "init_lora_weights"
    assert "path_initial_model_for_weight_conversion" in (reason.fix or "")


@pytest.mark.parametrize("task", ["SEQ_2_SEQ_LM", "FEATURE_EXTRACTION", "SEQ_CLS", "BOGUS"])
def test_another_task_is_a_warning(task: str) -> None:
    settings, reasons = check_settings({**MINIMAL, "task_type": task})
    assert settings is not None
    assert [(reason.code, reason.severity, reason.found) for reason in reasons] == [
        ("task_type", "warning", repr(task))
    ]


@pytest.mark.parametrize("method", ["IA3", "ADALORA", "LOHA", "VERA", "LN_TUNING"])
def test_another_method_is_one_reason(method: str) -> None:
    settings, reasons = check_settings(
        {"peft_type": method, "target_r": 8, "feedforward_modules": ["down_proj"], "init_r": 12}
    )
    assert settings is None
    assert [(reason.code, reason.found) for reason in reasons] == [("not_lora", repr(method))]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "(([a-z])+)+X"},
        {"target_modules": ["q_proj|v_proj"]},
        {"target_modules": ["q_proj\n"]},
        {"target_modules": "all-linear"},
        {"target_modules": []},
        {"target_modules": None},
        {"exclude_modules": "(([a-z_.0-9])+)+X"},
        {"exclude_modules": ["visual.*"]},
        {"layers_pattern": "(h|layers)", "layers_to_transform": [1]},
        {"layers_to_transform": [0], "target_modules": [Q_PROJ.format(i) for i in range(20)]},
    ],
)
def test_targets_that_cannot_be_read_literally_follow_from_the_weights(config: dict[str, Any]) -> None:
    settings = accepted(**config)
    assert settings.target_modules is None
    assert settings.targets_described
    assert settings.targets("any.module")


def test_exclusions_and_named_layers_are_read_literally() -> None:
    settings = accepted(exclude_modules=["layers.1.self_attn.q_proj", "lm_head"])
    assert [settings.targets(Q_PROJ.format(i)) for i in range(3)] == [True, False, True]
    assert accepted(exclude_modules="q_proj").targets(Q_PROJ.format(0)), "PEFT matches a single text with full names"
    assert not accepted(exclude_modules=Q_PROJ.format(0)).targets(Q_PROJ.format(0))
    in_blocks = accepted(target_modules=["c_attn"], layers_to_transform=[1], layers_pattern="h")
    assert [in_blocks.targets(f"transformer.h.{i}.attn.c_attn") for i in range(2)] == [False, True]
    assert not in_blocks.targets("transformer.g.1.attn.c_attn")


def test_ranks_by_an_expression_follow_from_the_weights_and_alphas_by_one_are_named() -> None:
    settings = accepted(rank_pattern={"(([a-z_.0-9])+)+X": 4}, alpha_pattern={"q.*": 4, "v_proj": 2})
    assert settings.rank_of(Q_PROJ.format(0)) is None
    assert settings.alpha_expressions == ("q.*",)


def test_a_pattern_may_be_anchored_and_escaped() -> None:
    full, suffix = Q_PROJ.format(1), r"layers\.0\.self_attn\.q_proj$"
    settings = accepted(rank_pattern={f"^{full}": 2, suffix: 3, "^q_proj": 9})
    assert [settings.rank_of(Q_PROJ.format(i)) for i in range(3)] == [3, 2, 4]


def test_the_scale_is_alpha_by_rank_or_by_its_root() -> None:
    module = Q_PROJ.format(0)
    assert accepted().scale_of(module, 4) == 2.0
    assert accepted(use_rslora=True).scale_of(module, 4) == 4.0
    assert accepted(alpha_pattern={"q_proj": 32}).scale_of(module, 16) == 2.0


def test_all_invalid_settings_are_reported_together() -> None:
    _, reasons = check_settings({"r": 0, "use_dora": True, "bias": "some"})
    assert [reason.where for reason in reasons] == [
        "peft_type", "r", "lora_alpha", "bias", "use_dora",
    ]  # fmt: skip


def test_many_unsupported_settings_are_summarised() -> None:
    _, reasons = check_settings(MINIMAL | {f"unknown_{number}": 1 for number in range(5000)})
    assert len(reasons) == 11
    assert "4990 more" in reasons[-1].message


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
        assert (settings is None) == any(reason.severity == "error" for reason in reasons)
        for reason in reasons:
            assert reason.message.isprintable()
            assert len(reason.message) < 600
        if settings is not None:
            rank = settings.rank_of(Q_PROJ.format(0))
            assert rank is None or 1 <= rank <= 512
            assert 0 < settings.scale_of(Q_PROJ.format(0), 4) < float("inf")
            settings.targets(Q_PROJ.format(0))


def test_an_implausibly_large_layer_number_is_ignored() -> None:
    """The check computes with layer numbers, so a name must not determine how much work it does."""
    assert layer_of("model.layers.11.self_attn.q_proj") == 11
    assert layer_of("model.layers.999999.self_attn.q_proj") == 999_999
    assert layer_of(f"model.layers.{10**8}.self_attn.q_proj") is None
    assert layer_of(f"model.layers.{'9' * 5000}.self_attn.q_proj") is None
