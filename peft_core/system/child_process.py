"""Start child processes, exchange JSON lines with them, and explain how they ended.

The same few rules hold between the server, the runner, the workers and the data readers:

* A child imports no modules from its working directory, stays offline, and creates private files only.
* A child ends with its parent, except for the runner, which outlives the server. It compares its current parent with the one
  that started it, so a reused pid cannot mislead it. The inference worker ends when its standard input is closed instead.
* Messages are JSON objects, one per line. A child writes them to a copy of its standard output, so that a library that prints
  cannot break the protocol; logs go to standard error, which the parent redirects to a file.
* A failure becomes an `ErrorInfo`; see failures.py.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import anyio
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import BaseModel, ValidationError

from peft_core.errors import DataError, PeftMcpError, sanitize
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import ErrorInfo
from peft_core.system.failures import TaskKind, error_info

PARENT_VARIABLE = "PEFT_MCP_PARENT"
LAUNCHER = "launcher"
NODE_VARIABLE = "PEFT_MCP_NODE"  # set for a worker on a cluster: the name of its node
MAX_LOG_BYTES = 4 << 20
POLL_INTERVAL_S = 0.25  # how often a child checks its parent's pid
_TAIL_BYTES = 4096
_MAX_TAIL_LINE = 300  # characters
_REFUSED, _CRASHED = 1, 70  # exit codes of `answer_request` for an error of ours, and for any other (EX_SOFTWARE)

RequestT = TypeVar("RequestT", bound=FrozenModel)
AnswerT = TypeVar("AnswerT", bound=FrozenModel)
JsonLineWriter = Callable[[BaseModel], None]

log = logging.getLogger(__name__)  # structlog would slow the server's start down by 0.1 s


# ---------------------------------------------------------------------------------------------------- the parent's side


def python_module(module: str) -> list[str]:
    """Return the command that runs a module of ours with this interpreter; -P keeps the working directory off sys.path."""
    return [sys.executable, "-P", "-m", module]


def child_environment(*, launched: bool = False) -> dict[str, str]:
    """Return the environment for a child: this process's own, offline, and with the parent that the child must end with.

    Args:
        launched: Whether a launcher such as torchrun starts the child. The child then ends with the launcher, and with this
            process when it finds its output closed.
    """
    return {
        **os.environ,
        PARENT_VARIABLE: LAUNCHER if launched else str(os.getpid()),
        "PYTHONSAFEPATH": "1",  # as -P, also for the processes that a launcher starts
        "HF_HUB_OFFLINE": "1",
    }


def open_log(path: Path) -> BinaryIO:
    """Open a log file to append to, creating its directory. A log above MAX_LOG_BYTES becomes NAME.old.log first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        path.replace(path.with_suffix(".old.log"))
    return path.open("ab")


def log_tail(path: Path, *, start: int = 0, lines: int = 3) -> str:
    """Return the last lines of a log as one line, or "" if there is nothing to read.

    Args:
        path: The log file.
        start: Offset in bytes from which on the log belongs to the process in question.
        lines: Number of lines to return.
    """
    try:
        with path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(min(start, end), end - _TAIL_BYTES))
            text = log.read().decode("utf-8", "replace")
    except OSError:
        return ""
    return " | ".join(sanitize(line.strip(), limit=_MAX_TAIL_LINE) for line in text.strip().splitlines()[-lines:])


