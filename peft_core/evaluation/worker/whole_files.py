"""Held-out files as tokens, from which windows and prompts are cut between rows."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

from peft_core.base_models.tokenizer import BaseTokenizer
from peft_core.data.chunking import split_lines
from peft_core.data.languages import language_named
from peft_core.data.path_header import path_comment
from peft_core.evaluation.worker.completion_points import Offsets
from peft_core.schemas.dataset import HeldOutFile, Segment

_HEADER_SHARE = 4


@dataclass(frozen=True, eq=False)
class TokenisedFile:
    file: HeldOutFile
    path_comment: str  # empty if it would take more than a quarter of the length
    header: tuple[int, ...]  # the same as tokens
    ids: tuple[int, ...]
    offsets: Offsets  # of the tokens in the file's text
    first_of_row: tuple[int, ...]  # the first token that begins in each row or later; at the end, the number of tokens

    def row_start(self, token: int) -> int:
        """Return the last token up to this one with which a row begins."""
        return max(first for first in self.first_of_row if first <= max(0, token))


def tokenise_file(file: HeldOutFile, tokenizer: BaseTokenizer, length: int) -> TokenisedFile:
    """Tokenise a file for windows or prompts of this many tokens."""
    comment = path_comment(file.path, language_named(file.language))
    header, body = tokenizer.encode([Segment(text=comment, literal=True), Segment(text=file.text, literal=True)])
    begins = [begin for begin, _ in body.offsets]
    has_header = _HEADER_SHARE * len(header.ids) <= length
    starts = accumulate(map(len, split_lines(file.text)), initial=0)
    return TokenisedFile(
        file=file,
        path_comment=comment if has_header else "",
        header=tuple(header.ids if has_header else ()),
        ids=tuple(body.ids),
        offsets=body.offsets,
        first_of_row=tuple(bisect_left(begins, start) for start in starts),
    )
