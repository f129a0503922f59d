"""The matrices of an adapter in float32, with everything that gives them their meaning.

R rank, I input features, O output features
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peft_core.adapters.config_check import LoraSettings
from peft_core.adapters.files import AdapterFiles
from peft_core.adapters.layout import PEFT
from peft_core.modeling.adapter_model import tensors_of

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class LoraPair:
    """One module's matrices: the adapter adds scale * B @ A to its weight."""

    a_RI: Array
    b_OR: Array
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a_RI.shape[0])

    def folded(self, remaining: float = 1.0) -> Array:
        """Return B with the scale in it, except for a factor that the reader of the file applies."""
        return np.asarray(self.b_OR * np.float32(self.scale / remaining), dtype=np.float32)

    def delta(self, first: int, last: int) -> Array:
        """Return rows `first` to `last` of the update scale * B @ A."""
        return np.asarray(self.folded()[first:last] @ self.a_RI, dtype=np.float32)

    def padded(self, rank: int) -> tuple[Array, Array]:
        """Return A and the folded B with this rank: the additional rows and columns are zero."""
        more = rank - self.rank
        return np.pad(self.a_RI, ((0, more), (0, 0))), np.pad(self.folded(), ((0, 0), (0, more)))


@dataclass(frozen=True, eq=False)
class Lora:
    """A verified adapter in memory."""

    settings: LoraSettings
    tensors: Mapping[str, torch.Tensor]  # under PEFT's names
    pairs: Mapping[str, LoraPair]  # by module, sorted

    @property
    def rank(self) -> int:
        return max(pair.rank for pair in self.pairs.values())

    @property
    def modules(self) -> list[str]:
        return list(self.pairs)


def read_lora(files: AdapterFiles) -> Lora:
    """Return the matrices of an adapter that `verify_files` has accepted, from the very bytes that it has read."""
    settings, tensors = files.settings, tensors_of(files)
    assert settings is not None  # noqa: S101 -- a caller's mistake: the adapter was not verified
    a_suffix = ".lora_A.weight"
    pairs = {}
    for key in sorted(tensors):
        if key.endswith(a_suffix):
            stem = key.removesuffix(a_suffix)
            module = stem.removeprefix(PEFT.prefix)
            a_RI, b_OR = (tensors[f"{stem}.lora_{half}.weight"].float().numpy() for half in "AB")
            pairs[module] = LoraPair(a_RI, b_OR, settings.scale_of(module, len(a_RI)))
    return Lora(settings, tensors, pairs)
