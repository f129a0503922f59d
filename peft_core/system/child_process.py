"""A question to a process of its own: JSON in, an answer or a Problem as JSON out. What it imports stays out of ours."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from peft_core.errors import DataError, PeftMcpError
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.results import ErrorInfo

Answer = TypeVar("Answer", bound=FrozenModel)
_PARENT = "PEFT_MCP_PARENT"
_LOOK_S = 0.25


def ask(
    module: str,
    request: FrozenModel,
    answer: type[Answer],
    *,
    timeout_s: float,
    doing: str,
    else_do: Sequence[str],
    scratch: Path | None = None,
) -> Answer:
    """`doing`: what it does, in words. `else_do`: what to do when that takes too long. `scratch`: for its temporary files.

    Raises:
        DataError: as the child says; or 'inspection_timeout', 'inspection_failed'.
    """
    try:
        done = subprocess.run(  # noqa: S603 - our own module
            [sys.executable, "-P", "-m", module],
            input=request.model_dump_json().encode(),
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env={
                **os.environ,
                _PARENT: str(os.getpid()),
                **({} if scratch is None else {"TMPDIR": str(scratch)}),
            },
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"{doing} took longer than {timeout_s:.0f} s, and was stopped.",
            code="inspection_timeout",
            suggestions=else_do,
        ) from error
    if done.returncode == 0:
        return answer.model_validate_json(done.stdout)
    try:
        problem = ErrorInfo.model_validate_json(done.stdout)
    except ValidationError as error:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise DataError(f"{doing} failed: {last}", code="inspection_failed") from error
    raise DataError(problem.message, code=problem.code, suggestions=problem.suggestions)


def begin() -> None:
    """What the child does first: its files are its user's alone, and it ends with whoever asked. By hand nobody did."""
    os.umask(0o077)
    if (parent := os.environ.get(_PARENT)) is not None:
        threading.Thread(target=_end_without, args=(int(parent),), name="parent-watch", daemon=True).start()


def _end_without(parent: int) -> None:
    while os.getppid() == parent:  # an orphan has another one
        time.sleep(_LOOK_S)
    os._exit(1)


def problem_of(error: PeftMcpError) -> ErrorInfo:
    return ErrorInfo.from_error(error)


# FOLDED FROM peft_core.system.child_process: A child's end of the wire: one JSON object per line on what was standard
# output.

Write = Callable[[BaseModel], None]


def redirect_stdout() -> int:
    """Take standard output for the wire: a stray print of any library goes to standard error from here on."""
    sys.stdout.flush()
    wire = os.dup(1)
    os.dup2(2, 1)
    return wire


def line_writer(fd: int, closed: Callable[[], None]) -> Write:
    """A function that writes one object as one line. `closed` is called when nobody reads any more."""

    def write(said: BaseModel) -> None:
        try:
            line = memoryview(said.model_dump_json().encode() + b"\n")
            while line:
                line = line[os.write(fd, line) :]
        except BrokenPipeError:
            closed()

    return write
