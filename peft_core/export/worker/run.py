"""Run one export: check the adapter, write it in a hidden directory, compare, and publish the directory by one rename."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft_core.adapters.files import read_adapter
from peft_core.adapters.verify import verify_files
from peft_core.base_models.checkpoint_info import unusable
from peft_core.base_models.fingerprint import fingerprint
from peft_core.export.matching import refuse_mismatch
from peft_core.export.output import staged
from peft_core.export.request import MANIFEST_NAME, ExportRequest
from peft_core.export.worker import targets
from peft_core.export.worker.job import Job, Written
from peft_core.export.worker.ollama_model import write_ollama_target
from peft_core.export.worker.vllm_load import load_in_vllm
from peft_core.llamacpp.worker.lora_pairs import read_lora
from peft_core.schemas.export import ExportedFile, ExportReport, ExportTarget, LoadedInVllm
from peft_core.schemas.results import NextStep
from peft_core.system import in_use
from peft_core.system.files import atomic_write
from peft_core.system.lock import FileLock

STAGES = 6  # at most; only for the progress bar
Report = Callable[[int, int, str], None]
WRITERS: dict[ExportTarget, Callable[[Job], Written]] = {
    "gguf-lora": targets.write_gguf_lora_target,
    "merged": targets.write_merged_target,
    "ollama": write_ollama_target,
    "vllm": targets.write_vllm_target,
    "mlx": targets.write_mlx_target,
    "hub": targets.write_hub_target,
    "editors": targets.write_editors_target,
}


def export(request: ExportRequest, report: Report) -> ExportReport:
    """Export an adapter.

    Raises:
        InvalidArgument: The adapter does not fit, or something is in the way.
        ExportError: It cannot be expressed, or the written file computes something else.
        StorageError: No space or no permission.
    """
    started = time.monotonic()
    stage = 0

    def say(message: str) -> None:
        nonlocal stage
        report(min(stage, STAGES - 1), STAGES, message)
        stage += 1

    for path in request.in_use:
        in_use.hold(path)
    with FileLock(request.lock) as lock:
        if not lock.acquire():
            say("waiting for another export")
            lock.acquire(timeout_s=math.inf)
        say("checking the adapter")
        if not fingerprint(request.base.path).same_weights(request.base.fingerprint):
            raise unusable(request.base.path, "its files have changed since the request", "Repeat the request")
        files = read_adapter(request.adapter_path, weights="keep")
        check = verify_files(files, request.base)
        warnings = refuse_mismatch(check, str(request.adapter_path), named=request.base_was_named)
        lora = read_lora(files)
        with staged(request.directory, request.token, overwrite=request.overwrite) as directory:
            job = Job(request, files, lora, directory, say, warnings)
            say(f"writing {request.to}")
            written = WRITERS[request.to](job)
            result = _report(job, written, time.monotonic() - started)
            _write_manifest(directory, result)
        return result if request.vllm is None else _with_vllm(result, load_in_vllm(job, request.vllm))


def _with_vllm(report: ExportReport, loaded: LoadedInVllm) -> ExportReport:
    """Add to the report whether a running vLLM has loaded the adapter."""
    if not loaded.loaded:
        return report.model_copy(
            update={"vllm": loaded, "summary": f"NOT loaded into vLLM: {loaded.reason} {report.summary}"}
        )
    where = f"{loaded.address}/v1"
    unload = _post(f"{where}/unload_lora_adapter", {"lora_name": loaded.model})
    if loaded.is_wrong:
        summary = f"Do NOT use {loaded.model} in vLLM at {loaded.address}: {loaded.reason} {report.summary}"
        step = f"Unload it from vLLM: {unload}"
        return report.model_copy(
            update={"vllm": loaded, "summary": summary, "usage": [step, *report.usage], "next": step, "next_step": None}
        )
    if loaded.mean_difference is None:
        how = loaded.reason
    else:
        how = f"Next tokens' log-probabilities differ from PEFT's by {loaded.mean_difference:.4f} on average."
    here = f"Loaded into vLLM {loaded.version} at {loaded.address} as {loaded.model}. {how}"
    ask = _post(f"{where}/completions", {"model": loaded.model, "prompt": "def ", "max_tokens": 64})
    usage = [ask, f"Unload it: {unload}", *report.usage]
    return report.model_copy(
        update={"vllm": loaded, "summary": f"{report.summary} {here}", "usage": usage, "next": _run(ask)}
    )


def _post(address: str, body: dict[str, Any]) -> str:
    """Return the command of a shell that sends JSON."""
    return f"curl {address} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


def _report(job: Job, written: Written, elapsed_s: float) -> ExportReport:
    request = job.request
    files = [
        ExportedFile(path=str(request.directory / path.name), bytes=path.stat().st_size, sha256=_sha256(path))
        for path in sorted(job.directory.iterdir())
    ]
    next_words, step = _next(request, written)
    return ExportReport(
        summary=_summary(request, written, sum(file.bytes for file in files)),
        to=request.to,
        format=request.format,
        directory=str(request.directory),
        files=files,
        adapter_path=str(request.adapter_path),
        adapter_id=request.adapter_id,
        base_model=request.base.name,
        base_fingerprint=request.base.fingerprint.model_dump(exclude_none=True),
        verification=written.verification,
        usage=written.usage,
        warnings=job.warnings,
        ollama_model=written.ollama_model,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        elapsed_s=round(elapsed_s, 2),
        next=next_words,
        next_step=step,
    )


def _summary(request: ExportRequest, written: Written, size: int) -> str:
    what = f"{request.adapter_id} as {written.form}, {size / 1e6:.1f} MB"
    verified = written.verification
    absent = f"NOT created in Ollama: {written.not_created.rstrip('.')}. " if written.not_created else ""
    if verified.status == "not_verified":
        return f"{absent}Written, not verified: {what}. {verified.reason[:1].upper()}{verified.reason[1:]}"
    gain = ""
    if verified.gain is not None and verified.runtime_gain is not None:
        gain = f" The adapter lowers the loss by {verified.runtime_gain:.3f} there, by {verified.gain:.3f} in PEFT."
    done = f"{absent}{'Wrote' if absent else 'Exported'}"
    where = f"at {verified.positions} positions of {verified.text}, log-probabilities differ from PEFT's by"
    if verified.limit is None:
        return (
            f"{done} {what}. The merge was verified in F16; rounded to {request.format.upper()}, {where} "
            f"{verified.mean_difference:.3f} on average in {verified.runtime}.{gain}"
        )
    return (
        f"{done} {what}, and verified in {verified.runtime}: {where} {verified.mean_difference:.4f} on average "
        f"(limit {verified.limit:g}).{gain}"
    )


def _run(command: str) -> str:
    return f"Use it: {command}"


def _next(request: ExportRequest, written: Written) -> tuple[str, NextStep | None]:
    if written.verification.status == "not_verified":
        step = NextStep(
            tool="export_adapter",
            arguments={
                "adapter_path": str(request.adapter_path),
                "to": request.to,
                "output_path": str(request.directory),
                "overwrite": True,
            },
            reason="Verify it before you use it.",
        )
        return step.sentence, step
    return _run(written.usage[0]), None


def _write_manifest(directory: Path, report: ExportReport) -> None:
    """Write export.json: the report without anything of this machine."""
    files = [file.model_copy(update={"path": Path(file.path).name}) for file in report.files]
    local = {"directory", "adapter_path", "usage", "next", "next_step", "elapsed_s", "vllm"}
    text = report.model_copy(update={"files": files}).model_dump_json(indent=2, exclude=local)
    atomic_write(directory / MANIFEST_NAME, text + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
