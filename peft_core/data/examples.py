"""Turn one file or one record into examples, and count what is left out of it and why.

In: a `File` or a `Record`, a token counter, and max_length (tokens per example). Out: a `FileResult`.

- A file is read, its secrets are redacted, and it is split into code units (`chunking.py`). Each unit becomes one `Chunk`, or
  several if it is too long. A chunk is a path header, the headers of the enclosing definitions, and its own text. Only its own
  text is learned (`learn=False` for the rest): the headers say where the text belongs, and a class header that is repeated
  above each of twenty methods must not be learned twenty times.
- A record with plain text or a code chunk is one unit. A prompt with its completion, or a conversation, is never split: it
  becomes one example, or is left out if it is too long.
- Parts of good files that teach no code are left out: licence headers and tables of data. (Generated, minified and binary
  files have been excluded before, by `walk.py` and `read_text.py`.)
"""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from peft_core.data.chunking import (
    LICENCE,
    CodeUnit,
    TokenBudget,
    break_ranks,
    single_unit,
    split_into_units,
    split_lines,
)
from peft_core.data.classification import NOTEBOOK
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.languages import Language, language_named, language_of_text
from peft_core.data.notebook import SourcePart, read_notebook
from peft_core.data.path_header import path_comment
from peft_core.data.read_text import read_text
from peft_core.data.records import RECORD, Record, RecordFormat
from peft_core.data.secrets import Finding
from peft_core.data.token_counter import TokenCounter
from peft_core.data.walk import File
from peft_core.errors import DataError
from peft_core.schemas.dataset import Example, Segment

MIN_ANSWER_WORDS = 8
MIN_TOKENS = 8  # a shorter text is not worth learning
RESERVED_TOKENS = 2  # end-of-text, and the beginning-of-text token that some base models need
_PATH_SHARE = 4  # the path header takes at most 1/4 of max_length

# Takes lines; returns the lines without secrets, and the findings. `secrets.redact_secrets`, or `keep_secrets` for an estimate.
Redact = Callable[[Sequence[str]], tuple[list[str], list[Finding]]]


@dataclass(slots=True)
class FileResult:
    """The examples of one file or record, and what was removed from it."""

    examples: list[Example] = field(default_factory=list)
    not_read: ExclusionReason | None = None  # why no part of a file was read; `left_out` counts it, too
    left_out: Counter[str] = field(default_factory=Counter)  # by `ExclusionReason`
    secrets: list[tuple[str, int, str]] = field(default_factory=list)  # file, line, type
    definitions: int = 0  # functions, methods and classes, as `chunking.SplitFile` counts them
    text: str = ""  # all code of a file, without secrets


def keep_secrets(lines: Sequence[str]) -> tuple[list[str], list[Finding]]:
    return list(lines), []


def examples_from_file(file: File, *, token_counter: TokenCounter, max_length: int, redact: Redact) -> FileResult:
    result = FileResult()
    path = printable_path(file.name)
    if _name_is_secret(path, result, redact):
        return result
    parts = parts_of_file(file, path, result)
    if isinstance(parts, ExclusionReason):
        result.not_read = parts
        result.left_out[parts] += 1
        return result
    for part in parts:
        lines, findings = redact(part.lines)
        result.secrets += [(path, part.line_number(finding.row), finding.type) for finding in findings]
        chunks, definitions = chunk_file(
            lines, path=path, language=part.language, token_counter=token_counter, max_length=max_length
        )
        result.definitions += definitions
        result.text += "".join(lines)
        if not chunks:
            result.left_out[ExclusionReason.NO_CODE] += 1
            result.not_read = ExclusionReason.NO_CODE if len(parts) == 1 else None
        for chunk in chunks:
            if chunk.body_tokens < MIN_TOKENS:
                result.left_out[ExclusionReason.TINY] += 1
            elif reason := rejection_reason(chunk.unit, chunk.body):
                result.left_out[reason] += 1
            else:
                result.examples.append(part.with_line_numbers(chunk.example(path, part.language)))
    return result


def parts_of_file(file: File, path: str, result: FileResult) -> list[SourcePart] | ExclusionReason:
    """Return the code of a file: all of it, or that of a notebook by language. What is left out is counted in `result`."""
    if file.language is NOTEBOOK:
        notebook = read_notebook(file.path)
        if isinstance(notebook, ExclusionReason):
            return notebook
        result.left_out.update(notebook.left_out)
        return notebook.parts
    text = read_text(file.path, generated=file.is_named)
    if isinstance(text, ExclusionReason):
        return text
    language = language_of_text(path, text, file.language)
    return ExclusionReason.NO_CODE if language is None else [SourcePart(language, split_lines(text))]


