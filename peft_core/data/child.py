"""A question to a process of its own: JSON in, an answer or a Problem as JSON out. What it imports stays out of ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import TypeVar

from pydantic import ValidationError

from peft_core.errors import DataError, ModelError
from peft_core.results import Problem
from peft_core.spec import Frozen

Answer = TypeVar("Answer", bound=Frozen)


def ask(
    module: str, request: Frozen, answer: type[Answer], *, timeout_s: float, doing: str, else_do: Sequence[str]
) -> Answer:
    """`doing`: what it does, in words. `else_do`: what to do when that takes too long.

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
        problem = Problem.model_validate_json(done.stdout)
    except ValidationError as error:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise DataError(f"{doing} failed: {last}", code="inspection_failed") from error
    raise DataError(problem.message, code=problem.code, suggestions=problem.suggestions)


def problem_of(error: ModelError) -> Problem:
    return Problem(code=error.code, message=error.message, suggestions=error.suggestions)
