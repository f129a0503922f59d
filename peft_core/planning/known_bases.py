"""Base models that are worth downloading: few, for code, with fill-in-the-middle, and with a licence without conditions of use.

The sizes are those of config.json in each repository of the Hugging Face Hub; the number of weights and the estimates follow
from them. Qwen2.5-Coder-3B is left out because its licence excludes commercial use, and mixtures of experts because they are
not trained here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_core.base_models.checkpoint_info import model_shape
from peft_core.base_models.layouts import expected_shapes
from peft_core.schemas.base_model import Base, Fingerprint

CHECKED = "November 2026"
_BYTES_PER_WEIGHT = 2  # the files are in BF16


@dataclass(frozen=True)
class KnownBase:
    """A base model of the hub, by the settings in its config.json that determine its size."""

    hub_id: str
    licence: str
    config: dict[str, Any]

    @property
    def command(self) -> str:
        return f"hf download {self.hub_id}"

    def described(self) -> Base:
        """Return what `resolve` would say of it. The path does not exist, and the fingerprint is not that of its files."""
        path = Path(self.hub_id)
        shapes = expected_shapes(self.config) or {}
        return Base(
            ref=self.hub_id,
            name=self.hub_id,
            format="huggingface",
            path=path,
            model_type=self.config["model_type"],
            shape=model_shape(path, self.config, shapes),
            size_bytes=_BYTES_PER_WEIGHT * sum(math.prod(shape) for shape in shapes.values()),
            has_chat_template=True,
            fingerprint=Fingerprint(architecture="", sample=self.hub_id),
        )


def _qwen2_5_coder(size: str, hidden: int, intermediate: int, layers: int, heads: tuple[int, int]) -> KnownBase:
    is_small = hidden < 3000
    config = {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": 151_936 if is_small else 152_064,
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": is_small,
    }
    return KnownBase(f"Qwen/Qwen2.5-Coder-{size}", "Apache-2.0", config)


KNOWN_BASES = (
    _qwen2_5_coder("0.5B", 896, 4864, 24, (14, 2)),
    _qwen2_5_coder("1.5B", 1536, 8960, 28, (12, 2)),
    _qwen2_5_coder("7B", 3584, 18_944, 28, (28, 4)),
    _qwen2_5_coder("14B", 5120, 13_824, 48, (40, 8)),
)
