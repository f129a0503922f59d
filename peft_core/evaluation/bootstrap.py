"""Paired bootstrap: how sure a difference between base and adapter is, given how few files it was measured on.

Both were measured on the same files, so files are drawn, each with both of its figures. Lines of one file resemble each
other; drawing lines instead would promise more than is known.
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

from peft_core.schemas.evaluation import Comparison

RESAMPLES = 2000
CONFIDENCE = 0.95
_DIGITS = 6  # what is told; the rest is rounding
MIN_UNITS = 5  # drawing from fewer tells nothing


@dataclass(frozen=True)
class PairedSum:
    """Sums over a part of the text: of base and adapter, and over how many tokens, lines or prompts."""

    base: float
    adapter: float
    weight: float

    def __add__(self, other: PairedSum) -> PairedSum:
        return PairedSum(self.base + other.base, self.adapter + other.adapter, self.weight + other.weight)


Unit = Literal["files", "examples"]


def unit_for(files: Iterable[Hashable]) -> Unit:
    """What to draw: files where there are enough of them, else the examples in them. `files`: one of each example."""
    return "files" if len(set(files)) >= MIN_UNITS else "examples"


def by_file(tallies: Iterable[tuple[Hashable, PairedSum]]) -> list[PairedSum]:
    """The sums of each file."""
    sums: dict[Hashable, PairedSum] = {}
    for file, tally in tallies:
        sums[file] = sums[file] + tally if file in sums else tally
    return list(sums.values())


def compare(tallies: Sequence[PairedSum], *, seed: int = 0) -> Comparison | None:
    """Means of base and adapter per unit of weight, their difference, and its confidence interval.

    Same tallies, same seed: same interval. None where nothing was measured.
    """
    tallies = [tally for tally in tallies if tally.weight > 0]
    if not tallies:
        return None
    total = sum(tallies[1:], tallies[0])
    change = _change(total)
    low, high = _interval(tallies, seed) if len(tallies) >= MIN_UNITS else (None, None)
    if low is not None and high is not None:  # rounding of sums must not put the change outside
        low, high = min(low, change), max(high, change)
    figures = {"base": total.base / total.weight, "adapter": total.adapter / total.weight, "change": change}
    figures |= {"low": low, "high": high} if low is not None and high is not None else {}
    return Comparison(**{name: round(value, _DIGITS) for name, value in figures.items()})


def _change(tally: PairedSum) -> float:
    return (tally.adapter - tally.base) / tally.weight


def _interval(tallies: Sequence[PairedSum], seed: int) -> tuple[float, float]:
    """Expanded percentile interval: plain percentiles are too narrow for few units (Hesterberg, arXiv 1411.5279, 3.3)."""
    generator = random.Random(f"bootstrap/{seed}")  # noqa: S311 -- a simulation, not a secret
    units = len(tallies)
    gains = [tally.adapter - tally.base for tally in tallies]
    weights = [tally.weight for tally in tallies]
    drawn = []
    for _ in range(RESAMPLES):
        chosen = generator.choices(range(units), k=units)
        drawn.append(sum(gains[unit] for unit in chosen) / sum(weights[unit] for unit in chosen))
    drawn.sort()
    tail = NormalDist().cdf(-math.sqrt(units / (units - 1)) * _student_quantile(units - 1))
    skipped = int(tail * RESAMPLES)
    return drawn[skipped], drawn[-1 - skipped]


def _student_quantile(freedom: int) -> float:
    """Two-sided quantile of Student's t at CONFIDENCE, to 2 % from four degrees of freedom on (Cornish-Fisher)."""
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
