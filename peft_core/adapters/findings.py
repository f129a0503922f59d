"""Constructors for the findings of the check. Names that were read from a file are shortened and made printable."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from peft_core.base_models.checkpoint_info import join_some
from peft_core.errors import sanitize
from peft_core.schemas.results import Reason


def error(
    code: str,
    message: str,
    *,
    found: str | None = None,
    expected: str | None = None,
    where: str | None = None,
    fix: str | None = None,
) -> Reason:
    """Return a finding that makes the adapter incompatible."""
    return Reason(code=code, severity="error", message=message, found=found, expected=expected, where=where, fix=fix)


def warning(
    code: str, message: str, *, found: str | None = None, expected: str | None = None, fix: str | None = None
) -> Reason:
    """Return a finding that the user should know before using the adapter."""
    return Reason(code=code, severity="warning", message=message, found=found, expected=expected, fix=fix)


def error_about(
    code: str, problem: str, names: Sequence[str], *, fix: str, found: str | None = None, expected: str | None = None
) -> Iterable[Reason]:
    """Yield one error about all of these names; nothing if there are no names. The message lists the first names."""
    if names:
        message = f"{problem}: {join_some(sanitize(name) for name in names)}."
        yield error(code, message, where=sanitize(names[0]), fix=fix, found=found, expected=expected)
