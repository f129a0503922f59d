"""A base model in memory with adapters on it. The only file that loads adapters through PEFT, and works around its traps.

T tokens, V vocabulary
"""

from __future__ import annotations

import gc
import itertools
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load as load_tensors
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peft_core.adapters.config_check import LoraSettings
from peft_core.adapters.files import AdapterFiles
from peft_core.adapters.layout import PEFT, peft_name
from peft_core.base_models.families import END_TOKENS
from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer, require_rows
from peft_core.errors import InferenceError
from peft_core.modeling.device import DevicePlan
from peft_core.modeling.load import load_base, not_finite
from peft_core.modeling.memory import return_freed_memory
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import LoadCheck

# Any text that is long enough for every module to have an effect.
PROBE = 'def read(path: str) -> list[str]:\n    """Lines of a file."""\n    with open(path) as file:\n        return'
_PROBE_TOKENS = 24


class BaseCorrupted(Exception):
    """The base model in this process is damaged; the process must exit."""


_names = (f"adapter_{number}" for number in itertools.count())  # PEFT mishandles dots and its own attribute names


@dataclass
class ResidentModel:
    """A base model and its adapters. None is ever merged into it: removing an adapter restores the base bit for bit."""

    base: Base
    tokenizer: BaseTokenizer
    ends: tuple[int, ...]  # tokens that end an answer
    causal: PreTrainedModel  # PEFT replaces its linear layers in place, and restores them
    probe_1T: torch.Tensor
    base_logits_TV: torch.Tensor  # for the probe
    _wrapped: Any = None  # a PeftModel while there is an adapter; its methods carry no types
    _adapters: set[str] = field(default_factory=set)
    _selected: tuple[str | None] | None = None  # the adapter that PEFT uses, or (None,) for the base; None: unknown

    @classmethod
    def load(cls, base: Base, directory: Path, plan: DevicePlan) -> ResidentModel:
        """Load a Hugging Face model directory onto its device.

        Raises:
            BaseCheckpointError: it cannot be loaded, or its outputs are NaN or Inf.
        """
        # kill-point: inference worker, load_adapter: the base model is about to be loaded
        tokenizer = load_tokenizer(directory)
        require_rows(tokenizer, base)
        causal = load_base(directory, plan.weights)
        # kill-point: inference worker, load_adapter: the base model is loaded
        causal.to(torch.device(plan.device)).eval()  # type: ignore[arg-type]  # a decorator hides the signature
        ends = _end_tokens(causal, tokenizer)
        # The base model's own defaults (sampling, repetition penalties) would override those of a request.
        causal.generation_config = GenerationConfig(eos_token_id=list(ends), pad_token_id=ends[0])
        probe_1T = torch.tensor([tokenizer.ids(PROBE)[:_PROBE_TOKENS]], device=causal.device)
        base_logits_TV = _logits(causal, probe_1T)
        if not bool(base_logits_TV.isfinite().all()):
            raise not_finite(base.path)
        return cls(
            base=base,
            tokenizer=tokenizer,
            ends=ends,
            causal=causal,
            probe_1T=probe_1T,
            base_logits_TV=base_logits_TV,
        )

    def add(self, files: AdapterFiles) -> tuple[str, LoadCheck]:
        """Add an adapter, select it and measure its effect. Returns its name in this model, and the check.

        If it fails, the adapter is removed completely and no adapter is selected.

        Args:
            files: The adapter, read with its weights and accepted by `verify_files`.

        Raises:
            InferenceError: it has no effect, not all of its tensors apply, or outputs are NaN or Inf.
        """
        assert files.settings is not None, "verify_files would have failed"  # noqa: S101 -- for the type checker
        tensors = tensors_of(files)
        # kill-point: inference worker, load_adapter: the adapter is about to be added
        name = next(_names)
        self._selected = None
        modules = _ranks(tensors)
        self._require_linear(modules)
        config = self._peft_config(files.settings, modules)
        try:
            if self._wrapped is None:
                self._wrapped = PeftModel(self.causal, config, adapter_name=name, low_cpu_mem_usage=True)
            else:
                self._wrapped.add_adapter(name, config, low_cpu_mem_usage=True)
            self._adapters.add(name)
            # PEFT replaces its float32 matrices by these as they are: 16-bit ones would compute in 16 bits.
            given = {key: tensor.to(self.causal.device, torch.float32, copy=True) for key, tensor in tensors.items()}
            # kill-point: inference worker, load_adapter: layers are wrapped, without the adapter's weights
            outcome: Any = set_peft_model_state_dict(self._wrapped, given, adapter_name=name, low_cpu_mem_usage=True)
            unmatched = len(outcome.unexpected_keys) + sum(f".{name}." in key for key in outcome.missing_keys)
            self.select(name)
            change = float((_logits(self.causal, self.probe_1T) - self.base_logits_TV).abs().max())
            # kill-point: inference worker, load_adapter: the effect is about to be checked
            require_effect(unmatched, change)
        except BaseException:
            # PEFT keeps an adapter registered that failed halfway, and it could be selected.
            self._adapters.add(name)
            self.remove(name)
            self._require_undamaged()
            raise
        return name, LoadCheck(unmatched_keys=unmatched, max_logit_change=change)

    def select(self, name: str | None) -> None:
        """Use this adapter from now on; None: the base model without an adapter."""
        if self._wrapped is None or self._selected == (name,):
            return
        may_be_disabled = self._selected in (None, (None,))
        self._selected = None  # unknown if one of these fails: each walks through all layers
        if name is None:
            self._wrapped.base_model.disable_adapter_layers()
        else:
            if may_be_disabled:
                self._wrapped.base_model.enable_adapter_layers()
            self._wrapped.set_adapter(name, inference_mode=True)  # otherwise it would require gradients
        self._selected = (name,)

    def remove(self, name: str) -> None:
        """Remove an adapter; afterwards none is selected."""
        self._adapters.discard(name)
        self._selected = None
        if self._wrapped is None:
            _unwrap(self.causal)
        elif self._adapters:
            self.select(min(self._adapters))  # else PEFT would select another one by itself, and warn
            if name in self._wrapped.peft_config:
                self._wrapped.delete_adapter(name)
            self.select(None)
        else:  # deleting the last adapter would leave layers that cannot compute
            self.causal = self._wrapped.base_model.unload()
            self._wrapped = None
            if hasattr(self.causal, "peft_config"):
                del self.causal.peft_config
        release_memory()

    def _require_linear(self, modules: Collection[str]) -> None:
        """Refuse modules that are not linear or not there: PEFT wraps layers one by one, and would fail halfway."""
        present = dict(self.causal.named_modules())
        if missing := sorted(set(modules) - present.keys()):
            raise InferenceError(
                f"The adapter is for {missing[0][:120]}, which is no module of its own in the model that transformers builds "
                f"({len(missing)} such modules). Experts, for instance, are computed together.",
                code="adapter_not_applied",
                suggestions=["Train it again without these modules"],
            )
        for name in modules:
            module = present[name]
            inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            if not isinstance(inner, nn.Linear | Conv1D):
                raise InferenceError(
                    f"The adapter is for {name[:120]}, which in this model is a {type(inner).__name__}, not a linear layer.",
                    code="adapter_not_applied",
                    suggestions=["Train it again without this target module"],
                )

    def _require_undamaged(self) -> None:
        """Raise BaseCorrupted unless the base model gives the same logits as at first, bit for bit."""
        self.select(None)
        if not torch.equal(_logits(self.causal, self.probe_1T), self.base_logits_TV):
            raise BaseCorrupted("an adapter that failed to load has changed the base model")

    def _peft_config(self, settings: LoraSettings, ranks: Mapping[str, int]) -> LoraConfig:
        """Build PEFT's configuration from verified values alone: nothing else in the adapter's file reaches PEFT.

        The targets are the full names of the modules that have weights. `ranks`: the rank of each.
        """
        alphas = {module: settings.alpha_of(module) for module in ranks}
        rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT annotates int and computes with floats
            target_modules=list(ranks),
            use_rslora=settings.use_rslora,
            # PEFT treats keys as regular expressions.
            rank_pattern={f"^{re.escape(module)}": value for module, value in ranks.items() if value != rank},
            alpha_pattern={f"^{re.escape(module)}": value for module, value in alphas.items() if value != alpha},
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in self.causal.modules()),
            inference_mode=True,
        )


