"""Describe an adapter from its configuration and, if it has one, its manifest."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from peft_core.adapters.manifest import CARD_NAME, CONFIG, REPORT_NAME, WEIGHTS, Manifest, read_manifest
from peft_core.adapters.registry import size_of
from peft_core.errors import AdapterNotFound, HeaderError
from peft_core.schemas.evaluation import Verdict
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.files import read_small

MAX_CARD_BYTES = 256 << 10
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
        card = read_small(path / CARD_NAME, MAX_CARD_BYTES).decode("utf-8", "replace")
    except HeaderError:
        card = None
    return AdapterDocument(adapter_path=str(path), manifest=read_manifest(path), card=card)


def read_info(path: Path, *, trained_here: bool = True) -> AdapterInfo:
    """Describe an adapter without opening its weights.

    Args:
        path: The adapter's directory.
        trained_here: Whether this installation wrote the manifest, so that it can be trusted.

    Raises:
        AdapterNotFound: the directory contains no adapter.
        HeaderError: its configuration is not a readable JSON object.
    """
    if not (os.path.lexists(path / WEIGHTS) and os.path.lexists(path / CONFIG)):
        raise AdapterNotFound(
            f"{path} is not an adapter: the directory must contain {CONFIG} and {WEIGHTS}.",
            suggestions=["Call list_adapters to see the existing adapters"],
        )
    # These imports would slow the server's start.
    from peft_core.adapters.config_check import is_alpha, is_literal, is_rank  # noqa: PLC0415
    from peft_core.adapters.files import read_adapter_config  # noqa: PLC0415

    config = read_adapter_config(path)
    targets = config.get("target_modules")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    manifest = read_manifest(path)
    return AdapterInfo(
        adapter_path=str(path),
        adapter_bytes=size_of(path / WEIGHTS),
        rank=rank if is_rank(rank) else None,
        alpha=float(alpha) if is_alpha(alpha) else None,
        target_modules=[name for name in targets if is_literal(name)] if isinstance(targets, list) else [],
        manifest=manifest if trained_here else None,  # a foreign manifest is up to 1 MB of untrusted text
        report_path=str(path / REPORT_NAME) if trained_here and (path / REPORT_NAME).is_file() else None,
        next=_next(manifest, trained_here=trained_here),
    )


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
