"""The two ways in which programs store the matrices of a LoRA adapter: PEFT's and that of mlx-lm."""

from __future__ import annotations

import re
from dataclasses import dataclass

from peft_core.adapters.manifest import WEIGHTS


@dataclass(frozen=True)
class Layout:
    """How an adapter's weights are stored. PEFT: A is (rank, in), B is (out, rank). mlx-lm: both are transposed."""

    weights: str  # name of the file
    prefix: str  # of every tensor's name
    name: re.Pattern[str]  # of a tensor, after the prefix; groups: the module, and A or B in either case
    transposed: bool


PEFT = Layout(WEIGHTS, "base_model.model.", re.compile(r"(.+)\.lora_(A|B)\.weight", re.ASCII), transposed=False)
# https://github.com/ml-explore/mlx-lm, tuner/lora.py: y + scale * (x @ lora_a) @ lora_b
MLX = Layout("adapters.safetensors", "", re.compile(r"(.+)\.lora_(a|b)", re.ASCII), transposed=True)


def peft_name(name: str, layout: Layout) -> str:
    """Return PEFT's name for the tensor of this name, which `check_tensors` has accepted."""
    match = layout.name.fullmatch(name.removeprefix(layout.prefix))
    return f"{PEFT.prefix}{match[1]}.lora_{match[2].upper()}.weight" if match else name
