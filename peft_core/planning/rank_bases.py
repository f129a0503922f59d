"""Rank the base models of a machine. Pure: every fact is an argument, and nothing is read.

The criteria, in this order:

1. *It can be trained here with default settings*: its training fits into the memory that is free now, and within the default
   limit of two hours it sees every example, or makes at least 100 steps. (The benchmarks' trainings of 100 steps lower the
   held-out loss on every code base.)
2. *Kind*: a model for code with tokens for fill-in-the-middle, then a model for code without, then another model with such
   tokens, then the rest. Editors send the text after the cursor as well, which only the first kind was trained to use.
   Whether a model is one for code is judged by its name: nothing else in its files says so. Vocabularies say less: those of
   Qwen2.5 and Qwen3 have the tokens in chat models, too.
3. *Size*: more parameters first. Within one family, published results on code rise with size (Qwen2.5-Coder Technical Report,
   arXiv 2409.12186). It is not measured here, and says nothing about models of different families.
4. *Precision*: of several copies of a model, the one with most bits per weight; the others are named beside it.

Nothing here is a measurement of quality on the user's code: `compare_adapters` and the verdict of a training are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MAX_RECOMMENDED = 3
ENOUGH_STEPS = 100
_CODE_WORD = re.compile(
    r"code|codex|\w*coder\d*|(?:codellama|codegemma|codeqwen|codegen|codegeex|codeshell|codestral|devstral|mellum)\w*"
)
_NO_CODE_WORD = re.compile(r"(?:auto)?(?:en|de)coder\d*")
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Candidate:
    """A base model that can be trained on this machine, by what the ranking compares."""

    name: str
    model: str  # equal for copies of one model
    is_code_model: bool
    fills_in_middle: bool
    parameters: int
    bits_per_weight: float
    fits_now: bool  # into the memory that is free
    sees_everything: bool  # a training with default settings sees every example, unless the user limits its steps
    steps: int  # of such a training

    @property
    def is_trained_enough(self) -> bool:
        return self.sees_everything or self.steps >= ENOUGH_STEPS

    @property
    def kind(self) -> int:
        """3: for code, with fill-in-the-middle; 2: for code; 1: with fill-in-the-middle; 0: another."""
        return 2 * self.is_code_model + self.fills_in_middle


def is_code_model(*names: str) -> bool:
    """Return whether one of these names of a base model is that of a model for code."""
    words = _WORD.findall(" ".join(names).lower())
    return any(_CODE_WORD.fullmatch(word) and not _NO_CODE_WORD.fullmatch(word) for word in words)


def rank(candidates: Iterable[Candidate]) -> list[list[Candidate]]:
    """Return the candidates in groups of copies of one model, the best group and the best copy first; see the module."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=_order):
        groups.setdefault(candidate.model, []).append(candidate)
    return list(groups.values())


def is_clearly_better(candidate: Candidate, default: Candidate) -> bool:
    """Return whether a candidate can be trained here, and is a model for code with fill-in-the-middle while the default is not.

    More parameters alone are no reason to depart from the default, which is trained much faster.
    """
    return candidate.fits_now and candidate.is_trained_enough and candidate.kind == 3 and not default.is_code_model


def _order(candidate: Candidate) -> tuple[bool, int, int, float, str]:
    can_be_trained = candidate.fits_now and candidate.is_trained_enough
    return (
        not can_be_trained,
        -candidate.kind,
        -candidate.parameters,
        -candidate.bits_per_weight,
        candidate.name,
    )