def tensors_of(files: AdapterFiles) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter under PEFT's names and in PEFT's layout: A is (rank, in), B is (out, rank)."""
    assert files.weights is not None, "read_adapter(..., weights='keep') keeps them"  # noqa: S101 -- a caller's mistake
    return {
        peft_name(name, files.layout): tensor.T.contiguous() if files.layout.transposed else tensor
        for name, tensor in load_tensors(files.weights).items()
    }


def _ranks(tensors: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Return the rank of each adapted module, by its full name."""
    ending = ".lora_A.weight"
    return {
        name.removeprefix(PEFT.prefix).removesuffix(ending): tensor.shape[0]
        for name, tensor in tensors.items()
        if name.endswith(ending)
    }


def _unwrap(model: nn.Module) -> None:
    """Restore the layers that PEFT replaced before it failed to construct its model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def release_memory() -> None:
    """Return freed memory to the operating system and the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return_freed_memory()


def _logits(model: Any, ids_1T: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model(input_ids=ids_1T, use_cache=False).logits[0].float().cpu())


def require_effect(unmatched: int, change: float) -> None:
    """Refuse an adapter that does not apply completely, gives NaN or Inf, or changes nothing.

    Args:
        unmatched: tensors without a module, and modules without a tensor.
        change: the largest change of a logit, or of a log-probability, of a fixed text.

    Raises:
        InferenceError: as above.
    """
    if unmatched:
        raise InferenceError(
            f"Adapter unloaded: {unmatched} tensors do not map to a base module, or modules have no tensor.",
            code="adapter_not_applied",
            suggestions=["Call verify_adapter_compatibility to see every reason"],
        )
    if not math.isfinite(change):
        raise InferenceError(
            "Adapter unloaded: outputs contain NaN or Inf.",
            code="adapter_not_finite",
            suggestions=["Train it again, with a lower learning_rate"],
        )
    if change == 0:
        raise InferenceError(
            "Adapter unloaded: it has no effect; the logits for a test text equal the base model's.",
            code="adapter_no_effect",
            suggestions=["Train it again, with more steps"],
        )


def _end_tokens(model: PreTrainedModel, tokenizer: BaseTokenizer) -> tuple[int, ...]:
    named: Any = getattr(model.generation_config, "eos_token_id", None) or model.config.eos_token_id
    ids = named if isinstance(named, list) else [] if named is None else [named]
    known = [tokenizer.tokenizer.token_to_id(text) for text in END_TOKENS]
    return tuple(dict.fromkeys([tokenizer.end_of_text, *ids, *(token for token in known if token is not None)]))
