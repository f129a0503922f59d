"""Positions in a file at which an editor would ask for a completion, and what is to be predicted there.

Lines are those of `completion_points.find_lines` in the rows that are held out. Three kinds are counted: all; those that use a
name of the project; and first lines of blocks. Names of the project are also counted one by one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from peft_core.data.chunking import split_lines
from peft_core.data.name_uses import FileSyntax, NameUse
from peft_core.evaluation.worker.completion_points import Offsets, find_lines
from peft_core.schemas.dataset import HeldOutFile
from peft_core.schemas.evaluation import InFileMetric

# What a row ends with that opens a block, before a comment.
_COLON_OPENS = re.compile(r":\s*(?:#.*)?$")
_OPENS = re.compile(r"(?:[:{|]|=>|->|\b(?:do|then|else|begin|try))\s*(?:(?:#|//|--).*)?$")
_INDENTED = frozenset({"python", "cython", "gdscript", "nim"})  # languages in which a brace opens no block
_NO_CODE = tuple("#/*\"'")  # how comments and docstrings begin


@dataclass(frozen=True)
class Target:
    """Tokens first..last-1, which are to be predicted from all tokens before them, and how they must end."""

    metrics: tuple[InFileMetric, ...]
    row: int
    first: int
    last: int
    ends: bool  # the last token includes the end, or else token `last` must be predicted to end the line or the name

    @property
    def is_name(self) -> bool:
        return self.metrics == (InFileMetric.PROJECT_NAMES,)

    @property
    def stop(self) -> int:
        """The end of the tokens that it needs."""
        return self.last + (not self.ends)


def find_targets(file: HeldOutFile, offsets: Offsets, syntax: FileSyntax, names: frozenset[str]) -> list[Target]:
    """Return what is measured in a tokenised file, in order.

    Args:
        file: Its text, and the rows in which is measured.
        offsets: Of its tokens.
        syntax: Of the file.
        names: Of the project, see `names.project_names`.
    """
    held_out = {row for start, stop in file.rows for row in range(start, stop)}
    rows = split_lines(file.text)
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    used = [use for use in syntax.uses if not use.is_definition and file.text[use.start : use.end] in names]
    named = list(_name_targets(used, offsets, starts, held_out))
    rows_with_names = {target.row for target in named}
    opens = _COLON_OPENS if file.language in _INDENTED else _OPENS
    opened = set(_first_rows_of_blocks(rows, syntax.prose, opens))
    lines = [
        Target(
            (
                InFileMetric.LINES,
                *([InFileMetric.PROJECT_LINES] if line.row in rows_with_names else ()),
                *([InFileMetric.BLOCK_STARTS] if line.row in opened else ()),
            ),
            line.row,
            line.first,
            line.last,
            ends=line.includes_newline,
        )
        for line in find_lines(file.text, offsets)
        if line.row in held_out
    ]
    found = [target for target in (*lines, *named) if target.stop <= len(offsets)]
    return sorted(found, key=lambda target: (target.first, target.last))


def _name_targets(
    uses: Sequence[NameUse], offsets: Offsets, starts: Sequence[int], held_out: set[int]
) -> Iterator[Target]:
    token, row = 0, 0
    for use in uses:
        while starts[row + 1] <= use.start:
            row += 1
        while token < len(offsets) and offsets[token][1] <= use.start:
            token += 1
        last = token
        while last < len(offsets) and offsets[last][0] < use.end:
            last += 1
        if row in held_out and last > token > 0 and offsets[last - 1][1] >= use.end:
            yield Target((InFileMetric.PROJECT_NAMES,), row, token, last, ends=offsets[last - 1][1] > use.end)


def _first_rows_of_blocks(rows: Sequence[str], prose: Collection[int], opens: re.Pattern[str]) -> Iterator[int]:
    """Yield the first rows of code behind rows that open a block, if they are indented further. Prose is no code."""
    opener = ""
    for number, row in enumerate(rows):
        visible = row.lstrip()
        if not visible or number in prose:
            continue
        indent = len(row) - len(visible)
        if opener and indent > len(opener) - len(opener.lstrip()) and not visible.startswith(_NO_CODE):
            yield number
        opener = row if opens.search(row) else ""
