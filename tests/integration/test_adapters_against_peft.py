"""An adapter's configuration is interpreted as PEFT does: PEFT's own functions give the same modules and ranks."""

from __future__ import annotations

import random
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from peft_core.adapters.config_check import check_settings

_PARTS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.experts.3.up_proj")
MODULES = [*(f"model.layers.{layer}.{part}" for layer in range(12) for part in _PARTS), "lm_head", "model.q_proj"]
SUFFIXES = sorted({name.split(".", cut)[-1] for name in MODULES for cut in range(name.count(".") + 1)})


def test_random_settings_are_interpreted_as_peft_interprets_them() -> None:
    generator = random.Random(0)  # noqa: S311 - not for secrets

    def patterns(limit: int) -> list[str]:
        return generator.sample([*SUFFIXES, "proj", "1.self_attn.q_proj"], generator.randint(1, limit))

    for _ in range(500):
        raw: dict[str, Any] = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": patterns(5),
            "layers_to_transform": generator.choice([None, [], 0, 3, [0, 1], [2, 11], [99]]),
            "rank_pattern": {key: generator.randint(1, 9) for key in patterns(4)},
            "alpha_pattern": {key: float(generator.randint(1, 9)) for key in patterns(4)},
        }
        settings, reasons = check_settings({"peft_type": "LORA", **raw})
        assert settings is not None, reasons
        config = LoraConfig(**raw)
        for module in MODULES:
            assert settings.targets(module) == bool(check_target_module_exists(config, module)), (module, raw)
            ranks = raw["rank_pattern"]
            assert settings.rank_of(module) == ranks.get(get_pattern_key(ranks, module), 4), (module, raw)
