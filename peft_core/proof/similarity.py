"""How near a written text comes to the real one."""

from __future__ import annotations

from rapidfuzz import fuzz


def edit_similarity(written: str, expected: str) -> float:
    """0 to 1: twice the characters in common, in order, over all characters, as CrossCodeEval and RepoBench measure it.

    Indentation and blank ends of lines do not count.
    """
    return float(fuzz.ratio(_visible(written), _visible(expected))) / 100


def _visible(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if line.strip())
