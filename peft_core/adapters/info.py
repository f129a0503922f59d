"""What is known of an adapter: our manifest where there is one, the bare configuration otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field

from peft_core.adapters.manifest import Manifest, read_manifest
from peft_core.adapters.registry import WEIGHTS_NAME
from peft_core.errors import AdapterNotFound, InvalidArgument
from peft_core.spec import Frozen

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 256 << 10


class AdapterInfo(Frozen):
    adapter_path: str
    adapter_bytes: int
    rank: int | None
    alpha: float | None
    target_modules: list[str]
    manifest: Manifest | None = Field(
        None, description="Base, data, run and measurements. Null: not trained by peft-mcp."
    )
    next: str


def read_info(path: Path) -> AdapterInfo:
    """Reads configuration and manifest; the weights are not opened.

    Raises:
        AdapterNotFound: the directory holds no adapter.
        InvalidArgument: its configuration is not a readable JSON object.
    """
    weights, config_file = path / WEIGHTS_NAME, path / CONFIG_NAME
    if not (weights.is_file() and config_file.is_file()):
        raise AdapterNotFound(
            f"{path} holds no adapter: {CONFIG_NAME} and {WEIGHTS_NAME} are expected there.",
            suggestions=["Call list_adapters to see what there is"],
        )
    config = _read_config(config_file)
    targets = config.get("target_modules")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    manifest = read_manifest(path)
    return AdapterInfo(
        adapter_path=str(path),
        adapter_bytes=weights.stat().st_size,
        rank=rank if isinstance(rank, int) else None,
        alpha=float(alpha) if isinstance(alpha, int | float) else None,
        target_modules=[str(name) for name in targets] if isinstance(targets, list) else [],
        manifest=manifest,
        next=_next(manifest),
    )


def _read_config(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise InvalidArgument(
            "adapter_path", str(path), f"{CONFIG_NAME} has {size} bytes; at most {MAX_CONFIG_BYTES} are sensible"
        )
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("adapter_path", str(path), f"{CONFIG_NAME} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise InvalidArgument("adapter_path", str(path), f"{CONFIG_NAME} must be a JSON object")
    return config


def _next(manifest: Manifest | None) -> str:
    if manifest is None:
        return "This adapter was not trained here: nothing is known of how it was measured."
    base, adapter = manifest.metrics.base_perplexity, manifest.metrics.adapter_perplexity
    if base is None or adapter is None:
        return "It was not measured on held-out files."
    verdict = (
        "lower is better, so it helps" if adapter < base else "lower is better, so it does NOT help: do not use it"
    )
    return f"On files it never saw, perplexity went from {base:.2f} (base) to {adapter:.2f} (adapter): {verdict}."
