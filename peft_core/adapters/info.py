"""Describe an adapter from its configuration and, if it has one, its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from peft_core.adapters.manifest import CARD_NAME, REPORT_NAME, Manifest, read_manifest
from peft_core.adapters.registry import size_of
from peft_core.base_models.hub_cache import blob_of
from peft_core.errors import AdapterNotFound, HeaderError
from peft_core.schemas.evaluation import Verdict
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.staleness import Staleness
from peft_core.system.files import read_small

MAX_CARD_BYTES = 256 << 10
_MAX_TARGETS = 100  # that are read from the names of weights
_VERDICT_TEXT = {
    Verdict.HELPS: "the adapter helps",
    Verdict.NO_DIFFERENCE: "no difference was found",
    Verdict.HARMS: "the adapter HARMS, do not use it",
}


class AdapterInfo(FrozenModel):
    adapter_path: str
    adapter_bytes: int
    rank: int | None
    alpha: float | None
    target_modules: list[str]
    manifest: Manifest | None = Field(
        None, description="Base model, data, run and measurements; null if the adapter was not trained here."
    )
    staleness: Staleness | None = Field(None, description="How far the code has moved on since the training.")
    report_path: str | None = Field(
        None, description="HTML report with loss curves, confidence intervals and examples."
    )
    next: str


class AdapterDocument(FrozenModel):
    """The manifest and model card of an adapter."""

    adapter_path: str
    manifest: Manifest | None
    card: str | None = Field(description="Markdown.")


def read_document(path: Path) -> AdapterDocument:
    """Return the manifest and the model card of an adapter; each is None if it is missing or unreadable."""
    try:
        card = read_small(blob_of(path / CARD_NAME), MAX_CARD_BYTES).decode("utf-8", "replace")
    except HeaderError:
        card = None
    return AdapterDocument(adapter_path=str(path), manifest=read_manifest(path), card=card)


def read_info(path: Path, *, trained_here: bool = True) -> AdapterInfo:
    """Describe an adapter from its configuration and the names of its weights.

    Args:
        path: The adapter's directory.
        trained_here: Whether this installation wrote the manifest, so that it can be trusted.

    Raises:
        AdapterNotFound: the directory contains no adapter.
        HeaderError: its configuration is not a readable JSON object.
    """
    # These imports would slow the server's start.
    from peft_core.adapters.config_check import is_alpha, is_rank  # noqa: PLC0415
    from peft_core.adapters.directory import explain, is_adapter, layout_of  # noqa: PLC0415
    from peft_core.adapters.files import read_adapter_config  # noqa: PLC0415
    from peft_core.adapters.layout import MLX  # noqa: PLC0415

    if not is_adapter(path):
        found = explain(path)
        problem = f"{path} is not an adapter: {found.problem}" if found.code != "missing_file" else found.problem
        raise AdapterNotFound(problem, suggestions=[found.fix, "Call list_adapters to see the adapters trained here"])
    config, layout = read_adapter_config(path), layout_of(path)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if layout is MLX:  # its scale is alpha / rank
        parameters = config.get("lora_parameters")
        rank, scale = (
            (parameters.get("rank"), parameters.get("scale")) if isinstance(parameters, dict) else (None, None)
        )
        alpha = scale * rank if is_rank(rank) and is_alpha(scale) else None
    manifest = read_manifest(path)
    return AdapterInfo(
        adapter_path=str(path),
        adapter_bytes=size_of(blob_of(path / layout.weights)),
        rank=rank if is_rank(rank) else None,
        alpha=float(alpha) if is_alpha(alpha) else None,
        target_modules=_target_modules(path, config),
        manifest=manifest if trained_here else None,  # a foreign manifest is up to 1 MB of untrusted text
        report_path=str(path / REPORT_NAME) if trained_here and (path / REPORT_NAME).is_file() else None,
        next=f"{'It has the format of mlx-lm. ' if layout is MLX else ''}{_next(manifest, trained_here=trained_here)}",
    )


def _target_modules(path: Path, config: dict[str, Any]) -> list[str]:
    """Return the literal targets in the configuration, or else what the modules with weights are called in each layer."""
    from peft_core.adapters.config_check import is_literal  # noqa: PLC0415 -- see read_info
    from peft_core.adapters.files import read_adapter  # noqa: PLC0415 -- see read_info

    targets = config.get("target_modules")
    if isinstance(targets, list) and targets:
        return [name for name in targets if is_literal(name)]
    files = read_adapter(path)
    modules = {
        match[1]
        for name in files.tensors or ()
        if (match := files.layout.name.fullmatch(name.removeprefix(files.layout.prefix)))
    }
    parts = sorted({module.rpartition(".")[2] for module in modules})
    return [part for part in parts if is_literal(part)][:_MAX_TARGETS]


def _next(manifest: Manifest | None, *, trained_here: bool) -> str:
    if manifest is None:
        return "This adapter has no manifest: it was not trained here, and its effect is unknown."
    base, adapter = manifest.metrics.base_perplexity, manifest.metrics.adapter_perplexity
    if base is None or adapter is None:
        return "This adapter was not evaluated on held-out files."
    if not trained_here:
        return (
            f"Its manifest claims that perplexity on held-out files is {base:.2f} with the base model and {adapter:.2f} with "
            "the adapter. The adapter was not trained here, so this claim cannot be checked."
        )
    measured = f"Perplexity on held-out files is {base:.2f} with the base model and {adapter:.2f} with the adapter"
    if manifest.evaluation is None:
        return f"{measured}."
    return f"{measured}: {_VERDICT_TEXT[manifest.evaluation.verdict]}, as {manifest.evaluation.reason}."
