"""Durations and ages in words."""

from __future__ import annotations

from datetime import UTC, datetime


def format_duration(seconds: float) -> str:
    """Return a duration such as '45 s', '2 min 10 s' or '1 h 5 min'."""
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    minutes, rest = divmod(total, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def rough_duration(seconds: float) -> str:
    """Return an estimated duration with two digits at most: '30 s', '4 min', '45 min', '2 h 10 min', '30 h'."""
    if seconds < 55:
        return f"{max(10, round(seconds, -1)):.0f} s"
    minutes = max(1, round(seconds / 60))
    if minutes < 20:
        return f"{minutes} min"
    if minutes < 60:
        return f"{5 * round(minutes / 5)} min" if minutes < 58 else "1 h"
    hours, rest = divmod(10 * round(minutes / 10), 60)
    return f"{hours} h {rest} min" if rest and hours < 10 else f"{round(minutes / 60)} h"


def rough_age(seconds: float) -> str:
    """Return an age in its largest unit: '3 min', '5 hours', '1 day', '12 weeks'."""
    for unit, length in (("week", 7 * 86400), ("day", 86400), ("hour", 3600)):
        if seconds >= (2 if unit == "week" else 1) * length:
            count = int(seconds // length)
            return f"{count} {unit}{'' if count == 1 else 's'}"
    return f"{max(1, round(seconds / 60))} min"


def epoch_seconds(timestamp: str) -> float | None:
    """Return an ISO 8601 timestamp as seconds since the epoch; None if it is not one, as in a manifest written by hand."""
    try:
        return datetime.fromisoformat(timestamp).astimezone(UTC).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def age_since(timestamp: str, now: float) -> str:
    """Return the age of what was made at `timestamp` (ISO 8601) at the time `now` (seconds since the epoch); "" if unknown."""
    made_at = epoch_seconds(timestamp)
    return "" if made_at is None else rough_age(now - made_at)
