"""All exceptions that a user can meet.

PeftMcpError
├── InvalidArgument      an argument of a request is not valid
├── DataError            the training data cannot be used
├── BaseCheckpointError  the base model cannot be found or used
├── HeaderError          a model file is not what it claims to be, or is damaged
├── AdapterNotFound      there is no adapter at this path, or of this project
├── AdapterInUse         the adapter is loaded, so it cannot be deleted
├── AdapterNotLoaded     no adapter is in memory, or not the one asked for
├── InferenceError       the inference worker failed, or there is not enough memory for it
├── JobNotFound          there is no job with this id
├── JobStateError        the job's state does not allow the request
├── ExportError          an adapter cannot be exported, or the written file does not compute the same
├── ServingError         the endpoint cannot be started, or does not answer
├── OllamaError          Ollama is absent, refuses, or takes too long
├── VllmError            vLLM is absent, refuses, or takes too long
├── Declined             the person was asked, and did not agree
├── ClusterError         the Ray cluster does not answer, refuses, or cannot run the training
├── StorageError         the data directory: no space, no permission, a newer database
└── TrainingError        the training itself failed
    └── NonFiniteError   a loss or gradient is NaN or Inf

`peft_core.schemas.results.ErrorInfo` is the JSON form.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

MAX_MESSAGE = 1_500  # characters
MAX_NAME = 120  # characters of a quoted name or value


class PeftMcpError(Exception):
    """Base class of all errors of this package.

    Attributes:
        code: stable identifier for programs, such as "not_enough_memory".
        message: what happened and what is allowed, for people and assistants.
        suggestions: what to do next, one sentence each.
        details: the facts of the message as data.

    `str(error)` is the message followed by the suggestions.
    """

    code = "model_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        suggestions: Iterable[str] = (),
        details: Mapping[str, Any] | None = None,
    ) -> None:
        self.message = _sanitize_message(message)
        super().__init__(self.message)
        self.code = code or type(self).code
        self.suggestions = tuple(map(_sanitize_message, suggestions))
        self.details = dict(details or {})

    def __str__(self) -> str:
        return " ".join([self.message, *(s if s.endswith((".", "?")) else f"{s}." for s in self.suggestions)])


def sanitize(text: object, *, limit: int | None = MAX_NAME, keep: str = "") -> str:
    """Return text of unknown origin as printable text of bounded length.

    Control characters could rewrite a terminal, and format characters could reorder the text around them.

    Args:
        text: The text, or an object whose `str` is meant.
        limit: Longer text loses its middle, so that this many characters remain. None: no limit.
        keep: Characters to leave as they are although they are not printable, such as line breaks.
    """
    text = str(text)
    if limit is not None and len(text) > limit:
        head = limit // 2
        text = f"{text[:head]} … {text[len(text) - (limit - head - 3) :]}"
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else "\N{REPLACEMENT CHARACTER}" for character in text
    )


def _sanitize_message(text: str) -> str:
    return sanitize(text, limit=MAX_MESSAGE, keep="\n\t")


class InvalidArgument(PeftMcpError):
    """An argument is not valid: the message names the field, its value and what is allowed."""

    code = "invalid_argument"

    def __init__(
        self, field: str, value: object, allowed: str, *, suggestions: Iterable[str] = (), code: str | None = None
    ) -> None:
        shown = sanitize(repr(value))
        problem = f"{field} is missing" if value is None else f"{field} = {shown} cannot be used"
        super().__init__(
            f"{problem}: {allowed.rstrip('.')}.",
            code=code,
            suggestions=suggestions,
            details={"field": field, "value": shown, "allowed": allowed},
        )


class DataError(PeftMcpError):
    code = "training_data"


class BaseCheckpointError(PeftMcpError):
    code = "base_model"


class HeaderError(PeftMcpError):
    """A model file is not what it claims to be, or is damaged."""

    code = "bad_weights_file"

    def __init__(self, path: Path, problem: str, *, code: str | None = None) -> None:
        fix = "Download the file itself with `git lfs pull`" if code == "git_lfs_pointer" else "Download the file again"
        super().__init__(
            f"{path.name}: {problem.rstrip('.')}.", code=code, suggestions=(fix,), details={"path": str(path)}
        )
        self.problem = problem


class AdapterNotFound(PeftMcpError):
    code = "adapter_not_found"


class AdapterInUse(PeftMcpError):
    code = "adapter_in_use"


class AdapterNotLoaded(PeftMcpError):
    code = "adapter_not_loaded"


class InferenceError(PeftMcpError):
    code = "inference"


class JobNotFound(PeftMcpError):
    code = "job_not_found"


class JobStateError(PeftMcpError):
    code = "job_state"


class ExportError(PeftMcpError):
    code = "export"


class ServingError(PeftMcpError):
    code = "serving"


class OllamaError(PeftMcpError):
    code = "ollama"


class VllmError(PeftMcpError):
    code = "vllm"


class Declined(PeftMcpError):
    code = "declined"


class ClusterError(PeftMcpError):
    code = "cluster"


class StorageError(PeftMcpError):
    code = "storage"


def unwritable(directory: Path, error: Exception) -> StorageError:
    """Return the error for a data directory that cannot be used; `error` comes from the operating system or SQLite."""
    return StorageError(
        f"The data directory {directory} cannot be used: {error}.",
        code="data_directory_unwritable",
        suggestions=[
            "Make it a writable directory with free space, or set CODEBASE_GARDENER_DATA_DIR and restart the server"
        ],
    )


class TrainingError(PeftMcpError):
    code = "training"


class NonFiniteError(TrainingError):
    """`what` says which value it is: "the loss is nan"."""

    code = "non_finite_loss"

    def __init__(self, what: str, *, suggestions: Iterable[str] = ()) -> None:
        super().__init__(
            f"{what[0].upper()}{what[1:]}: the weights or the arithmetic overflowed.", suggestions=suggestions
        )
        self.what = what
