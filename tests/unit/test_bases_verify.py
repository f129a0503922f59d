"""The check of an adapter against a base, by headers alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from peft_core.adapters.verify import check_adapter, linear_modules
from peft_core.bases import resolve
from peft_core.config import Settings
from peft_core.spec import Base
from tests.model_files import SHAPES, adapter_shapes, gguf_bytes, safetensors_bytes, write_adapter, write_model

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module", params=["huggingface", "gguf"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    directory = tmp_path_factory.mktemp("base")
    if request.param == "huggingface":
        return resolve(str(write_model(directory / "tiny")), Settings())
    (directory / "tiny.gguf").write_bytes(gguf_bytes())
    return resolve(str(directory / "tiny.gguf"), Settings())


def codes(directory: Path, base: Base) -> list[str]:
    return [reason.code for reason in check_adapter(directory, base)]


def test_a_sound_adapter_has_no_reason_against_it(tmp_path: Path, base: Base) -> None:
    every = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert check_adapter(write_adapter(tmp_path / "two"), base) == []
    assert check_adapter(write_adapter(tmp_path / "all", targets=every, rank=16, use_rslora=True), base) == []


def test_whole_module_names_are_targets_too(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path, targets=["q_proj"])
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert codes(adapter, base) == []


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"peft_type": "LOHA"}, "not_lora"),
        ({"r": 0}, "config_value"),
        ({"r": 10**9}, "config_value"),
        ({"r": True}, "config_value"),
        ({"lora_alpha": float("nan")}, "config_value"),
        ({"lora_alpha": float("inf")}, "config_value"),
        ({"lora_alpha": "8"}, "config_value"),
        ({"target_modules": "(([a-z])+)+X"}, "targets_not_literal"),
        ({"target_modules": ["q_proj|v_proj"]}, "targets_not_literal"),
        ({"target_modules": []}, "targets_not_literal"),
        ({"use_dora": True}, "unsupported_setting"),
        ({"bias": "all"}, "unsupported_setting"),
        ({"modules_to_save": ["lm_head"]}, "unsupported_setting"),
        ({"rank_pattern": {"q_proj": 10**9}}, "unsupported_setting"),
        ({"init_lora_weights": "pissa"}, "unsupported_setting"),
        ({"auto_mapping": {"parent_library": "os"}}, "unsupported_setting"),
        ({"layer_replication": [[0, 4]]}, "unsupported_setting"),
        ({"layers_to_transform": 0}, "unsupported_setting"),
        ({"megatron_core": "antigravity"}, "unsupported_setting"),
        ({"of_the_future": 1}, "unsupported_setting"),
    ],
)
def test_a_configuration_out_of_bounds_is_refused(
    tmp_path: Path, base: Base, config: dict[str, Any], code: str
) -> None:
    reasons = check_adapter(write_adapter(tmp_path, **config), base)
    assert [reason.code for reason in reasons] == [code]
    assert reasons[0].where == next(iter(config))
    assert next(iter(config)) in reasons[0].message


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"model.layers.0.mlp.up_proj.weight": (64, 32)}, "foreign_tensor"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight": (32, 32)}, "foreign_tensor"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": None}, "unpaired"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (8, 32)}, "rank"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": (4, 64)}, "shape"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (4, 32)}, "rank"),
        ({"base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": (32,)}, "rank"),
    ],
)
def test_tensors_that_are_not_the_adapter_s_are_refused(
    tmp_path: Path, base: Base, change: dict[str, tuple[int, ...] | None], code: str
) -> None:
    adapter = write_adapter(tmp_path)
    shapes = {name: shape for name, shape in ({**adapter_shapes(), **change}).items() if shape is not None}
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(shapes))
    reasons = check_adapter(adapter, base)
    assert [reason.code for reason in reasons] == [code]
    assert reasons[0].where is not None
    assert reasons[0].where in next(iter(change))


def test_an_adapter_of_another_base_says_what_is_missing_and_what_is_too_much(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path, targets=["q_proj"])
    renamed = {name.replace("layers.1.", "layers.7."): shape for name, shape in adapter_shapes(["q_proj"]).items()}
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(renamed))
    assert codes(adapter, base) == ["module_not_in_base", "weights_missing"]


def test_targets_and_weights_must_agree(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path, targets=["q_proj"])
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(adapter_shapes(["v_proj"])))
    assert codes(adapter, base) == ["weights_missing", "not_targeted"]
    assert codes(write_adapter(tmp_path / "x", targets=["q_proj", "wq"]), base) == ["target_not_in_base"]


def test_integer_weights_and_no_weights_are_refused(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    (adapter / WEIGHTS).write_bytes(safetensors_bytes(adapter_shapes(), dtype="I8"))
    assert codes(adapter, base) == ["dtype"]
    (adapter / WEIGHTS).write_bytes(safetensors_bytes({}))
    assert codes(adapter, base) == ["no_weights", "weights_missing"]


def test_many_faults_of_one_kind_make_one_reason(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path)
    (adapter / WEIGHTS).write_bytes(safetensors_bytes({**adapter_shapes(), **{f"x{i}": () for i in range(5000)}}))
    (reason,) = check_adapter(adapter, base)
    assert reason.message.startswith("5000 tensors that are no LoRA weights")
    assert len(reason.message) < 300


def test_a_pickle_a_link_a_fifo_and_a_missing_file_are_refused_unopened(tmp_path: Path, base: Base) -> None:
    adapter = write_adapter(tmp_path / "a")
    (adapter / WEIGHTS).rename(tmp_path / "elsewhere")
    assert codes(adapter, base) == ["missing_file"]
    (adapter / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    assert codes(adapter, base) == ["bad_file"]
    (adapter / WEIGHTS).unlink()
    os.mkfifo(adapter / WEIGHTS)
    assert codes(adapter, base) == ["bad_file"]
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(b"\x80")
    assert codes(adapter, base) == ["pickle"]


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"r": ' + "1" * 5000 + "}", " " * (257 << 10)])
def test_a_configuration_that_cannot_be_read_is_refused(tmp_path: Path, base: Base, text: str) -> None:
    adapter = write_adapter(tmp_path)
    (adapter / "adapter_config.json").write_text(text)
    (reason,) = check_adapter(adapter, base)
    assert (reason.code, reason.where) == ("bad_file", "adapter_config.json")


def test_embeddings_and_norms_are_no_linear_modules() -> None:
    modules = linear_modules(SHAPES)
    assert len(modules) == 14
    assert modules["model.layers.0.self_attn.k_proj"] == (16, 32)
