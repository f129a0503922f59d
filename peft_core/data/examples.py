"""One file or one record to examples, together with what was left out of it and which secrets were removed."""

from __future__ import annotations

import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from peft_core.data.chunking import (
    LICENCE,
    CodeUnit,
    TokenBudget,
    break_ranks,
    single_unit,
    split_into_units,
    split_lines,
)
from peft_core.data.languages import Language, language_named
from peft_core.data.read_text import read_text
from peft_core.data.records import RECORD, Record, RecordFormat
from peft_core.data.secrets import Finding
from peft_core.data.token_counter import TokenCounter
from peft_core.data.walk import ExclusionReason, File
from peft_core.errors import sanitize
from peft_core.schemas.dataset import Example, Segment

MIN_ANSWER_WORDS = 8

# Lines in, lines without secrets and the findings out: `secret_scan.redacted`, or `unchanged` for a first look.
Redact = Callable[[Sequence[str]], tuple[list[str], list[Finding]]]


@dataclass(slots=True)
class FileResult:
    """What came of a file or a record."""

    examples: list[Example] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    secrets: list[tuple[str, int, str]] = field(default_factory=list)  # file, line, type


def unchanged(lines: Sequence[str]) -> tuple[list[str], list[Finding]]:
    return list(lines), []


def examples_from_file(file: File, *, token_counter: TokenCounter, max_length: int, redact: Redact) -> FileResult:
    result = FileResult()
    path = printable_path(file.name)
    if _name_is_secret(path, result, redact):
        return result
    text = read_text(file.path)
    if isinstance(text, ExclusionReason):
        result.left_out[text] += 1
        return result
    lines, findings = redact(split_lines(text))
    result.secrets += [(path, finding.row + 1, finding.type) for finding in findings]
    pieces = chunk_file(lines, path=path, language=file.language, token_counter=token_counter, max_length=max_length)
    if not pieces:
        result.left_out[ExclusionReason.NO_CODE] += 1
    for piece in pieces:
        if piece.body_tokens < MIN_TOKENS:
            result.left_out[ExclusionReason.TINY] += 1
        elif why := rejection_reason(piece.unit, piece.body):
            result.left_out[why] += 1
        else:
            result.examples.append(piece.example(path, file.language))
    return result


def examples_from_record(
    record: Record,
    *,
    token_counter: TokenCounter,
    max_length: int,
    redact: Redact,
    root: str = "",
) -> FileResult:
    """`root`: what absolute paths of records begin with; it is nobody's business and stays out."""
    result = FileResult()
    path = os.path.relpath(record.path, root) if root and record.path.startswith("/") else record.path
    path = printable_path(path.lstrip("/"))
    if path and _name_is_secret(path, result, redact):
        return result
    lines, findings = redact(split_lines(record.content))
    result.secrets += [(path or record.name, finding.row + 1, finding.type) for finding in findings]
    if record.form not in (RecordFormat.TEXT, RecordFormat.CHUNK):
        if findings:  # a pair with a hole in it teaches the hole
            result.left_out[ExclusionReason.SECRET] += 1
        else:
            _whole_record(record, path or record.name, result, token_counter, max_length)
        return result
    if not any(line.strip() for line in lines):
        result.left_out[ExclusionReason.SECRET] += 1
        return result
    language = language_named(record.language)
    header = path if record.form is RecordFormat.CHUNK else ""
    pieces = chunk_record(
        lines,
        path=header,
        language=language,
        kind=record.kind,
        token_counter=token_counter,
        max_length=max_length,
    )
    first_line = max(1, record.start_line)
    literal = record.form is RecordFormat.CHUNK  # the text of other records may have been rendered for this very base
    result.examples += [
        piece.example(path or record.name, language, first_line=first_line, literal=literal) for piece in pieces
    ]
    return result


def is_dedupable(example: Example) -> bool:
    """Whether its near duplicates teach nothing new. Pairs are left alone, except by equal ones: answers to different
    questions may be nearly the same, and questions may share most of a long instruction.
    """
    return example.kind != RECORD or all(segment.learn for segment in example.segments)


def learned_answer(example: Example) -> str | None:
    """What a record teaches, whatever it is asked; None where it is asked nothing, and for an answer so short that it is one
    only together with its question: a label, yes or no.
    """
    if example.kind != RECORD or all(segment.learn for segment in example.segments):
        return None
    learned = "".join(segment.text for segment in example.segments if segment.learn)
    return learned if len(learned.split()) >= MIN_ANSWER_WORDS else None


def learned_text(example: Example) -> str:
    """The text by which it is told whether something was trained on."""
    learned = "".join(segment.text for segment in example.segments if segment.learn)
    if example.kind != RECORD or learned == example.text or learned_answer(example) is not None:
        return learned
    return " ".join(example.text.split())  # one line: questions may have most of theirs in common


