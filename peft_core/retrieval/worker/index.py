"""Lexical search (BM25, Robertson and Zaragoza 2009) over code units."""

from __future__ import annotations

from collections.abc import Sequence

import bm25s
import numpy as np

from peft_core.retrieval.units import CodeUnit
from peft_core.retrieval.words import words


class UnitIndex:
    """Finds units that share words with a text."""

    def __init__(self, units: Sequence[CodeUnit]) -> None:
        """Build the index. Units without a word cannot be found."""
        texts = [words(f"{unit.path}\n{unit.text}") for unit in units]
        self.units = [unit for unit, text in zip(units, texts, strict=True) if text]
        self._index = bm25s.BM25(method="lucene")
        if self.units:
            self._index.index([text for text in texts if text], show_progress=False)

    def best(self, query: str, count: int) -> list[CodeUnit]:
        """Return up to `count` units, the best first. Units that share no word with the query are never among them."""
        searched = words(query)
        if not self.units or not searched:
            return []
        scores_U = self._index.get_scores(searched)
        order = np.argsort(-scores_U, kind="stable")[:count]
        return [self.units[position] for position in order if scores_U[position] > 0]
