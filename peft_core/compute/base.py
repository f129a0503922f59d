"""The frozen base in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from peft_core.bases.huggingface import refuse_adapter
from peft_core.errors import BaseModelError


def load_base(directory: Path, weights: torch.dtype) -> PreTrainedModel:
    """Load a Hugging Face model directory, frozen, on the CPU; memory-mapped where the file's type is `weights`.

    Raises:
        BaseModelError: unreadable, an architecture that this transformers does not know by itself, or an adapter in it.
    """
    refuse_adapter(directory)
    transformers_logging.disable_progress_bar()  # a bar redrawn in a log file is noise
    try:
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