def examples_from_record(
    record: Record,
    *,
    token_counter: TokenCounter,
    max_length: int,
    redact: Redact,
    root: str = "",
    skip: bool = False,
) -> FileResult:
    """Turn a record into examples. `root`, the common directory of absolute paths, is private and removed from them.

    With `skip`, a conversation that the base model's chat template does not write is left out and counted.

    Raises:
        DataError: such a conversation, without `skip`.
    """
    result = FileResult()
    path = os.path.relpath(record.path, root) if root and record.path.startswith("/") else record.path
    path = printable_path(path.lstrip("/"))
    if path and _name_is_secret(path, result, redact):
        return result
    lines, findings = redact(split_lines(record.content))
    result.secrets += [(path or record.name, finding.row + 1, finding.type) for finding in findings]
    if record.format not in (RecordFormat.TEXT, RecordFormat.CHUNK):
        if findings:  # with the secret blanked, the pair would teach the blank
            result.left_out[ExclusionReason.SECRET] += 1
        else:
            _add_unsplit_record(record, path or record.name, result, token_counter, max_length, skip=skip)
        return result
    if not any(line.strip() for line in lines):
        result.left_out[ExclusionReason.SECRET] += 1
        return result
    language = language_named(record.language)
    is_code_chunk = record.format is RecordFormat.CHUNK
    chunks = chunk_record(
        lines,
        path=path if is_code_chunk else "",
        language=language,
        kind=record.kind,
        token_counter=token_counter,
        max_length=max_length,
    )
    first_line = max(1, record.start_line)
    # The text of other records is not literal: it may have been rendered with the special tokens of this base model.
    result.examples += [
        chunk.example(path or record.name, language, first_line=first_line, literal=is_code_chunk) for chunk in chunks
    ]
    return result


def _add_unsplit_record(
    record: Record, path: str, result: FileResult, token_counter: TokenCounter, max_length: int, *, skip: bool
) -> None:
    try:
        renderings = render_record(record, token_counter)
    except DataError as error:
        if not skip or error.code != "chat_template":
            raise
        result.left_out[ExclusionReason.CHAT_TEMPLATE] += 1
        return
    for segments in renderings:
        tokens = token_counter.count([segment.text for segment in segments])
        fitting = fitting_segments(segments, tokens, max_length)
        if fitting.segments:
            example = Example(
                segments=segments[: fitting.segments],
                path=path,
                language=record.language,
                kind=record.kind,
                tokens=fitting.tokens + 1,
            )
            result.examples.append(example)
            result.left_out[ExclusionReason.TURNS_TOO_LONG] += fitting.turns_left_out
        else:
            result.left_out[ExclusionReason.TOO_LONG] += 1


def render_record(record: Record, token_counter: TokenCounter) -> tuple[tuple[Segment, ...], ...]:
    """Return the segments of each example of a record that is never split: a conversation, or a prompt with its answer.

    Raises:
        DataError: the base model's chat template does not write the conversation. The error names the record.
    """
    if record.conversation is None or not (token_counter.has_chat_template or record.needs_chat_template):
        return (tuple(Segment(text=text, learn=learn) for text, learn in record.texts),)
    try:
        return token_counter.render_chat(record.conversation)
    except DataError as error:
        raise DataError(
            f"{record.name[:1].upper()}{record.name[1:]} cannot be used: {error.message}",
            code=error.code,
            suggestions=error.suggestions,
            details={"record": record.name},
        ) from error


class Fitting(NamedTuple):
    """How much of a rendering fits into an example."""

    segments: int  # 0: not even its first answer fits
    tokens: int
    turns_left_out: int


def fitting_segments(segments: Sequence[Segment], tokens: Sequence[int], max_length: int) -> Fitting:
    """Return how much of a rendering fits: all of it, or the turns up to the last answer that fits.

    The beginning of a conversation is complete context for the answers in it; the rest has no context without it.
    """
    ends = [
        position + 1
        for position, segment in enumerate(segments)
        if segment.learn and (position + 1 == len(segments) or not segments[position + 1].learn)
    ]
    fitting = Fitting(0, 0, len(ends))
    for count, end in enumerate(ends, 1):
        used = sum(tokens[:end])
        if used + RESERVED_TOKENS <= max_length:
            fitting = Fitting(end, used, len(ends) - count)
    return fitting


def _name_is_secret(path: str, result: FileResult, redact: Redact) -> bool:
    _, findings = redact([path])
    if findings:
        result.left_out[ExclusionReason.SECRET] += 1
        result.secrets += [("(a file whose name holds it)", 0, finding.type) for finding in findings]
    return bool(findings)


