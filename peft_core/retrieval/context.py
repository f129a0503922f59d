"""Retrieved units as text before a prompt: comments, with the path of each, the best one nearest to the prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peft_core.data.languages import NO_COMMENT, Language, language_named
from peft_core.data.path_header import path_comment
from peft_core.retrieval.units import CodeUnit

MAX_CONTEXT_TOKENS = 768
CANDIDATES = 8  # units that are considered; the first ones that fit are used
QUERY_LINES = 16  # the last lines of a prompt


@dataclass(frozen=True)
class Context:
    """What is put before a prompt."""

    text: str = ""
    units: tuple[tuple[CodeUnit, int], ...] = ()  # the best one first, each with its tokens
    too_long: int = 0  # units that did not fit

    @property
    def tokens(self) -> int:
        return sum(tokens for _, tokens in self.units)


def last_lines(prompt: str) -> str:
    """Return the part of a prompt that is searched for."""
    lines = [line for line in prompt.splitlines() if line.strip()]
    return "\n".join(lines[-QUERY_LINES:])


def compose(best: Sequence[CodeUnit], *, prompt: str, count: Callable[[str], int], budget: int) -> Context:
    """Return as many of the units as fit.

    Args:
        best: The best one first. Those that the prompt contains are left out.
        prompt: The text that the units will precede.
        count: Returns the tokens of a text.
        budget: Tokens.
    """
    parts: list[str] = []
    used: list[tuple[CodeUnit, int]] = []
    too_long = 0
    new = [unit for unit in best if unit.text.strip() not in prompt]
    for unit in new:
        part = as_comment(unit, language_named(new[0].language))
        tokens = count(part)
        if tokens > budget:
            too_long += 1
            continue
        budget -= tokens
        parts.insert(0, part)
        used.append((unit, tokens))
    return Context("".join(parts), tuple(used), too_long)


def as_comment(unit: CodeUnit, language: Language) -> str:
    """Return a unit as comments of a language, its path first. A language without known comments gets the code as it is."""
    opens, closes = ("", "") if language.comment == NO_COMMENT else language.comment
    lines = unit.text.strip("\n").splitlines()
    if closes:
        lines = [line.replace(closes.strip(), "\N{REPLACEMENT CHARACTER}") for line in lines]
    commented = "".join(f"{opens}{line}{closes}".rstrip() + "\n" for line in lines)
    return f"{path_comment(unit.path, language)}{commented}\n"
