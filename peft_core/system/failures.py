"""What went wrong in a computing process, as data for the person who reads the answer."""

from __future__ import annotations

from dataclasses import dataclass

from peft_core.errors import PeftMcpError
from peft_core.schemas.results import ErrorInfo

# The C++ library's own, where an allocation of torch's fails that is none of a tensor; a tokenizer's regular expressions'.
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
    """What was being done, for the words of its failure."""

    name: str  # "training"
    log: str  # where the traceback is
    against_memory: tuple[str, ...]  # what helps when memory ran out


def problem_of(error: Exception, work: TaskKind) -> ErrorInfo:
    """An error of ours as it is, memory recognised, anything else by type and text."""
    if isinstance(error, PeftMcpError):
        return ErrorInfo.from_error(error)
    if is_out_of_memory(error):
        return ErrorInfo(
            code="out_of_memory",
            message=f"The {work.name} ran out of memory ({shown(error)}).",
            suggestions=work.against_memory,
        )
    return ErrorInfo(
        code=f"{work.name}_crashed",
        message=f"The {work.name} ended with an unexpected error: {shown(error)}",
        suggestions=(f"The traceback is in {work.log}.", "Report it, with the log."),
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation was refused, by the system or by a device."""
    # torch.OutOfMemoryError by name: this module must work where torch failed to import.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    known = isinstance(error, (RuntimeError, OSError)) or type(error) is Exception  # all that tokenizers ever raises
    return known and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def shown(error: Exception) -> str:
    """Type and text in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__