def describe_exit(code: int) -> str:
    """Return how a process ended, as a predicate: "ended with exit code 3", "was killed by SIGKILL (signal 9)"."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = f"{signal.Signals(-code).name} (signal {-code})"
    except ValueError:  # real-time signals have no name
        name = f"signal {-code}"
    return f"was killed by {name}" + (", perhaps because memory ran out" if code == -signal.SIGKILL else "")


class LineTooLongError(Exception):
    """A child wrote a line that is longer than the limit. Where its next message begins cannot be known."""


async def receive_line(stream: BufferedByteReceiveStream, limit: int) -> bytes | None:
    """Return the next line without its line break, or None once the other end is closed.

    Raises:
        LineTooLongError: The line is longer than `limit` bytes.
    """
    try:
        return await stream.receive_until(b"\n", limit)
    except (anyio.IncompleteRead, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
        return None
    except anyio.DelimiterNotFound:
        raise LineTooLongError from None


def run_json_child(
    module: str,
    request: FrozenModel,
    answer: type[AnswerT],
    *,
    timeout_s: float,
    action: str,
    on_timeout: Sequence[str],
    temporary_dir: Path | None = None,
) -> AnswerT:
    """Run a module that calls `answer_request`, and return its answer. Whatever it imports stays out of this process.

    Args:
        module: Name of the module.
        request: What the child reads from standard input.
        answer: Type of its answer.
        timeout_s: Time after which the child is killed.
        action: What the child does, for error messages: "Reading the table X".
        on_timeout: What the user can do if it takes too long.
        temporary_dir: Directory for the child's temporary files; None: the system's.

    Raises:
        DataError: The child reported an error (its code), took too long (`inspection_timeout`) or died (`inspection_failed`).
    """
    temporary = {} if temporary_dir is None else {"TMPDIR": str(temporary_dir)}
    try:
        child = subprocess.run(  # noqa: S603 -- a module of ours
            python_module(module),
            input=request.model_dump_json().encode(),
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env={**child_environment(), **temporary},
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"{action} took longer than {timeout_s:.0f} s and was stopped.",
            code="inspection_timeout",
            suggestions=on_timeout,
        ) from error
    if child.returncode == 0:
        return answer.model_validate_json(child.stdout)
    raise _child_error(child, action)


def _child_error(child: subprocess.CompletedProcess[bytes], action: str) -> DataError:
    """Return the error that a child of `run_json_child` reported, or why it died. Log its standard error if it crashed."""
    stderr = child.stderr.decode(errors="replace").strip()
    if child.returncode != _REFUSED and stderr:
        log.warning("%s failed:\n%s", action, sanitize(stderr, limit=10_000, keep="\n\t"))
    try:
        problem = ErrorInfo.model_validate_json(child.stdout)
    except ValidationError:
        reason = stderr.rpartition("\n")[2] or f"the process {describe_exit(child.returncode)}"
        return DataError(f"{action} failed: {reason}", code="inspection_failed")
    return DataError(problem.message, code=problem.code, suggestions=problem.suggestions)


# ----------------------------------------------------------------------------------------------------- the child's side


def make_files_private() -> None:
    """Let this process and its children create files that only the user can read: they hold private code or derive from it."""
    os.umask(0o077)


def parent_pid() -> int | None:
    """Return the pid of the process to end with, or None if this process was started by hand."""
    parent = os.environ.get(PARENT_VARIABLE)
    if not parent:
        return None
    return os.getppid() if parent == LAUNCHER else int(parent)


def watch_parent(parent: int, on_death: Callable[[], None]) -> None:
    """Call `on_death` in a background thread once `parent` is no longer this process's parent: an orphan has another one."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_INTERVAL_S)
        on_death()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def redirect_stdout() -> int:
    """Send what is printed from now on to standard error, and return a descriptor of what was standard output."""
    sys.stdout.flush()
    original = os.dup(1)
    os.dup2(2, 1)
    return original


def json_line_writer(descriptor: int, on_closed: Callable[[], None]) -> JsonLineWriter:
    """Return a function that writes a message as one JSON line; it calls `on_closed` once nothing reads the other end."""

    def write(message: BaseModel) -> None:
        try:
            rest = memoryview(message.model_dump_json().encode() + b"\n")
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except BrokenPipeError:
            on_closed()

    return write


def answer_request(request_type: type[RequestT], answer: Callable[[RequestT], FrozenModel], task: TaskKind) -> int:
    """Be the child of `run_json_child`: answer the request on standard input, and return the exit code.

    Args:
        request_type: Type of the request.
        answer: Computes the answer.
        task: What is being done, for the message of an unexpected error.
    """
    return answer_with_progress(request_type, lambda request, _: answer(request), task)


def answer_with_progress(
    request_type: type[RequestT], answer: Callable[[RequestT, JsonLineWriter], FrozenModel], task: TaskKind
) -> int:
    """As `answer_request`; `answer` is also given a function that sends a message before the answer."""
    make_files_private()
    write = json_line_writer(redirect_stdout(), on_closed=lambda: None)
    if (parent := parent_pid()) is not None:
        watch_parent(parent, on_death=lambda: os._exit(1))
    try:
        write(answer(request_type.model_validate_json(sys.stdin.buffer.read()), write))
    except PeftMcpError as error:
        write(error_info(error, task))
        return _REFUSED
    except Exception as error:  # noqa: BLE001 -- the edge of the process: the parent reports it, and logs the traceback
        traceback.print_exc()
        write(error_info(error, task))
        return _CRASHED
    return 0
