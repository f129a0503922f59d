"""Checks of accelerators as text: a line for `doctor`, and a report to send."""

from __future__ import annotations

from collections.abc import Sequence

from peft_core.errors import sanitize
from peft_core.schemas.device_check import DeviceCheck, Outcome

TITLE = "# Accelerators checked by peft-mcp"
_ABOUT = (
    "Loss and gradients of one micro-batch on the device, compared with the CPU in float32. This report contains no code, no "
    "path and no name of a user, host or base model."
)


def headline(check: DeviceCheck) -> str:
    """Return one check in a line: on what, when, and the result with its figures."""
    key = check.key
    name = f"{sanitize(key.device_name)}: " if key.device_name else ""
    figures = ""
    if check.outcome is Outcome.AGREES and check.difference is not None and check.tolerance is not None:
        figures = f" (gradient {check.difference.gradient:.1e}, tolerance {check.tolerance.gradient:.1e})"
    date = f", {sanitize(check.checked_at[:10])}" if check.checked_at else ""
    what = f"{sanitize(key.number_format)}, {sanitize(key.way)}; torch {sanitize(key.torch)}{date}"
    return f"{name}{sanitize(check.in_words, limit=300)}{figures}; {what}"


def write_report(checks: Sequence[DeviceCheck]) -> str:
    """Return all checks in Markdown, with every figure."""
    parts = [TITLE, _ABOUT]
    parts += (
        ["No accelerator has been checked on this machine: the first training on one does it."] if not checks else []
    )
    parts += [_section(number, check) for number, check in enumerate(checks, 1)]
    return "\n\n".join(parts) + "\n"


def _section(number: int, check: DeviceCheck) -> str:
    key, found, allowed = check.key, check.difference, check.tolerance
    rows = [
        ("device", f"{key.device} {key.device_name}".strip()),
        ("system", key.system),
        ("driver", key.driver or "unknown"),
        ("torch", key.torch),
        ("peft-mcp", check.version),
        ("number format", key.number_format),
        ("computation", key.way),
        ("result", check.outcome.value.replace("_", " ")),
        ("reason", check.reason),
        ("compared", f"{check.tokens} tokens, {check.layers} of {check.total_layers} layers" if check.tokens else ""),
    ]
    if found is not None and allowed is not None:
        rows += [
            (f"{name} (tolerance)", f"{value:.3e} ({limit:.3e})")
            for name, value, limit in (
                ("loss", found.loss, allowed.loss),
                ("gradient", found.gradient, allowed.gradient),
                (f"worst tensor, {found.worst_tensor}", found.worst, allowed.worst),
                ("length of the gradient", found.scale, allowed.scale),
            )
        ]
    if check.measured_bytes is not None and check.expected_bytes is not None:
        rows.append(("memory (expected)", f"{check.measured_bytes / 1e9:.3f} GB ({check.expected_bytes / 1e9:.3f} GB)"))
    if check.rounding is not None:
        rows.append(("rounding, emulated on the CPU", f"gradient {check.rounding.gradient:.3e}"))
    rows += [("memory note", check.memory_note), ("took", f"{check.seconds:.0f} s"), ("date", check.checked_at[:10])]
    lines = [f"| {name} | {sanitize(value, limit=400).replace('|', '/')} |" for name, value in rows if value]
    return "\n".join([f"## Check {number}", "", "| | |", "|---|---|", *lines])


def is_problem(check: DeviceCheck) -> bool:
    """Return whether a person should know: trainings do not use the device, or it takes more memory than planned."""
    return check.outcome not in (Outcome.AGREES, Outcome.SKIPPED) or bool(check.memory_note)