def printable_path(name: str) -> str:
    """A file name that can be written down: bytes that are no text become replacement characters."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _whole_record(record: Record, path: str, result: FileResult, token_counter: TokenCounter, max_length: int) -> None:
    if record.messages:
        segments = token_counter.render_chat(record.messages)
    else:
        segments = tuple(Segment(text=text, learn=learn) for text, learn in record.texts)
    tokens = sum(token_counter.count([segment.text for segment in segments]))
    if tokens + RESERVED > max_length:
        result.left_out[ExclusionReason.TOO_LONG] += 1
        return
    example = Example(segments=segments, path=path, language=record.language, kind=record.kind, tokens=tokens + 1)
    result.examples.append(example)


def _name_is_secret(path: str, result: FileResult, redact: Redact) -> bool:
    _, findings = redact([path])
    if findings:
        result.left_out[ExclusionReason.SECRET] += 1
        result.secrets += [("(a file whose name holds it)", 0, finding.type) for finding in findings]
    return bool(findings)


# FOLDED FROM peft_core.data.examples: Units to examples of at most max_length tokens: a path header, the heads around
# the unit, its text.
#
# Header and context are given, not learned (`learn=False`): they say where the text stands, and a head that is repeated over
# each of twenty methods must not be learned twenty times.
#

MIN_TOKENS = 8  # of a text that is worth learning
RESERVED = 2  # end-of-text, and the beginning-of-text token that some bases want
_HEADER_SHARE = 4  # of max_length, at most, for the path


@dataclass(frozen=True, slots=True)
class Chunk:
    """A unit, or the part of it that fits; the bodies of a unit's pieces, joined, are the unit."""

    unit: CodeUnit
    context: str
    body: str
    start: int  # row
    end: int
    body_tokens: int
    tokens: int  # of everything, with end-of-text where the unit ends
    ends: bool  # whether this is the last of the unit

    def example(self, path: str, language: Language, *, first_line: int = 1, literal: bool = True) -> Example:
        given = (Segment(text=self.context, learn=False, literal=literal),) if self.context else ()
        return Example(
            segments=(*given, Segment(text=self.body, literal=literal)),
            path=path,
            language=language.name,
            kind=self.unit.kind,
            start_line=first_line + self.start,
            end_line=first_line + self.end - 1,
            tokens=self.tokens,
            ends=self.ends,
        )


def chunk_file(
    lines: Sequence[str],
    *,
    path: str,
    language: Language,
    token_counter: TokenCounter,
    max_length: int,
) -> list[Chunk]:
    """Cut a file into pieces that fit, header and end-of-text counted."""
    header, budget = _token_budget(lines, path, language, token_counter, max_length)
    return fit_units(lines, split_into_units(lines, language, budget), budget, language, token_counter, header=header)


def chunk_record(
    lines: Sequence[str],
    *,
    path: str,
    language: Language,
    kind: str,
    token_counter: TokenCounter,
    max_length: int,
) -> list[Chunk]:
    """A text that somebody else has cut already: one piece, unless it is too long."""
    header, budget = _token_budget(lines, path, language, token_counter, max_length)
    return fit_units(lines, [single_unit(lines, language, kind)], budget, language, token_counter, header=header)


def _token_budget(
    lines: Sequence[str],
    path: str,
    language: Language,
    token_counter: TokenCounter,
    max_length: int,
) -> tuple[str, TokenBudget]:
    header = path_header(path, language, token_counter, max_length)
    header_cost, *costs = token_counter.count([header, *lines])
    return header, TokenBudget.of(costs, max_length=max_length, overhead=header_cost + RESERVED)


def fit_units(
    lines: Sequence[str],
    units: Sequence[CodeUnit],
    budget: TokenBudget,
    language: Language,
    token_counter: TokenCounter,
    *,
    header: str,
) -> list[Chunk]:
    """Pieces of units; what rows cost one by one is near enough to split by, the last word is a count of the whole."""
    drafts: list[tuple[CodeUnit, str, range]] = []
    for unit in units:
        for part in _parts(lines, unit, budget, language):
            scopes = unit.scopes
            if unit.header is not None and part.start >= unit.header.stop:
                scopes = (*scopes, unit.header)
            heads = "".join("".join(lines[head.start : head.stop]) for head in budget.context(scopes))
            drafts.append((unit, header + heads, part))
    bodies = ["".join(lines[part.start : part.stop]) for _, _, part in drafts]
    counts = token_counter.count([*(context for _, context, _ in drafts), *bodies])
    result: list[Chunk] = []
    for (unit, context, part), body, context_tokens, body_tokens in zip(
        drafts,
        bodies,
        counts,
        counts[len(drafts) :],
        strict=False,
    ):
        row, rest = part.start, len(body)
        for text, tokens in _halved(
            body,
            body_tokens,
            max(1, budget.max_length - context_tokens - RESERVED),
            token_counter,
        ):
            end = row + text.count("\n") + (not text.endswith("\n"))
            rest -= len(text)
            ends = part.stop == unit.end and rest == 0
            result.append(Chunk(unit, context, text, row, end, tokens, context_tokens + tokens + ends, ends))
            row = end if text.endswith("\n") else end - 1
    return result


