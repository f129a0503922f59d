"""Layers whose weights stay in their stored form, and a base made of them.

T tokens (all leading axes), I input features, O output features
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from peft_core.base_models.checkpoint import read_checkpoint
from peft_core.base_models.checkpoint_info import unusable
from peft_core.base_models.families import FAMILIES
from peft_core.base_models.huggingface import refuse_adapter
from peft_core.errors import BaseCheckpointError
from peft_core.modeling.device import DevicePlan
from peft_core.modeling.quantised import QuantisedMatrix, StoredWeights, open_stored
from peft_core.schemas.base_model import Base
from peft_core.schemas.task import ComputePlan

_log = structlog.get_logger(__name__)


class FrozenLinear(nn.Linear):
    """y = W x + bias. `weight` has W's shape and type for whoever asks, and no memory."""

    def __init__(self, stored: QuantisedMatrix, bias_O: torch.Tensor | None) -> None:
        super().__init__(stored.shape[1], stored.shape[0], bias=False, device="meta")
        self.stored = stored
        self.weight = _placeholder(stored)
        if bias_O is not None:
            self.bias = nn.Parameter(bias_O, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 -- torch's name
        out: torch.Tensor = _Product.apply(input, self.stored, self.bias)
        return out


class FrozenEmbedding(nn.Embedding):
    """Rows of a stored table."""

    def __init__(self, stored: QuantisedMatrix) -> None:
        super().__init__(*stored.shape, device="meta")
        self.stored = stored
        self.weight = _placeholder(stored)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 -- torch's name
        return self.stored.select(input.flatten()).view(*input.shape, -1)


class _Product(torch.autograd.Function):
    """What backward needs of W it reads again: autograd would keep all of them in float32."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, stored: QuantisedMatrix, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.stored = stored
        return stored.times(x_TI.reshape(-1, x_TI.shape[-1]), bias_O).view(*x_TI.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad_TI = ctx.stored.matmul_t(grad_TO.reshape(-1, grad_TO.shape[-1]))
        return grad_TI.view(*grad_TO.shape[:-1], -1), None, None


def matrix_of(layer: nn.Linear) -> QuantisedMatrix:
    """The weights of a frozen layer, whichever kind it is. A model held in bfloat16 is computed in it."""
    if isinstance(layer, FrozenLinear):
        return layer.stored
    return replace(QuantisedMatrix.of(layer.weight), in_bfloat16=layer.weight.dtype == torch.bfloat16)


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """A base on its device, stored matrices too; what two layers share stays one."""
    moved: dict[int, QuantisedMatrix] = {}
    for module in model.modules():
        if isinstance(module, FrozenLinear | FrozenEmbedding) and module.stored.blocks.device != device:
            key = id(module.stored)
            if key not in moved:
                moved[key] = module.stored.on(device)
            module.stored, module.weight = moved[key], _placeholder(moved[key])
    model.to(device)  # type: ignore[arg-type]  # a decorator hides the signature
    return model


def load_frozen(base: Base, directory: Path, *, in_bfloat16: bool = False) -> PreTrainedModel | None:
    """A base whose matrices are those of its own files, mapped: a GGUF's as they are, quantised.

    `in_bfloat16`: copied to memory, for products in bfloat16.

    `directory` is the base as a Hugging Face directory, for the configuration. None where the model has weights that are
    neither linear layers, embeddings nor vectors, or is of a kind that is not read here: load it as a whole then.
    """
    refuse_adapter(directory)
    try:
        stored = open_stored(read_checkpoint(base.path))
    except BaseCheckpointError as error:
        _log.info("base_not_mapped", reason=error.message)
        return None
    if in_bfloat16:
        stored = stored._replace(matrices={name: matrix.rounded() for name, matrix in stored.matrices.items()})
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        with no_init_weights():  # memory that nobody writes to is none
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        _log.info("base_not_mapped", reason=str(error))
        return None
    if not _put_in(model, stored):
        _log.info("base_not_mapped", reason="it has weights of other kinds", model=type(model).__name__)
        return None
    model.requires_grad_(requires_grad=False)
    _log.info(
        "base_mapped",
        formats=sorted({str(matrix.kind) for matrix in stored.matrices.values()}),
        megabytes=round(sum(matrix.nbytes for matrix in stored.matrices.values()) / 1e6),
        matrices=len(stored.matrices),
    )
    model.eval()
    return model


def _put_in(model: PreTrainedModel, stored: StoredWeights) -> bool:
    """Fill the model with the stored weights, where all of it can be."""
    matrices, vectors = dict(stored.matrices), stored.vectors
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings:
        names = {module: name for name, module in model.named_modules()}
        if tied := matrices.get(f"{names[embedding]}.weight"):
            matrices[f"{names[head]}.weight"] = tied
    modules = dict(model.named_modules())
    layers = {name: module for name, module in modules.items() if type(module) in (nn.Linear, nn.Embedding) and name}
    for name, layer in layers.items():
        matrix = matrices.get(f"{name}.weight")
        if matrix is None or matrix.shape != tuple(layer.weight.shape):
            return False
    if any(name.removesuffix(".weight") not in layers and name not in vectors for name, _ in model.named_parameters()):
        return False
    for name, layer in layers.items():
        matrix = matrices[f"{name}.weight"]
        frozen = (
            FrozenLinear(matrix, vectors.get(f"{name}.bias"))
            if isinstance(layer, nn.Linear)
            else FrozenEmbedding(matrix)
        )
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, frozen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in vectors:
                parameter.copy_(vectors[name])
    return True


def _placeholder(stored: QuantisedMatrix) -> nn.Parameter:
    return nn.Parameter(torch.zeros((), device=stored.blocks.device).expand(stored.shape), requires_grad=False)


# FOLDED FROM peft_core.modeling.load: The frozen base in memory.


def load_base(directory: Path, weights: torch.dtype) -> PreTrainedModel:
    """Load a Hugging Face model directory, frozen, on the CPU; memory-mapped where the file's type is `weights`.

    Raises:
        BaseModelError: unreadable, an architecture that this transformers does not know by itself, or an adapter in it.
    """
    refuse_adapter(directory)
    transformers_logging.disable_progress_bar()  # a bar redrawn in a log file is noise
    try:
        _require_weights_for_all(directory)
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=weights,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseCheckpointError(
            f"The base model cannot be loaded: {error}",
            suggestions=["Use a causal language model that transformers supports without remote code."],
        ) from error
    loaded: PreTrainedModel = model
    loaded.requires_grad_(requires_grad=False)
    return loaded


def _require_weights_for_all(directory: Path) -> None:
    """That the configuration describes no more than the weights hold: the rest would be made up, in any amount of memory."""
    config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"), no_init_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    described = sum(parameter.numel() for parameter in model.parameters())
    stored = read_checkpoint(directory).shape.parameters
    if described > stored:
        problem = f"its configuration describes {described} parameters, its weights hold {stored}"
        raise unusable(directory, problem, "Fetch it again")


# FOLDED FROM peft_core.modeling.load: The frozen base as a run was planned to hold it.


def load_planned(
    base: Base,
    directory: Path,
    way: ComputePlan,
    plan: DevicePlan,
) -> tuple[PreTrainedModel, ComputePlan]:
    """The frozen base on the CPU, in the way that was planned or as a whole where it cannot be had so; and how it is.

    On an accelerator the device's own formats decide. Of most families weights alone are in 16 bits there: what flows between
    layers is float32, as on a CPU, and so they have the same fused blocks.

    Raises:
        BaseModelError: as `load_base`.
    """
    whole = way.model_copy(update={"weights": str(plan.weights).removeprefix("torch.")})
    if plan.device != "cpu":
        way = whole
    if way.weights == "float32" or (plan.device != "cpu" and base.model_type not in FAMILIES):
        return load_base(directory, plan.weights), whole
    frozen = load_frozen(base, directory, in_bfloat16=way.weights == "bfloat16")
    if frozen is not None:
        return frozen, way
    _log.warning("base_loaded_whole", planned=way.weights, model_type=base.model_type)
    return load_base(directory, plan.weights), whole
