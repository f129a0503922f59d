"""What went wrong, as data for the person who reads the status."""

from __future__ import annotations

from peft_core.errors import ModelError
from peft_core.results import Problem

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "cannot allocate memory")


def problem_of(error: Exception) -> Problem:
    """The failure of a run: an error of ours as it is, memory recognised, anything else by type and text."""
    if isinstance(error, ModelError):
        return Problem(code=error.code, message=error.message, suggestions=error.suggestions)
    if _is_out_of_memory(error):
        return Problem(
            code="out_of_memory",
            message=f"The training ran out of memory ({_shown(error)}).",
            suggestions=(
                "Lower rank, or max_length where it is above 512 (at most so many tokens are processed at once).",
                "Use a smaller base model, or close other programs.",
            ),
        )
    return Problem(
        code="training_crashed",
        message=f"The training ended with an unexpected error: {_shown(error)}",
        suggestions=(
            "The traceback is in the job's log.",
            "Report it, with the log.",
        ),
    )


def _is_out_of_memory(error: Exception) -> bool:
    # torch.OutOfMemoryError by name: this module must work where torch failed to import.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(sign in str(error).lower() for sign in _OUT_OF_MEMORY)


def _shown(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}" if text else type(error).__name__
