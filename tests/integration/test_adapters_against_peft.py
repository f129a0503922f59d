"""Our reading of an adapter's configuration is PEFT's: the same modules, ranks and alphas, by its own functions."""

from __future__ import annotations

import random
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from peft_core.adapters.config_check import check_settings

_PARTS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.3.up_proj")
MODULES = [*(f"model.layers.{layer}.{part}" for layer in range(12) for part in _PARTS), "lm_head", "model.q_proj"]
ENDS = sorted({name.split(".", cut)[-1] for name in MODULES for cut in range(name.count(".") + 1)})


def test_random_settings_are_read_as_peft_reads_them() -> None:
    chosen = random.Random(0)  # noqa: S311 - not for secrets

    def some(most: int) -> list[str]:
        return chosen.sample([*ENDS, "proj", "1.self_attn.q_proj"], chosen.randint(1, most))

    for _ in range(500):
        shape: dict[str, Any] = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": some(5),
            "layers_to_transform": chosen.choice([None, [], 0, 3, [0, 1], [2, 11], [99]]),
            "rank_pattern": {key: chosen.randint(1, 9) for key in some(4)},
            "alpha_pattern": {key: float(chosen.randint(1, 9)) for key in some(4)},
        }
        settings, reasons = check_settings({"peft_type": "LORA", **shape})
        assert settings is not None, reasons
        config = LoraConfig(**shape)
        for module in MODULES:
            assert settings.targets(module) == bool(check_target_module_exists(config, module)), (module, shape)
            ranks = shape["rank_pattern"]
            assert settings.rank_of(module) == ranks.get(get_pattern_key(ranks, module), 4), (module, shape)
