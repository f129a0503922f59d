"""Counts in words."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return for instance "1 file" or "2 files"; `plural`: of the noun, if it is not the noun with an "s"."""
    return f"{count} {noun if count == 1 else plural or f'{noun}s'}"
