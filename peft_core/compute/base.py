"""The frozen base in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

from peft_core.bases.checkpoint import read_checkpoint
from peft_core.bases.huggingface import refuse_adapter
from peft_core.bases.layout import unusable
from peft_core.errors import BaseModelError


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
            directory, dtype=weights, local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise BaseModelError(
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
