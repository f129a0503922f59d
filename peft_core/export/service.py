"""Export adapters: a request is checked here, before the work, which is done in a child process."""

from __future__ import annotations

import secrets
import shutil
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.to_thread import run_sync
from pydantic import ValidationError

from peft_core.adapters.service import AdapterService
from peft_core.config import Settings
from peft_core.errors import ExportError, InvalidArgument
from peft_core.export.matching import refuse_mismatch
from peft_core.export.output import default_output, require_free, require_output, staging_directory
from peft_core.export.request import MANIFEST_NAME, ExportProgress, ExportRequest, OllamaPlan
from peft_core.export.targets import parse_format, parse_target
from peft_core.export.vllm_plan import plan_vllm
from peft_core.schemas.base_model import Base
from peft_core.schemas.export import ExportOptions, ExportReport
from peft_core.schemas.results import ErrorInfo
from peft_core.system.child_process import (
    child_environment,
    describe_exit,
    log_tail,
    open_log,
    python_module,
    receive_line,
)

WORKER = python_module("peft_core.export.worker")
MAX_LINE = 4 << 20
ProgressCallback = Callable[[float, float | None, str], Awaitable[None]]


class ExportService:
    def __init__(self, settings: Settings, adapters: AdapterService) -> None:
        self._settings = settings
        self._adapters = adapters

    async def export(
        self, adapter_path: str, to: str, options: ExportOptions, on_progress: ProgressCallback | None = None
    ) -> ExportReport:
        """Write an adapter in another form and compare the written file with PEFT.

        Cancelling leaves no half-written directory. What is complete by then stays: the directory while vLLM loads it, and what
        a running Ollama or vLLM has taken.

        Raises:
            AdapterNotFound, InvalidArgument, BaseCheckpointError, HeaderError: as `AdapterService.adapter_and_base`, and for an
                unknown target or format, an existing or forbidden output path, an adapter that does not fit.
            StorageError: not enough disk space.
            ExportError: it cannot be expressed, or the written file computes something else.
        """
        request = await run_sync(self._request, adapter_path, to, options)
        return await self._run(request, on_progress)

    def _request(self, adapter_path: str, to: str, options: ExportOptions) -> ExportRequest:
        target = parse_target(to)
        directory, base = self._adapters.adapter_and_base(adapter_path, options.base_model)
        chosen = parse_format(target, options.format, base.shape)
        self._require_compatible(adapter_path, directory, base, named=options.base_model is not None)
        paths = self._settings.paths
        output = default_output(paths, directory, target, chosen)
        if options.output_path is not None:
            output = require_output(options.output_path, paths, self._settings.allowed_roots)
        require_free(output, overwrite=options.overwrite)
        ollama = None
        if target == "ollama":
            ollama, chosen = self._for_ollama(directory, base, options, chosen)
        elif target != "vllm":
            for field in ("model_name", "vllm_address"):
                if getattr(options, field) is not None:
                    raise InvalidArgument(field, getattr(options, field), f"is not used with to={target!r}; omit it")
        job = paths.job(directory.name)
        held_out = job.dataset / "held_out.jsonl"
        trained_here = directory.is_relative_to(paths.projects)
        return ExportRequest(
            adapter_path=directory,
            adapter_id=directory.name,
            base=base,
            base_was_named=options.base_model is not None,
            to=target,
            format=chosen,
            directory=output,
            overwrite=options.overwrite,
            token=secrets.token_hex(4),
            held_out=held_out if trained_here and held_out.is_file() else None,
            in_use=(directory, job.root) if trained_here else (),
            base_models_dir=paths.base_models,
            ollama=ollama,
            vllm=plan_vllm(options, self._settings) if target == "vllm" else None,
            lock=paths.exports_lock,
        )

    def _for_ollama(self, adapter: Path, base: Base, options: ExportOptions, chosen: str) -> tuple[OllamaPlan, str]:
        """Return the plan, and the format: a LoRA file where the server takes one, unless another format was requested."""
        from peft_core.export.ollama_plan import LORA, plan_ollama  # noqa: PLC0415 -- not at the server's start

        plan, takes_lora = plan_ollama(adapter, base, options, self._settings)
        if options.format is None:
            return plan, LORA if takes_lora else chosen
        if chosen == LORA and (base.format != "gguf" or (plan.address is not None and not takes_lora)):
            why = (
                f"Ollama {plan.version} takes"
                if base.format == "gguf"
                else "with a base model that is no GGUF file it takes"
            )
            raise InvalidArgument(
                "format", options.format, f"{why} whole models only; omit it to export a merged model"
            )
        return plan, chosen

    def _require_compatible(self, adapter_path: str, directory: Path, base: Base, *, named: bool) -> None:
        """Refuse an adapter that does not belong to the base model."""
        from peft_core.adapters.verify import verify  # noqa: PLC0415 -- not at the server's start

        refuse_mismatch(verify(directory, base), adapter_path, named=named)

    async def _run(self, request: ExportRequest, on_progress: ProgressCallback | None) -> ExportReport:
        log_path = self._settings.paths.logs / "export.log"
        with open_log(log_path) as log:
            start = log.tell()
            process = await _start(log, log_path)
        try:
            final = await _exchange(process, request, on_progress)
            code = await process.wait()
        except BaseException:  # usually a cancellation
            with anyio.CancelScope(shield=True):
                await _kill(process)
                await run_sync(
                    partial(shutil.rmtree, staging_directory(request.directory, request.token), ignore_errors=True)
                )
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await process.aclose()
        if final is not None and code == 0:
            return ExportReport.model_validate_json(final)
        await run_sync(partial(shutil.rmtree, staging_directory(request.directory, request.token), ignore_errors=True))
        raise _failure(final, code, log_tail(log_path, start=start, lines=1), request.directory)


