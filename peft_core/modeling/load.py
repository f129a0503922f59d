"""Loading of a base model: mapped from its files with frozen layers, or loaded completely by transformers.

Three steps, from the inside out: layers whose weights stay in their stored form (`FrozenLinear`, `FrozenEmbedding`), a model
made of them (`load_mapped`), and the choice that a compute plan makes (`load_planned`).

T tokens (all leading axes), I input features, O output features
"""

from __future__ import annotations

from collections.abc import Mapping
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
from peft_core.base_models.layouts import expected_shapes, not_the_weights
from peft_core.errors import BaseCheckpointError
from peft_core.modeling.device import DevicePlan
from peft_core.modeling.ggml import SUPPORTED
from peft_core.modeling.quantised import Bf16Matrix, FrozenMatrix, QuantisedMatrix, open_stored
from peft_core.schemas.base_model import Base
from peft_core.schemas.task import ComputePlan

_log = structlog.get_logger(__name__)

# --- Layers whose weights stay in their stored form ---


class FrozenLinear(nn.Linear):
    """y = W x + bias. `weight` has the shape and device of W for code that inspects it, and occupies no memory."""

    def __init__(self, stored: FrozenMatrix, bias_O: torch.Tensor | None) -> None:
        super().__init__(stored.shape[1], stored.shape[0], bias=False, device="meta")
        self.stored = stored
        self.weight = _placeholder(stored)
        if bias_O is not None:
            self.bias = nn.Parameter(bias_O, requires_grad=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 -- torch's name
        out: torch.Tensor = _Product.apply(input, self.stored, self.bias)
        return out


class FrozenEmbedding(nn.Embedding):
    """An embedding table in its stored form."""

    def __init__(self, stored: FrozenMatrix) -> None:
        super().__init__(*stored.shape, device="meta")
        self.stored = stored
        self.weight = _placeholder(stored)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 -- torch's name
        return self.stored.select(input.flatten()).view(*input.shape, -1)


class _Product(torch.autograd.Function):
    """Dequantises W again in the backward pass: autograd would keep every matrix in float32 until then."""

    @staticmethod
    def forward(ctx: Any, x_TI: torch.Tensor, stored: FrozenMatrix, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.stored = stored
        return stored.matmul(x_TI.reshape(-1, x_TI.shape[-1]), bias_O).view(*x_TI.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad_TO: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        grad_TI = ctx.stored.matmul_t(grad_TO.reshape(-1, grad_TO.shape[-1]))
        return grad_TI.view(*grad_TO.shape[:-1], -1), None, None


def matrix_of(layer: nn.Linear) -> FrozenMatrix:
    """Return the weights of a frozen layer of either kind. Weights held in bf16 are multiplied in bf16."""
    if isinstance(layer, FrozenLinear):
        return layer.stored
    return (
        Bf16Matrix(layer.weight) if layer.weight.dtype == torch.bfloat16 else QuantisedMatrix.from_tensor(layer.weight)
    )


def move(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    """Move a base model to a device, stored matrices included. A matrix that two layers share stays shared."""
    moved: dict[int, FrozenMatrix] = {}
    for module in model.modules():
        if isinstance(module, FrozenLinear | FrozenEmbedding) and module.stored.device != device:
            key = id(module.stored)
            if key not in moved:
                moved[key] = module.stored.to_device(device)
            module.stored, module.weight = moved[key], _placeholder(moved[key])
    model.to(device)  # type: ignore[arg-type]  # a decorator hides the signature
    return model


def _placeholder(stored: FrozenMatrix) -> nn.Parameter:
    return nn.Parameter(torch.zeros((), device=stored.device).expand(stored.shape), requires_grad=False)


# --- A model whose weights stay in its files ---


def load_mapped(base: Base, directory: Path, *, in_bfloat16: bool = False) -> PreTrainedModel | None:
    """Load a base model whose matrices are those of its own files, memory-mapped; a GGUF's stay quantised if that is common.

    `directory`: the base model as a Hugging Face directory, for its configuration. `in_bfloat16`: for products in bf16, which
    copies matrices that are stored in another format.

    Returns None if the model has weights that are neither linear layers, embeddings nor vectors, or if it cannot be mapped:
    `load_base` then loads it.
    """
    refuse_adapter(directory)
    try:
        checkpoint = read_checkpoint(base.path)
        if any(tensor.dtype not in SUPPORTED for _, tensor in checkpoint.stored):
            checkpoint = read_checkpoint(directory)  # a rarer quantisation: its conversion is mapped, in float32
        matrices, vectors = open_stored(checkpoint)
    except BaseCheckpointError as error:
        _log.info("base_not_mapped", reason=error.message)
        return None
    frozen: dict[str, FrozenMatrix] = dict(matrices)
    if in_bfloat16:
        frozen = {name: matrix.to_bf16() for name, matrix in matrices.items()}
    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        config.tie_word_embeddings = checkpoint.config["tie_word_embeddings"]  # false if the file has a head of its own
        with no_init_weights():  # uninitialised pages occupy no memory
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        _log.info("base_not_mapped", reason=str(error))
        return None
    if not _insert_weights(model, frozen, vectors):
        _log.info("base_not_mapped", reason="it has weights of other kinds", model=type(model).__name__)
        return None
    model.requires_grad_(requires_grad=False)
    _log.info(
        "base_mapped",
        formats=sorted({matrix.kind for matrix in frozen.values()}),
        megabytes=round(sum(matrix.nbytes for matrix in frozen.values()) / 1e6),
        matrices=len(frozen),
    )
    model.eval()
    return model


def _insert_weights(
    model: PreTrainedModel, matrices: Mapping[str, FrozenMatrix], vectors: Mapping[str, torch.Tensor]
) -> bool:
    """Replace the model's layers by frozen ones, and copy the vectors.

    Return False if a weight is missing, does not fit, or is not one of the model's.
    """
    matrices = dict(matrices)
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
    parameters = {name for name, _ in model.named_parameters()}
    if any(name.removesuffix(".weight") not in layers and name not in vectors for name in parameters):
        return False
    if any(name not in parameters and name.removesuffix(".weight") not in layers for name in (*matrices, *vectors)):
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


# --- A model as transformers loads it ---


def load_base(directory: Path, weights: torch.dtype) -> PreTrainedModel:
    """Load a Hugging Face model directory, frozen, on the CPU; memory-mapped if the file's type is `weights`.

    Raises:
        BaseCheckpointError: unreadable, an architecture that transformers supports only with remote code, or an adapter.
    """
    if expected_shapes(read_checkpoint(directory).config) is None:  # otherwise it has compared them
        check_weights(directory)  # before memory is allocated for weights that no file has
    return _load(directory, dtype=weights)


def check_weights(directory: Path) -> None:
    """Check that a model directory has exactly the weights of its class, without reading them.

    Raises:
        BaseCheckpointError: a weight is missing, unknown or has another shape, or the model cannot be built.
    """
    _load(directory, device_map="meta")


def _load(directory: Path, **options: Any) -> PreTrainedModel:
    """Load a model directory with transformers, which only logs a warning if its weights are not those of the model."""
    refuse_adapter(directory)
    transformers_logging.disable_progress_bar()  # a bar redrawn in a log file is noise
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(  # annotated without `output_loading_info`
            directory,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the others
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _cannot_load(error) from error
    model: PreTrainedModel
    found: dict[str, Any]
    model, found = loaded
    # A model that ignores a tensor on purpose, such as the layers for predicting several tokens, does not report it.
    mismatched = {name: (tuple(stored), tuple(wanted)) for name, stored, wanted in found["mismatched_keys"]}
    missing, unknown = (sorted(found[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
    if missing or unknown or mismatched:
        raise not_the_weights(directory, type(model).__name__, missing, unknown, mismatched)
    if found["error_msgs"]:
        raise unusable(directory, f"its weights cannot be loaded ({found['error_msgs'][0]})", "Download it again")
    model.requires_grad_(requires_grad=False)
    return model


def not_finite(path: Path) -> BaseCheckpointError:
    """Return the error for a base model whose outputs are NaN or Inf."""
    return unusable(
        path,
        "its outputs are NaN or Inf: its weights are damaged, or were saved in a number format that they exceed",
        "Download it again, or use a version of it in bfloat16 or float32",
    )


def _cannot_load(error: Exception) -> BaseCheckpointError:
    # transformers would advise to run the code in the model's repository.
    problem = (
        "its model code is part of its repository, and such code is never run here"
        if "trust_remote_code" in str(error)
        else str(error)
    )
    return BaseCheckpointError(
        f"The base model cannot be loaded: {problem}",
        suggestions=["Use a causal language model that transformers supports without remote code."],
    )


# --- A model as a compute plan asks for it ---


def load_planned(
    base: Base, directory: Path, compute_plan: ComputePlan, device_plan: DevicePlan
) -> tuple[PreTrainedModel, ComputePlan]:
    """Load the frozen base model on the CPU as planned, and return it with the plan that was actually followed.

    A model that cannot be mapped is loaded by `load_base`. On an accelerator the device's own formats decide. In the families
    of `FAMILIES` only the weights are in 16 bits there; hidden states are float32, as on a CPU, so that blocks can be fused.

    Raises:
        BaseCheckpointError: as `load_base`.
    """
    unmapped = compute_plan.model_copy(update={"weights": str(device_plan.weights).removeprefix("torch.")})
    on_accelerator = device_plan.device != "cpu"
    if on_accelerator:
        compute_plan = unmapped
    if compute_plan.weights == "float32" or (on_accelerator and base.model_type not in FAMILIES):
        return load_base(directory, device_plan.weights), unmapped
    mapped = load_mapped(base, directory, in_bfloat16=compute_plan.weights == "bfloat16")
    if mapped is not None:
        return mapped, compute_plan
    _log.warning("base_not_mapped", planned=compute_plan.weights, model_type=base.model_type)
    return load_base(directory, device_plan.weights), unmapped
