"""Write an adapter as a directory: PEFT's format reduced to what every server reads, mlx-lm's format, or for the Hub."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from peft_core.adapters.card import hub_id, render_card
from peft_core.adapters.layout import MLX, PEFT
from peft_core.adapters.manifest import CARD_NAME, CONFIG, WEIGHTS
from peft_core.errors import ExportError, sanitize
from peft_core.export.worker.job import Job
from peft_core.llamacpp.worker.lora_pairs import Array

_LAYER = re.compile(r"model\.layers\.\d+\.", re.ASCII)


def write_normalised(job: Job) -> None:
    """Write PEFT's format with one rank, lora_alpha = r, no rsLoRA and no patterns: the scale of each module is in its B.

    Servers differ in which of these settings they read. SGLang divides lora_alpha by r whatever the others say, and Ollama
    parses lora_alpha as an integer.
    """
    rank = job.lora.rank
    tensors = {}
    for module, pair in job.lora.pairs.items():
        for half, array in zip("AB", pair.padded(rank), strict=True):
            tensors[f"{PEFT.prefix}{module}.lora_{half}.weight"] = _tensor(array)
    save_file(tensors, job.directory / WEIGHTS, metadata={"format": "pt"})
    _write_json(job.directory / CONFIG, _peft_config(job, rank, rank, {}))


def write_for_hub(job: Job) -> None:
    """Write the adapter as it was trained, with a model card, and without paths, code or records of this machine."""
    settings = job.lora.settings
    save_file(dict(job.lora.tensors), job.directory / WEIGHTS, metadata={"format": "pt"})
    ranks = {module: pair.rank for module, pair in job.lora.pairs.items()}
    alphas = {module: settings.alpha_of(module) for module in ranks}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    patterns = {
        "use_rslora": settings.use_rslora,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "alpha_pattern": {module: _plain(value) for module, value in alphas.items() if value != alpha},
    }
    _write_json(job.directory / CONFIG, _peft_config(job, rank, _plain(alpha), patterns))
    (job.directory / CARD_NAME).write_text(_card(job), encoding="utf-8")


def write_mlx(job: Job) -> None:
    """Write mlx-lm's format: A and B transposed, one rank and one scale for all modules, so that the scales are in B.

    Raises:
        ExportError: mlx-lm has no layers under these names.
    """
    other = [module for module in job.lora.pairs if not _LAYER.match(module)]
    if other:
        raise ExportError(
            f"mlx-lm adapts modules in model.layers only, not {sanitize(other[0])}.", code="export_unsupported"
        )
    rank = job.lora.rank
    tensors = {}
    for module, pair in job.lora.pairs.items():
        for half, array in zip("ab", pair.padded(rank), strict=True):
            tensors[f"{module}.lora_{half}"] = _tensor(array.T)
    save_file(tensors, job.directory / MLX.weights, metadata={"format": "mlx"})
    keys = sorted({_LAYER.sub("", module) for module in job.lora.pairs})
    parameters = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
    # num_layers counts from the last layer; a layer without weights in the file has an adapter of zeros.
    config = {"fine_tune_type": "lora", "num_layers": job.base.shape.layers, "lora_parameters": parameters}
    _write_json(job.directory / CONFIG, config)


def _peft_config(job: Job, rank: int, alpha: float, more: dict[str, Any]) -> dict[str, Any]:
    modules = job.lora.modules
    ends = sorted({module.rpartition(".")[2] for module in modules})
    # A short name stands for all modules that end with it, so it is used only if every layer has all of them.
    counts = Counter(module.rpartition(".")[2] for module in modules)
    everywhere = all(count == job.base.shape.layers for count in counts.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": sanitize(job.base.name),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": ends if everywhere else modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        **more,
    }


def _card(job: Job) -> str:
    """Return the model card: of the training, if it is recorded."""
    if job.files.manifest is not None:
        with suppress(ValueError):  # a manifest that was not written by a training
            return render_card(job.files.manifest)
    base = sanitize(job.base.name)
    known = f"base_model: {json.dumps(base)}\n" if hub_id(base) is not None else ""
    return (
        f"---\n{known}library_name: peft\npipeline_tag: text-generation\ntags:\n- lora\n---\n\n"
        f"# A LoRA adapter for {base}\n\nRank {job.lora.rank}, on {len(job.lora.pairs)} modules. How it was trained is not "
        "recorded.\n"
    )


def _plain(number: float) -> float:
    return int(number) if number == int(number) else number


def _tensor(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
