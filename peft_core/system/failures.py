"""Turn the exception that ended a task into an `ErrorInfo`: data for the user who reads the answer."""

from __future__ import annotations

from dataclasses import dataclass

from peft_core.errors import PeftMcpError, sanitize
from peft_core.schemas.results import ErrorInfo

# Out-of-memory messages of torch, of libstdc++ (`bad_alloc`), and of Oniguruma (regular expressions of tokenizers).
_OUT_OF_MEMORY = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "cannot allocate memory",
    "std::bad_alloc",
    "oniguruma error: fail to initialize",
    "oniguruma error: fail to memory allocation",
)


@dataclass(frozen=True)
class TaskKind:
    """A kind of task, for the messages of its failures."""

    name: str  # "training"
    crash_code: str  # code of the error for an unexpected exception
    log: str  # where the traceback is written, in words
    memory_advice: tuple[str, ...]  # what the user can do when memory runs out
    memory_code: str = "out_of_memory"  # code of that error


def error_info(error: BaseException, task: TaskKind) -> ErrorInfo:
    """Describe an exception: our own errors as they are, running out of memory with advice, any other by type and text."""
    # A task group wraps even a single error.
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, PeftMcpError):
        return ErrorInfo.from_error(error)
    if is_out_of_memory(error):
        return ErrorInfo(
            code=task.memory_code,
            message=f"The {task.name} ran out of memory ({describe_error(error)}).",
            suggestions=task.memory_advice,
        )
    return ErrorInfo(
        code=task.crash_code,
        message=f"The {task.name} ended with an unexpected error: {describe_error(error)}",
        suggestions=(f"The traceback is in {task.log}.", "Report it, with the log."),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the system or a device refused to allocate memory."""
    # torch's error is recognised by name, because this module must work where torch cannot be imported.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    may_be = isinstance(error, (RuntimeError, OSError)) or type(error) is Exception  # tokenizers raises nothing else
    return may_be and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def describe_error(error: BaseException) -> str:
    """Return the type and the text of an exception, in one printable line."""
    text = sanitize(" ".join(str(error).split()), limit=400)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