def printable_path(name: str) -> str:
    """Return a file name that can be encoded: bytes that are not UTF-8 become replacement characters."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


# What deduplication and the leakage check look at.


def is_dedupable(example: Example) -> bool:
    """Return whether near duplicates of an example may be removed.

    Of prompt-completion pairs only exact duplicates are: answers to different questions may be nearly the same, and questions
    may share most of a long instruction.
    """
    return example.kind != RECORD or all(segment.learn for segment in example.segments)


def learned_answer(example: Example) -> str | None:
    """Return the answer that a record teaches.

    None if the record has no prompt, and for an answer that means little without its prompt: a label, or yes or no.
    """
    if example.kind != RECORD or all(segment.learn for segment in example.segments):
        return None
    learned = "".join(segment.text for segment in example.segments if segment.learn)
    return learned if len(learned.split()) >= MIN_ANSWER_WORDS else None


def learned_text(example: Example) -> str:
    """Return the text that decides whether an example, or another one like it, was trained on."""
    learned = "".join(segment.text for segment in example.segments if segment.learn)
    if example.kind != RECORD or learned == example.text or learned_answer(example) is not None:
        return learned
    return " ".join(example.text.split())  # as one line, because prompts may have most of their lines in common


# Units to chunks of at most max_length tokens.


@dataclass(frozen=True, slots=True)
class Chunk:
    """A code unit, or a part of one that fits. The bodies of a unit's chunks, joined, are the text of the unit."""

    unit: CodeUnit
    context: str  # the path header and the headers of enclosing definitions
    body: str
    start: int  # row of the body's first line, 0-based
    end: int  # row after the body's last line
    body_tokens: int
    tokens: int  # of context and body, plus end-of-text if the unit ends here
    ends: bool  # whether this is the last chunk of its unit

    def example(self, path: str, language: Language, *, first_line: int = 1, literal: bool = True) -> Example:
        context = (Segment(text=self.context, learn=False, literal=literal),) if self.context else ()
        return Example(
            segments=(*context, Segment(text=self.body, literal=literal)),
            path=path,
            language=language.name,
            kind=self.unit.kind,
            start_line=first_line + self.start,
            end_line=first_line + self.end - 1,
            tokens=self.tokens,
            ends=self.ends,
        )


def chunk_file(
    lines: Sequence[str], *, path: str, language: Language, token_counter: TokenCounter, max_length: int
) -> tuple[list[Chunk], int]:
    """Split a file into chunks of at most max_length tokens, including path header and end-of-text; count its definitions."""
    header, budget = _token_budget(lines, path, language, token_counter, max_length)
    units, definitions = split_into_units(lines, language, budget)
    return _chunks(lines, units, budget, token_counter, path_header=header), definitions


def chunk_record(
    lines: Sequence[str], *, path: str, language: Language, kind: str, token_counter: TokenCounter, max_length: int
) -> list[Chunk]:
    """Return a text that was split by another tool as one chunk, or as several if it is too long."""
    header, budget = _token_budget(lines, path, language, token_counter, max_length)
    return _chunks(lines, [single_unit(lines, language, kind)], budget, token_counter, path_header=header)


def _token_budget(
    lines: Sequence[str], path: str, language: Language, token_counter: TokenCounter, max_length: int
) -> tuple[str, TokenBudget]:
    header = path_header(path, language, token_counter, max_length)
    header_cost, *costs = token_counter.count([header, *lines])
    return header, TokenBudget.of(costs, max_length=max_length, overhead=header_cost + RESERVED_TOKENS)


def path_header(path: str, language: Language, token_counter: TokenCounter, max_length: int) -> str:
    """Return the path as a comment line; of a path that would take too many tokens only the last parts."""
    parts = path.split("/")
    shortened = [f"\N{HORIZONTAL ELLIPSIS}/{'/'.join(parts[start:])}" for start in range(1, len(parts))]
    shortened += [f"\N{HORIZONTAL ELLIPSIS}{parts[-1][-length:]}" for length in (24, 8)]
    candidates = [path_comment(shown, language) for shown in (path, *shortened)]
    allowed = max_length // _PATH_SHARE
    return next((header for header in candidates if token_counter.count([header])[0] <= allowed), "")


