"""Check whether an adapter fits a base model. This reads only headers and configurations, without torch, in milliseconds.

PEFT loads most adapters that are rejected here without a warning; they then have no effect, or a wrong one.
`files`, `config_check`, `tensor_check` and `base_match` are the parts of the check.
"""

from __future__ import annotations

import time
from pathlib import Path

from peft_core.adapters.base_match import match_base
from peft_core.adapters.files import AdapterFiles, read_adapter
from peft_core.adapters.findings import error
from peft_core.adapters.tensor_check import BaseModules, base_modules, check_tensors
from peft_core.schemas.base_model import Base
from peft_core.schemas.results import BaseMatch, Compatibility, NextStep, Reason

MAX_INCOMPATIBLE_SCAN_BYTES = 64 << 20
_COMPATIBLE = frozenset({BaseMatch.EXACT, BaseMatch.SAMPLED, BaseMatch.SAME_FAMILY})


def verify(directory: Path, base: Base | None, *, scan_weights: bool = False) -> Compatibility:
    """Check whether the adapter in `directory` can be used with `base`, and return the verdict with all findings.

    With `scan_weights` the weights are read too, in pieces (20 MB take 50 ms), and compared with the hash in the manifest.
    If `base` is None, because the adapter's own base model was not found, only the files are checked.

    Raises:
        BaseCheckpointError, HeaderError: the base model (not the adapter) cannot be read.
    """
    started = time.perf_counter()
    files = read_adapter(directory)
    result = verify_files(files, base)
    # The size of an adapter that fits is bounded by the base model. Otherwise read the weights only if they are small.
    is_bounded = result.verdict is not BaseMatch.INCOMPATIBLE or files.weights_size <= MAX_INCOMPATIBLE_SCAN_BYTES
    if scan_weights and is_bounded:
        result = verify_files(read_adapter(directory, weights="scan"), base)
    return result.model_copy(update={"elapsed_ms": _milliseconds_since(started)})


def verify_files(files: AdapterFiles, base: Base | None) -> Compatibility:
    """Check files that were already read, so that the bytes that are checked are the bytes that are loaded.

    Raises:
        BaseCheckpointError, HeaderError: the base model (not the adapter) cannot be read.
    """
    started = time.perf_counter()
    reasons = list(files.reasons)
    if files.tensors is not None and all(reason.code != "not_lora" for reason in reasons):
        modules = base_modules(base) if base is not None else None
        reasons += _tensor_findings(files, modules)
    reasons += files.weight_reasons or ()
    verdict = BaseMatch.INCOMPATIBLE
    if base is None:
        reasons.append(_base_unknown(files))
    else:
        verdict, warnings = match_base(files.manifest.base if files.manifest else None, base, files.base_hint)
        reasons += warnings
    if any(reason.severity == "error" for reason in reasons):
        verdict = BaseMatch.INCOMPATIBLE
    text, step = _next(verdict, reasons, files)
    return Compatibility(
        verdict=verdict,
        compatible=verdict in _COMPATIBLE,
        reasons=reasons,
        adapter_path=str(files.directory),
        base_model=base.name if base is not None else None,
        scanned=files.weight_reasons is not None,
        elapsed_ms=_milliseconds_since(started),
        next=text,
        next_step=step,
    )


def _tensor_findings(files: AdapterFiles, modules: BaseModules | None) -> list[Reason]:
    """Return what is wrong with the tensors, except for what a refused setting of the configuration explains."""
    explained = {"use_dora": "dora_weights", "lora_bias": "lora_bias", "trainable_token_indices": "token_rows"}
    known = {explained.get(reason.where or "") for reason in files.reasons}
    findings = check_tensors(files.tensors or {}, files.settings, modules, files.layout)
    return [reason for reason in findings if reason.code not in known]


def _base_unknown(files: AdapterFiles) -> Reason:
    recorded = f" It was trained on {files.manifest.base.name[:100]!r}." if files.manifest is not None else ""
    return error(
        "base_unknown",
        f"No base_model was given, and the adapter's own base model was not found on this machine.{recorded}",
        fix="Set base_model to a model directory, a .gguf file, or a hub id that is in the local cache",
    )


def _next(verdict: BaseMatch, reasons: list[Reason], files: AdapterFiles) -> tuple[str, NextStep | None]:
    """Return the suggested next step in words and, if it is a call, as data."""
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
                reason="The shapes fit, but nothing proves that the adapter was trained on these weights: pass the base_model "
                "that it was trained on, or load it anyway with accept_unproven_base=true.",
            )
        case _:
            step = NextStep(tool="load_adapter", arguments=arguments)
    return step.sentence, step


def _milliseconds_since(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)