async def _start(log: BinaryIO, log_path: Path) -> Process:
    try:
        # Shielded, because a cancellation here would leave a process without an owner:
        with anyio.CancelScope(shield=True):
            return await anyio.open_process(
                WORKER,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=log_path.parent,
                env=child_environment(),
            )
    except OSError as error:
        raise ExportError(f"The export process cannot be started: {error.strerror or error}.") from error
    raise AssertionError("a shielded scope swallows no exception")


async def _exchange(process: Process, request: ExportRequest, on_progress: ProgressCallback | None) -> bytes | None:
    """Send the request, pass progress on, and return the last line, which is the answer; None if there is none."""
    assert process.stdin is not None  # noqa: S101 -- requested as a pipe
    assert process.stdout is not None  # noqa: S101 -- the same
    with suppress(anyio.BrokenResourceError):
        await process.stdin.send(request.model_dump_json().encode())
    await process.stdin.aclose()
    stream = BufferedByteReceiveStream(process.stdout)
    final = None
    while (line := await receive_line(stream, MAX_LINE)) is not None:
        try:
            progress = ExportProgress.model_validate_json(line)
        except ValidationError:
            final = line
        else:
            if on_progress is not None:
                await on_progress(progress.done, progress.total, progress.message)
    return final


async def _kill(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


def _failure(final: bytes | None, code: int, last_line: str, directory: Path) -> ExportError:
    """Return the error that the worker reported, or why it died."""
    try:
        problem = ErrorInfo.model_validate_json(final or b"")
    except ValidationError:
        return ExportError(
            f"The export process {describe_exit(code)}.{f' Its log ends with: {last_line}.' if last_line else ''} "
            f"{_left(directory)}",
            code="export_died",
            suggestions=["Call export_adapter again", "The log is logs/export.log in the data directory"],
        )
    return ExportError(problem.message, code=problem.code, suggestions=problem.suggestions)


def _left(directory: Path) -> str:
    """Say what an export that died has left."""
    if not (directory / MANIFEST_NAME).is_file():
        return "Nothing was written."
    return f"No half-written export is left: the one in {directory} is complete, and is this one or an earlier one."
