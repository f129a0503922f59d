"""Adapters that other programs wrote give exactly the logits that PEFT, or the formula of mlx-lm, gives for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_core.adapters.config_check import FIELDS, check_settings
from peft_core.adapters.files import read_adapter
from peft_core.adapters.verify import verify_files
from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.modeling.adapter_model import ResidentModel
from peft_core.modeling.device import DevicePlan
from peft_core.schemas.results import BaseMatch
from tests.tiny_models import write_tiny_adapter, write_tiny_base

pytestmark = pytest.mark.model
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.tensor([[5, 9, 40, 33, 7, 21, 60, 2]])
CONFIG, WEIGHTS, MLX_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_base(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def resident(base: Path) -> ResidentModel:
    return ResidentModel.load(resolve(str(base), Settings()), base, DevicePlan("cpu", torch.float32, "no", ""))


def ours(resident: ResidentModel, adapter: Path) -> torch.Tensor:
    """Return the logits with an adapter as the product loads it, which must be accepted by the check."""
    files = read_adapter(adapter, weights="keep")
    check = verify_files(files, resident.base)
    assert check.verdict is BaseMatch.SHAPE_ONLY, check.reasons
    name, _ = resident.add(files)
    with torch.inference_mode():
        logits = resident.causal(input_ids=IDS).logits.clone()
    resident.remove(name)
    return logits


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    with torch.inference_mode():
        return torch.as_tensor(model(input_ids=IDS).logits)


def write_foreign(directory: Path, base: Path, seed: int = 0, **config: Any) -> Path:
    """Write an adapter with PEFT and remove the manifest."""
    adapter = write_tiny_adapter(directory, base, seed, **config)
    (adapter / "adapter_manifest.json").unlink()
    return adapter


def reconfigure(adapter: Path, **changes: Any) -> None:
    config = json.loads((adapter / CONFIG).read_text())
    (adapter / CONFIG).write_text(json.dumps(config | changes))


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "a regular expression": {"target_modules": r".*\.self_attn\.(q_proj|k_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "ranks by an expression": {"target_modules": TARGETS, "rank_pattern": {r".*\.(q|k)_proj": 2}},
    "ranks and alphas by name": {
        "target_modules": TARGETS,
        "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2, "mlp.up_proj": 8},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 1, "down_proj": 3},
        "use_rslora": True,
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "an exclusion": {"target_modules": TARGETS, "exclude_modules": ["layers.0.mlp.up_proj", "k_proj"]},
    "an exclusion by an expression": {"target_modules": TARGETS, "exclude_modules": r".*layers\.0\..*"},
    "biases that the model lacks": {"bias": "all"},
    "EVA": {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "not initialised": {"init_lora_weights": False},
}


@pytest.mark.parametrize("config", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_an_accepted_configuration_gives_the_logits_that_peft_gives(
    config: dict[str, Any], tmp_path: Path, base: Path, resident: ResidentModel
) -> None:
    adapter = write_foreign(tmp_path / "adapter", base, **config)
    if "all-linear" in config.values():
        reconfigure(adapter, target_modules="all-linear")  # PEFT writes the names
    expected = peft_logits(base, adapter)
    torch.testing.assert_close(ours(resident, adapter), expected)
    assert not torch.allclose(expected, resident.causal(input_ids=IDS).logits, atol=1e-3)


def test_settings_that_are_not_read_change_no_logit(tmp_path: Path, base: Path, resident: ResidentModel) -> None:
    adapter = write_foreign(tmp_path / "adapter", base)
    expected = peft_logits(base, adapter)
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "evil", "unsloth_fixed": True}
    reconfigure(
        adapter,
        auto_mapping=mapping,
        task_type="SEQ_2_SEQ_LM",
        fan_in_fan_out=True,
        corda_config={"corda_method": "ipm"},
        lorap_emb_lr=1e-6,
        target_modules=["q_proj", "v_proj", "down_proj", "c_attn", "query_key_value"],
    )
    torch.testing.assert_close(ours(resident, adapter), expected)


def test_random_patterns_give_the_scale_that_peft_computes(base: Path) -> None:
    generator = random.Random(3)  # noqa: S311 -- not for secrets
    keys = [
        *TARGETS,
        "self_attn.q_proj",
        "layers.1.mlp.up_proj",
        "^model.layers.0.self_attn.v_proj",
        r"layers\.0\.mlp\.up_proj$",
    ]
    for _ in range(8):
        raw: dict[str, Any] = {
            "r": 4,
            "lora_alpha": generator.choice([1, 8, 32]),
            "target_modules": TARGETS,  # PEFT warns of keys that match no target
            "use_rslora": generator.random() < 0.5,
            "rank_pattern": {key: generator.randint(1, 9) for key in generator.sample(keys, 3)},
            "alpha_pattern": {key: generator.randint(1, 50) for key in generator.sample(keys, 3)},
        }
        settings, reasons = check_settings({"peft_type": "LORA", **raw})
        assert settings is not None, reasons
        model = PeftModel(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **raw))
        for name, module in model.base_model.model.named_modules():
            if isinstance(module, LoraLayer):
                rank = settings.rank_of(name)
                assert rank == module.r["default"], (name, raw)
                assert settings.scale_of(name, rank) == pytest.approx(module.scaling["default"]), (name, raw)


def write_as_mlx(
    directory: Path, adapter: Path, *, scale: float, rank: int, dtype: torch.dtype = torch.float32
) -> Path:
    """Write the same matrices as mlx-lm does: transposed, without a prefix, with a scale and no alpha."""
    directory.mkdir()
    tensors = load_file(adapter / WEIGHTS)
    renamed = {
        name.removeprefix("base_model.model.")
        .replace("lora_A.weight", "lora_a")
        .replace("lora_B.weight", "lora_b"): tensor
        for name, tensor in tensors.items()
    }
    save_file({name: tensor.T.contiguous().to(dtype) for name, tensor in renamed.items()}, directory / MLX_WEIGHTS)
    config = {
        "model": "mlx-community/tiny-4bit",
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.1},
        "optimizer_config": {"adam": {}},
        "trust_remote_code": True,
    }
    (directory / CONFIG).write_text(json.dumps(config))
    return directory


def test_the_same_matrices_give_the_same_logits_in_the_form_of_peft_and_of_mlx(
    tmp_path: Path, base: Path, resident: ResidentModel
) -> None:
    adapter = write_foreign(tmp_path / "peft", base, target_modules=TARGETS, r=4, lora_alpha=10)
    mlx = write_as_mlx(tmp_path / "mlx", adapter, scale=2.5, rank=4)
    expected = peft_logits(base, adapter)
    torch.testing.assert_close(ours(resident, mlx), expected)
    torch.testing.assert_close(ours(resident, adapter), expected)
    half = write_as_mlx(tmp_path / "half", adapter, scale=2.5, rank=4, dtype=torch.bfloat16)
    torch.testing.assert_close(ours(resident, half), expected, atol=0.1, rtol=0.1)


def test_an_mlx_adapter_adds_scale_times_a_times_b(tmp_path: Path, base: Path, resident: ResidentModel) -> None:
    """The formula of mlx-lm's LoRALinear: y + scale * (x @ lora_a) @ lora_b, here added to the weight itself."""
    adapter = write_foreign(tmp_path / "peft", base, target_modules=["q_proj", "down_proj"])
    mlx = write_as_mlx(tmp_path / "mlx", adapter, scale=3.0, rank=4)
    tensors = load_file(mlx / MLX_WEIGHTS)
    model = AutoModelForCausalLM.from_pretrained(base)
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        update = 3.0 * tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]
        model.get_submodule(name).weight.data += update.T
    with torch.inference_mode():
        torch.testing.assert_close(ours(resident, mlx), model(input_ids=IDS).logits)


def test_every_setting_of_the_installed_peft_is_decided_about() -> None:
    assert set(LoraConfig.__dataclass_fields__) <= FIELDS.keys()
