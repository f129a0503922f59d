"""Prompts from held-out text, which models complete by writing.

In a file, a prompt is what an editor sends: the path, what precedes in the file, and for a base model with fill-in-the-middle
(FIM) tokens what follows. Records have no file: their prompt is their own text.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peft_core.base_models.tokenizer import BaseTokenizer
from peft_core.data.chunking import split_lines
from peft_core.evaluation.summary import QuotedPrompt
from peft_core.evaluation.worker.completion_points import (
    EXPECTED_LINES,
    CompletionPoint,
    find_completion_points,
    sample_completion_points,
)
from peft_core.evaluation.worker.scoring import HeldOutExample
from peft_core.evaluation.worker.whole_files import TokenisedFile, tokenise_file
from peft_core.schemas.dataset import HeldOutFile

MAX_NEW_TOKENS = 32
_PROMPT_TOKENS = 192  # of a record: the last ones before the completion point
_FILE_PROMPT_TOKENS = 320
_SUFFIX_SHARE = 4  # what follows takes at most 1/4 of them
_MARKS = 4  # tokens for beginning, prefix, suffix and middle
_QUOTED_PROMPT_LINES = 6  # in the report


@dataclass(frozen=True)
class Prompt:
    ids: tuple[int, ...]
    quoted: QuotedPrompt

    @property
    def fills_gap(self) -> bool:
        """What follows is in the prompt, too: a model can know where to stop."""
        return self.quoted.fills_gap


def choose_prompts(
    examples: Sequence[HeldOutExample], limit: int, max_tokens: int, seed: int, tokenizer: BaseTokenizer
) -> list[Prompt]:
    """Choose at most `limit` prompts from examples that one model can complete within `max_tokens`, prompts included."""
    points = [example.completion_points for example in examples]
    candidates = (
        _prompt_of_example(examples[index], point, tokenizer)
        for index, point in sample_completion_points(points, limit, seed)
    )
    return _within(candidates, max_tokens)


def choose_file_prompts(
    files: Sequence[HeldOutFile], limit: int, max_tokens: int, seed: int, tokenizer: BaseTokenizer
) -> list[Prompt]:
    """Choose at most `limit` prompts in whole files, in the same way."""
    order = random.Random(f"files/{seed}").sample(files, len(files))  # noqa: S311 -- a sample, not a secret
    tokenised = [tokenise_file(file, tokenizer, _FILE_PROMPT_TOKENS) for file in order]
    points = [_points(file) for file in tokenised]
    candidates = (
        _prompt_of_file(tokenised[index], point, tokenizer)
        for index, point in sample_completion_points(points, limit, seed)
    )
    return _within(candidates, max_tokens)


def _within(candidates: Iterable[Prompt], max_tokens: int) -> list[Prompt]:
    prompts: list[Prompt] = []
    for prompt in candidates:
        max_tokens -= len(prompt.ids) + MAX_NEW_TOKENS
        if max_tokens < 0:
            break
        prompts.append(prompt)
    return prompts


def _prompt_of_example(example: HeldOutExample, point: CompletionPoint, tokenizer: BaseTokenizer) -> Prompt:
    ids = example.document.ids_T[: point.first].tolist()
    if len(ids) > _PROMPT_TOKENS:
        ids = [*tokenizer.beginning, *ids[-_PROMPT_TOKENS:]]
    first_line = example.example.start_line
    line = first_line + point.row if first_line else 0
    return Prompt(tuple(ids), _quote(example.example.path, line, tokenizer.text(ids), point.expected))


def _points(file: TokenisedFile) -> list[CompletionPoint]:
    """Return the points in held-out rows. Of the expected lines, there are as many as a model can write."""
    rows = split_lines(file.file.text)
    last_row = {row: stop for start, stop in file.file.rows for row in range(start, stop)}
    points = []
    for point in find_completion_points(file.file.text, file.offsets):
        stop = min(last_row.get(point.row, 0), point.row + EXPECTED_LINES)
        while (
            stop > point.row and file.first_of_row[stop] - point.first > MAX_NEW_TOKENS - 2
        ):  # and a token to end with
            stop -= 1
        if stop > point.row:
            points.append(CompletionPoint(point.row, point.first, "".join(rows[point.row : stop])))
    return points


def _prompt_of_file(file: TokenisedFile, point: CompletionPoint, tokenizer: BaseTokenizer) -> Prompt:
    """Return the prompt with as much of the file as fits, from the beginning of a row."""
    marks = tokenizer.fill_in_the_middle
    free_tokens = _FILE_PROMPT_TOKENS - len(file.header) - _MARKS
    after: tuple[int, ...] = ()
    if marks is not None:
        follows = file.first_of_row[point.row + len(split_lines(point.expected))]
        after = file.ids[follows : follows + free_tokens // _SUFFIX_SHARE]
    start = max(0, point.first - free_tokens + len(after))
    start = next(first for first in file.first_of_row if first >= start)
    before = file.ids[min(start, point.first) : point.first]
    quoted = _quote(file.file.path, point.row + 1, tokenizer.text(before), point.expected, fills_gap=marks is not None)
    ids = (*file.header, *before)
    if marks is not None:
        # Where the middle needs no mark, its id is not used.
        prefix, suffix, middle = (tokenizer.tokenizer.token_to_id(mark) or 0 for mark in marks[:3])
        ids = (prefix, *ids, suffix, *after, middle) if marks.middle else (suffix, *after, prefix, *ids)
    return Prompt((*tokenizer.beginning, *ids), quoted)


def _quote(path: str, line: int, text: str, expected: str, *, fills_gap: bool = False) -> QuotedPrompt:
    """Return the last lines of a prompt, for people."""
    visible = text.rstrip(" \t")
    return QuotedPrompt(
        file=path,
        line=line,
        text="\n".join(visible.splitlines()[-_QUOTED_PROMPT_LINES:]),
        indentation=text[len(visible) :],
        expected=expected,
        fills_gap=fills_gap,
    )
