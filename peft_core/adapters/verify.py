"""Check an adapter against a base model from headers and configuration: no torch, milliseconds, nothing is loaded.

PEFT loads most adapters that are rejected here without a warning; they then have no effect, or a wrong one.
The parts of the check: `files`, `config_check`, `tensor_check` and `base_match`.
"""

from __future__ import annotations

import time
from pathlib import Path

from peft_core.adapters.base_match import match_base
from peft_core.adapters.files import AdapterFiles, read_adapter
from peft_core.adapters.findings import error
from peft_core.adapters.tensor_check import base_modules, check_tensors, check_weights
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import BaseMatch, Compatibility, NextStep, Reason

SMALL_BYTES = 64 << 20
_COMPATIBLE = frozenset({BaseMatch.EXACT, BaseMatch.SAMPLED, BaseMatch.SAME_FAMILY})


def verify(directory: Path, base: Base | None, *, scan_weights: bool = False) -> Compatibility:
    """Check whether the adapter in `directory` can be used with `base`, and return the verdict with all findings.

    With `scan_weights` the weights are read too (20 MB take 50 ms) and compared with the hash in the manifest.
    If `base` is None, because the adapter's own was not found, only the files are checked.

    Raises:
        BaseCheckpointError, HeaderError: the base model (not the adapter) cannot be read.
    """
    started = time.perf_counter()
    files = read_adapter(directory)
    checked = verify_files(files, base, scan_weights=False)
    # If the adapter fits, its headers bound how much is read; otherwise read the weights only if they are small.
    if scan_weights and (checked.verdict is not BaseMatch.INCOMPATIBLE or files.weights_size <= SMALL_BYTES):
        checked = verify_files(read_adapter(directory, with_weights=True), base, scan_weights=True)
    return checked.model_copy(update={"elapsed_ms": _milliseconds_since(started)})


def verify_files(files: AdapterFiles, base: Base | None, *, scan_weights: bool) -> Compatibility:
    """Like `verify`, for files that were already read: the bytes that are checked are the bytes that are loaded.

    The weights are scanned only if `read_adapter` was called with `with_weights`.

    Raises:
        BaseCheckpointError, HeaderError: the base model (not the adapter) cannot be read.
    """
    started = time.perf_counter()
    reasons = list(files.reasons)
    if files.tensors is not None:
        reasons += check_tensors(files.tensors, files.settings, base_modules(base) if base is not None else None)
    scanned = scan_weights and files.tensors is not None and files.weights is not None
    if scanned and files.tensors is not None:
        reasons += check_weights(files.tensors.values(), files.bytes_of)
    verdict = BaseMatch.INCOMPATIBLE
    if base is None:
        reasons.append(_base_unknown(files))
    else:
        verdict, doubts = match_base(files.manifest.base if files.manifest else None, base, files.base_hint)
        reasons += doubts
    if any(reason.severity == "error" for reason in reasons):
        verdict = BaseMatch.INCOMPATIBLE
    text, step = _next(verdict, reasons, files)
    return Compatibility(
        verdict=verdict,
        compatible=verdict in _COMPATIBLE,
        reasons=reasons,
        adapter_path=str(files.directory),
        base_model=base.name if base is not None else None,
        scanned=scanned,
        elapsed_ms=_milliseconds_since(started),
        next=text,
        next_step=step,
    )


def _base_unknown(files: AdapterFiles) -> Reason:
    recorded = f" It was trained on {files.manifest.base.name[:100]!r}." if files.manifest is not None else ""
    return error(
        "base_unknown",
        f"No base model was named, and the adapter's own was not found here.{recorded}",
        fix="Name base_model: a model directory, a .gguf file, or a hub id that is in the local cache",
    )


def _next(verdict: BaseMatch, reasons: list[Reason], files: AdapterFiles) -> tuple[str, NextStep | None]:
    """Return what to do next in words, and the call if it is one."""
    arguments = {"adapter_path": str(files.directory)}
    match verdict:
        case BaseMatch.INCOMPATIBLE:
            fixes = dict.fromkeys(reason.fix for reason in reasons if reason.severity == "error" and reason.fix)
            return f"Do not load it. {'; '.join(list(fixes)[:3])}.", None
        case BaseMatch.SHAPE_ONLY:
            step = NextStep(
                tool="load_adapter",
                arguments=arguments,
                missing=("base_model",),
                reason="The shapes fit, but nothing proves that it was trained on these weights: pass the base_model that it "
                "was trained on, or load it all the same with accept_unproven_base=true.",
            )
        case _:
            step = NextStep(tool="load_adapter", arguments=arguments)
    return step.sentence, step


def _milliseconds_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)
