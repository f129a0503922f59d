"""One file or one record to examples, together with what was left out of it and which secrets were removed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from peft_core.data.classify import Reason
from peft_core.data.codec import Codec
from peft_core.data.file_text import read_text
from peft_core.data.fit import MIN_TOKENS, RESERVED, file_pieces, whole_pieces
from peft_core.data.languages import named
from peft_core.data.quality import trouble
from peft_core.data.records import RECORD, Form, Record
from peft_core.data.secret_scan import Finding
from peft_core.data.units import rows
from peft_core.data.walk import File
from peft_core.example import Example, Segment

MIN_ANSWER_WORDS = 8

# Lines in, lines without secrets and the findings out: `secret_scan.redacted`, or `unchanged` for a first look.
Redact = Callable[[Sequence[str]], tuple[list[str], list[Finding]]]


@dataclass(slots=True)
class Yield:
    """What came of a file or a record."""

    examples: list[Example] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    secrets: list[tuple[str, int, str]] = field(default_factory=list)  # file, line, type


def unchanged(lines: Sequence[str]) -> tuple[list[str], list[Finding]]:
    return list(lines), []


def from_file(file: File, *, codec: Codec, max_length: int, redact: Redact) -> Yield:
    result = Yield()
    path = printable(file.name)
    if _name_is_secret(path, result, redact):
        return result
    text = read_text(file.path)
    if isinstance(text, Reason):
        result.left_out[text] += 1
        return result
    lines, findings = redact(rows(text))
    result.secrets += [(path, finding.row + 1, finding.type) for finding in findings]
    pieces = file_pieces(lines, path=path, language=file.language, codec=codec, max_length=max_length)
    if not pieces:
        result.left_out[Reason.NO_CODE] += 1
    for piece in pieces:
        if piece.body_tokens < MIN_TOKENS:
            result.left_out[Reason.TINY] += 1
        elif why := trouble(piece.unit, piece.body):
            result.left_out[why] += 1
        else:
            result.examples.append(piece.example(path, file.language))
    return result


def from_record(record: Record, *, codec: Codec, max_length: int, redact: Redact, root: str = "") -> Yield:
    """`root`: what absolute paths of records begin with; it is nobody's business and stays out."""
    result = Yield()
    path = os.path.relpath(record.path, root) if root and record.path.startswith("/") else record.path
    path = printable(path.lstrip("/"))
    if path and _name_is_secret(path, result, redact):
        return result
    lines, findings = redact(rows(record.content))
    result.secrets += [(path or record.name, finding.row + 1, finding.type) for finding in findings]
    if record.form not in (Form.TEXT, Form.CHUNK):
        if findings:  # a pair with a hole in it teaches the hole
            result.left_out[Reason.SECRET] += 1
        else:
            _whole_record(record, path or record.name, result, codec, max_length)
        return result
    if not any(line.strip() for line in lines):
        result.left_out[Reason.SECRET] += 1
        return result
    language = named(record.language)
    header = path if record.form is Form.CHUNK else ""
    pieces = whole_pieces(lines, path=header, language=language, kind=record.kind, codec=codec, max_length=max_length)
    first_line = max(1, record.start_line)
    literal = record.form is Form.CHUNK  # the text of other records may have been rendered for this very base
    result.examples += [
        piece.example(path or record.name, language, first_line=first_line, literal=literal) for piece in pieces
    ]
    return result


def may_be_like_others(example: Example) -> bool:
    """Whether its near duplicates teach nothing new. Pairs are left alone, except by equal ones: answers to different
    questions may be nearly the same, and questions may share most of a long instruction.
    """
    return example.kind != RECORD or all(segment.learn for segment in example.segments)


def answer(example: Example) -> str | None:
    """What a record teaches, whatever it is asked; None where it is asked nothing, and for an answer so short that it is one
    only together with its question: a label, yes or no.
    """
    if example.kind != RECORD or all(segment.learn for segment in example.segments):
        return None
    learned = "".join(segment.text for segment in example.segments if segment.learn)
    return learned if len(learned.split()) >= MIN_ANSWER_WORDS else None


def taught(example: Example) -> str:
    """The text by which it is told whether something was trained on."""
    learned = "".join(segment.text for segment in example.segments if segment.learn)
    if example.kind != RECORD or learned == example.text or answer(example) is not None:
        return learned
    return " ".join(example.text.split())  # one line: questions may have most of theirs in common


def printable(name: str) -> str:
    """A file name that can be written down: bytes that are no text become replacement characters."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _whole_record(record: Record, path: str, result: Yield, codec: Codec, max_length: int) -> None:
    if record.messages:
        segments = codec.render_chat(record.messages)
    else:
        segments = tuple(Segment(text=text, learn=learn) for text, learn in record.texts)
    tokens = sum(codec.count([segment.text for segment in segments]))
    if tokens + RESERVED > max_length:
        result.left_out[Reason.TOO_LONG] += 1
        return
    example = Example(segments=segments, path=path, language=record.language, kind=record.kind, tokens=tokens + 1)
    result.examples.append(example)


def _name_is_secret(path: str, result: Yield, redact: Redact) -> bool:
    _, findings = redact([path])
    if findings:
        result.left_out[Reason.SECRET] += 1
        result.secrets += [("(a file whose name holds it)", 0, finding.type) for finding in findings]
    return bool(findings)