def _chunks(
    lines: Sequence[str],
    units: Sequence[CodeUnit],
    budget: TokenBudget,
    token_counter: TokenCounter,
    *,
    path_header: str,
) -> list[Chunk]:
    """Turn units into chunks.

    The tokens of the single rows only say roughly where to break a unit: rows may tokenise differently together. So the drafts
    are counted again, all in one batch, and split further where they are still too long.
    """
    drafts: list[tuple[CodeUnit, str, range]] = []
    for unit in units:
        for part in _row_ranges(lines, unit, budget):
            scopes = unit.scopes
            if unit.header is not None and part.start >= unit.header.stop:
                scopes = (*scopes, unit.header)
            headers = "".join("".join(lines[header.start : header.stop]) for header in budget.context(scopes))
            drafts.append((unit, path_header + headers, part))
    bodies = ["".join(lines[part.start : part.stop]) for _, _, part in drafts]
    counts = token_counter.count([*(context for _, context, _ in drafts), *bodies])
    chunks: list[Chunk] = []
    for (unit, context, part), body, context_tokens, body_tokens in zip(
        drafts, bodies, counts[: len(drafts)], counts[len(drafts) :], strict=True
    ):
        row, remaining = part.start, len(body)
        free_tokens = max(1, budget.max_length - context_tokens - RESERVED_TOKENS)
        for text, tokens in _halved(body, body_tokens, free_tokens, token_counter):
            end = row + text.count("\n") + (not text.endswith("\n"))
            remaining -= len(text)
            ends = part.stop == unit.end and remaining == 0
            chunks.append(Chunk(unit, context, text, row, end, tokens, context_tokens + tokens + ends, ends))
            row = end if text.endswith("\n") else end - 1
    return chunks


def _row_ranges(lines: Sequence[str], unit: CodeUnit, budget: TokenBudget) -> Iterator[range]:
    """Yield ranges of rows that fit the budget, broken at the best row in the second half of what would fit."""
    if budget.cost(unit.start, unit.end) <= budget.free_tokens(unit.scopes):
        yield range(unit.start, unit.end)
        return
    free_tokens = budget.free_tokens(unit.scopes if unit.header is None else (*unit.scopes, unit.header))
    ranks = break_ranks(lines, unit)
    start = unit.start
    while budget.cost(start, unit.end) > free_tokens:
        tokens_before = budget.tokens_before[start]
        furthest = bisect_right(budget.tokens_before, tokens_before + free_tokens, lo=start) - 1
        halfway = bisect_right(budget.tokens_before, tokens_before + free_tokens // 2, lo=start)
        end = start + 1
        if furthest > start:
            second_half = range(max(halfway, start + 1), furthest + 1) or range(start + 1, furthest + 1)
            end = min(second_half, key=lambda row: (ranks[row - unit.start], -row))
        if end >= unit.end:
            break
        yield range(start, end)
        start = end
    yield range(start, unit.end)


def _halved(text: str, tokens: int, max_tokens: int, token_counter: TokenCounter) -> Iterator[tuple[str, int]]:
    """Yield a text in parts that fit by an exact count, with their tokens.

    A text that is too long is halved at a line end, and a single line in the middle.
    """
    stack = [(text, tokens)]
    while stack:
        text, tokens = stack.pop()
        if tokens <= max_tokens or len(text) == 1:
            yield text, tokens
            continue
        middle = len(text) // 2
        line_end = text.rfind("\n", 0, middle) + 1 or text.find("\n", middle) + 1
        at = line_end if 0 < line_end < len(text) else middle
        halves = (text[:at], text[at:])
        stack.extend(zip(reversed(halves), reversed(token_counter.count(halves)), strict=True))


# Which chunks are worth learning.

# Applied to Python's standard library, tests included, these limits reject a sixth of the code outside of functions and classes
# (1091 of 6560 chunks: encodings, entities, tables of the tests), 11 of 3869 functions, and 351 of 29 935 methods (test data).
_MIN_WORDS = 40
_MIN_ROWS = 12
_MAX_NUMBER_SHARE = 0.5  # share of words that begin with a digit
_MAX_LITERAL_SHARE = 0.8  # share of rows that begin with a literal
_MAX_WORD_CHARACTERS = 200  # a longer word is encoded bytes, not a name
_WORD = re.compile(r"\w+")
_LITERAL = re.compile(r"""\s*[bruf]{0,2}["'`\d([{}\])+-]""", re.IGNORECASE)
_UNBROKEN = re.compile(rf"[A-Za-z0-9+/=\\]{{{_MAX_WORD_CHARACTERS},}}")


def rejection_reason(unit: CodeUnit, body: str) -> ExclusionReason | None:
    """Return why a chunk should not be learned from, or None if it should."""
    if unit.kind == LICENCE:
        return ExclusionReason.LICENCE
    return ExclusionReason.DATA if is_data_table(body) else None


def is_data_table(text: str) -> bool:
    """Return whether a text is a table of numbers or literals, or bytes that are written as text."""
    if _UNBROKEN.search(text):
        return True
    words = _WORD.findall(text)
    if len(words) >= _MIN_WORDS and sum(word[0].isdigit() for word in words) > _MAX_NUMBER_SHARE * len(words):
        return True
    rows = [row for row in text.split("\n") if row.strip()]
    literal_rows = sum(_LITERAL.match(row) is not None for row in rows)
    return len(rows) >= _MIN_ROWS and literal_rows > _MAX_LITERAL_SHARE * len(rows)