def path_header(path: str, language: Language, token_counter: TokenCounter, max_length: int) -> str:
    """The path as a comment; the last parts of it where the whole would take too much room."""
    if not path:
        return ""
    opens, closes = language.comment
    printable_path = sanitize(path, limit=None)
    for mark in ("-->", "*/"):
        printable_path = printable_path.replace(mark, "\N{REPLACEMENT CHARACTER}")
    parts = printable_path.split("/")
    candidates = [f"{opens}{printable_path}{closes}\n"]
    candidates += [
        f"{opens}\N{HORIZONTAL ELLIPSIS}/{'/'.join(parts[start:])}{closes}\n" for start in range(1, len(parts))
    ]
    candidates += [f"{opens}\N{HORIZONTAL ELLIPSIS}{parts[-1][-keep:]}{closes}\n" for keep in (24, 8)]
    allowed = max_length // _HEADER_SHARE
    return next((header for header in candidates if token_counter.count([header])[0] <= allowed), "")


def _parts(lines: Sequence[str], unit: CodeUnit, budget: TokenBudget, language: Language) -> Iterator[range]:
    """Row ranges that fit, broken at the best place in the second half of what would fit."""
    if budget.cost(unit.start, unit.end) <= budget.free_tokens(unit.scopes):
        yield range(unit.start, unit.end)
        return
    room = budget.free_tokens(unit.scopes if unit.header is None else (*unit.scopes, unit.header))
    ranks = break_ranks(lines, unit, language.grammar)
    start = unit.start
    while budget.cost(start, unit.end) > room:
        furthest = bisect_right(budget.tokens_before, budget.tokens_before[start] + room, lo=start) - 1
        middle = bisect_right(budget.tokens_before, budget.tokens_before[start] + room // 2, lo=start)
        end = start + 1
        if furthest > start:
            late = range(max(middle, start + 1), furthest + 1) or range(start + 1, furthest + 1)
            end = min(late, key=lambda row: (ranks[row - unit.start], -row))
        if end >= unit.end:
            break
        yield range(start, end)
        start = end
    yield range(start, unit.end)


def _halved(text: str, tokens: int, room: int, token_counter: TokenCounter) -> Iterator[tuple[str, int]]:
    """Text in stretches that fit by an exact count: halved at a line end, a line that is too long by itself anywhere."""
    waiting = [(text, tokens)]
    while waiting:
        text, tokens = waiting.pop()
        if tokens <= room or len(text) == 1:
            yield text, tokens
            continue
        middle = len(text) // 2
        line_end = text.rfind("\n", 0, middle) + 1 or text.find("\n", middle) + 1
        at = line_end if 0 < line_end < len(text) else middle
        parts = (text[:at], text[at:])
        waiting.extend(zip(reversed(parts), reversed(token_counter.count(parts)), strict=True))


# FOLDED FROM quality: Which pieces of code are worth learning.
#
# Files that are generated, minified or no text never come this far. What remains are the parts of
# good files that teach no code: the licence at the top, and tables of data.
#

# Of Python's standard library, tests included, these leave out a sixth of the code that stands outside of functions and classes
# (1091 of 6560 pieces: encodings, entities, tables of the tests), 11 of 3869 functions and 351 of 29 935 methods (test data).
_MIN_WORDS = 40
_MIN_ROWS = 12
_NUMBERS = 0.5  # share of words that begin with a digit
_LITERAL_ROWS = 0.8  # share of rows that begin with a literal
_LONGEST_WORD = 200  # characters: encoded bytes, not a name
_WORD = re.compile(r"\w+")
_LITERAL = re.compile(r"""\s*[bruf]{0,2}["'`\d([{}\])+-]""", re.IGNORECASE)
_UNBROKEN = re.compile(rf"[A-Za-z0-9+/=\\]{{{_LONGEST_WORD},}}")


def rejection_reason(unit: CodeUnit, body: str) -> ExclusionReason | None:
    """Why a piece of a file should not be learned from."""
    if unit.kind == LICENCE:
        return ExclusionReason.LICENCE
    return ExclusionReason.DATA if is_data_table(body) else None


def is_data_table(text: str) -> bool:
    """A table of numbers or literals, or bytes written as text."""
    if _UNBROKEN.search(text):
        return True
    words = _WORD.findall(text)
    if len(words) >= _MIN_WORDS and sum(word[0].isdigit() for word in words) > _NUMBERS * len(words):
        return True
    rows = [row for row in text.split("\n") if row.strip()]
    return len(rows) >= _MIN_ROWS and sum(_LITERAL.match(row) is not None for row in rows) > _LITERAL_ROWS * len(rows)
