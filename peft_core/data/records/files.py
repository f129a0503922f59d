"""Read the values in a file: JSON Lines, JSON, CSV or TSV, plain or compressed by gzip, in UTF-8 or UTF-16.

In: a path. Out: (name, value) pairs, the names being what errors call a record ("line 17"). A value that cannot be read is
`Unreadable`. Memory is bounded by the largest record (16 MB), whatever the file holds: values are decoded one by one, and a
compressed file is unpacked as it is read, up to a limit.

To add a type of file, add its suffix to `SUFFIXES`, and a branch to `read_values`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_core.data.records.checks import MAX_RECORD_BYTES, DuplicateKeyError, Notes, SkipReason, distinct_keys, loads
from peft_core.data.records.formats import is_record
from peft_core.data.records.transcripts import conversations_of, is_transcript
from peft_core.errors import DataError, sanitize

MAX_FILE_BYTES = 1_000_000_000  # also after decompression
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # each also with .gz
_UTF8_MARK = codecs.BOM_UTF8
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_GZIP_MARK = b"\x1f\x8b"
_CHUNK = 1 << 16
_LONGEST_TOKEN = 16  # characters of JSON without strings and numbers: -Infinity, an escape with two surrogates
_SNIFFED = 20  # values that are looked at to recognise a transcript
_NUMERIC = (
    "start_line",
    "end_line",
    "start_byte",
    "end_byte",
    "complexity_score",
)  # columns of a CSV file that hold numbers


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Stands for a value that cannot be read."""

    rule: str
    reason: SkipReason = SkipReason.NOT_JSON


def file_type(path: Path) -> str | None:
    """Return the suffix that says how a file is read, without .gz; None for another file."""
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def read_values(path: Path, notes: Notes, max_length: int) -> Iterator[tuple[str, object]]:
    """Yield the values of a file, with what errors call them.

    Raises:
        DataError: 'unreadable_file', if the file as a whole cannot be read; 'too_large'.
    """
    if file_type(path) in (".csv", ".tsv"):
        yield from _rows(path)
    elif _holds_lines(path):
        lines = json_lines(path)
        first = list(itertools.islice(lines, _SNIFFED))
        lines = itertools.chain(first, lines)
        if is_transcript([value for _, value in first]):
            yield from conversations_of(lines, notes, max_length)
        else:
            yield from lines
    else:
        yield from _stream(path, notes)


def json_lines(path: Path, noun: str = "line") -> Iterator[tuple[str, object]]:
    """Yield the values of a JSON Lines file. Blank lines are skipped."""
    for number, line in _lines(path):
        if line is None:
            yield (
                f"{noun} {number}",
                Unreadable(f"it is longer than {MAX_RECORD_BYTES} bytes; write one record per line"),
            )
        elif line.strip():
            yield f"{noun} {number}", _json_value(line)


def _json_value(line: bytes) -> object:
    try:
        return loads(line)
    except UnicodeDecodeError as error:
        return Unreadable(f"it is not UTF-8 ({error.reason} at byte {error.start})")
    except RecursionError:
        return Unreadable("its JSON is nested too deeply")
    except DuplicateKeyError as error:
        return Unreadable(str(error), SkipReason.BAD_VALUE)
    except ValueError as error:
        return Unreadable(f"it is not valid JSON: {sanitize(error)}")


# -- bytes and text ---------------------------------------------------------------------------------------------------------


class _Bounded(io.RawIOBase):
    """Reads from another stream, up to a number of bytes."""

    def __init__(self, stream: io.BufferedIOBase, path: Path) -> None:
        super().__init__()
        self._stream, self._path, self._left = stream, path, MAX_FILE_BYTES

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read1(len(buffer))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise unreadable(
                self._path, f"it is not a complete gzip file: {error}", "Copy or download it again"
            ) from error
        self._left -= len(data)
        if self._left < 0:
            raise too_large(self._path, "unpacked, it has more than")
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def _open(path: Path) -> Iterator[tuple[io.BufferedReader, str]]:
    """Open a file, unpacked, behind its byte-order mark; yield it with its encoding.

    Raises:
        DataError: 'unreadable_file', 'too_large'.
    """
    with path.open("rb") as file:
        stream = file
        if file.peek(2).startswith(_GZIP_MARK):
            stream = io.BufferedReader(_Bounded(gzip.GzipFile(fileobj=file), path))
        elif path.suffix.lower() == ".gz":
            raise unreadable(path, "its name ends in .gz, but it is not a gzip file", "Rename it, or compress it again")
        head = stream.peek(3)[:3]
        encoding = "utf-8"
        if head.startswith(_UTF8_MARK):
            stream.read(len(_UTF8_MARK))
        elif head.startswith(_UTF16_MARKS):
            encoding = "utf-16-le" if stream.read(2) == codecs.BOM_UTF16_LE else "utf-16-be"
        yield stream, encoding


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yield the numbered lines, in UTF-8; None for one that is too long."""
    with _open(path) as (stream, encoding):
        text = None if encoding == "utf-8" else io.TextIOWrapper(stream, encoding, newline="\n")
        number, is_rest = 1, False
        while True:
            try:
                line = (
                    stream.readline(MAX_RECORD_BYTES + 1)
                    if text is None
                    else text.readline(MAX_RECORD_BYTES + 1).encode()
                )
            except UnicodeError as error:
                raise unreadable(
                    path, f"line {number} is not {encoding.upper()}: {error}", "Save it as UTF-8"
                ) from error
            if not line:
                return
            if not is_rest:
                yield number, None if len(line) > MAX_RECORD_BYTES else line
            is_rest = not line.endswith(b"\n")
            number += not is_rest


def _holds_lines(path: Path) -> bool:
    """Return whether a JSON file has one record per line, judged by its first two lines.

    Otherwise the file is one array or one object around a list, or its first line begins a value that continues on the next.
    """
    lines = (line for _, line in _lines(path) if line is None or line.strip())
    line = next(lines, b"")
    if line is None:
        return file_type(path) != ".json"
    try:
        value = loads(line)
    except RecursionError:
        return True
    except ValueError:
        return not line.lstrip().startswith((b"{", b"[")) or line.rstrip()[-1:] not in b"{[,"
    is_whole = isinstance(value, list) or _is_wrapper(value)
    return not is_whole or next(lines, b"") != b""


def unreadable(path: Path, rule: str, *suggestions: str) -> DataError:
    return DataError(f"{path} cannot be read: {rule}.", code="unreadable_file", suggestions=suggestions)


def too_large(path: Path, words: str) -> DataError:
    return DataError(
        f"{path} is too large: {words} {MAX_FILE_BYTES / 1e9:.0f} GB.",
        code="too_large",
        suggestions=("Give a part of it: a LoRA adapter learns from thousands of examples, not from millions",),
    )


# -- JSON that is not one value per line ------------------------------------------------------------------------------------


def _is_wrapper(value: object) -> bool:
    """Return whether a value is an object around a list of records, such as {"data": […]}."""
    if not isinstance(value, Mapping) or is_record(value):
        return False
    lists = [each for each in value.values() if isinstance(each, list) and each and isinstance(each[0], Mapping)]
    return len(lists) > 0


class _JsonReader:
    """Decodes the values of a text one after the other, holding no more of it than a value needs."""

    def __init__(self, text: io.TextIOBase, path: Path) -> None:
        self._text, self._path = text, path
        self._decoder = json.JSONDecoder(object_pairs_hook=distinct_keys)
        self._buffer, self._at, self._line, self._ended = "", 0, 1, False

    def peek(self) -> str:
        """Return the next character that is not white space, or "" at the end."""
        while True:
            while self._at < len(self._buffer):
                if not self._buffer[self._at].isspace():
                    return self._buffer[self._at]
                self._at += 1
            if not self._grow():
                return ""

    def take(self, *allowed: str) -> str:
        if (character := self.peek()) not in allowed:
            expected, found = (" or ".join(map(repr, each)) or "the end of the file" for each in (allowed, character))
            raise self._broken(f"expected {expected}, found {found}", self._at)
        self._at += 1
        return character

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                if self._may_be_cut_off(error) and self._grow():
                    continue
                raise self._broken(error.msg, error.pos) from error
            except RecursionError as error:
                raise self._broken("it is nested too deeply", self._at) from error
            except ValueError as error:
                raise self._broken(sanitize(error), self._at) from error
            if end == len(self._buffer) and self._grow():
                continue  # a number may go on
            self._at = end
            return value

    def elements(self) -> Iterator[Any]:
        """Yield the elements of an array."""
        self.take("[")
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            yield self.value()
            if self.take(",", "]") == "]":
                return

    def _may_be_cut_off(self, error: json.JSONDecodeError) -> bool:
        """Return whether the error may be due to the end of the buffer, and not to the file."""
        return error.msg.startswith("Unterminated string") or len(self._buffer) - error.pos <= _LONGEST_TOKEN

    def _grow(self) -> bool:
        """Read more. Return False at the end of the file."""
        if self._ended:
            return False
        if len(self._buffer) - self._at > MAX_RECORD_BYTES:
            raise self._broken(f"a record is longer than {MAX_RECORD_BYTES} characters", self._at)
        try:
            more = self._text.read(max(_CHUNK, len(self._buffer) - self._at))
        except UnicodeError as error:
            raise unreadable(self._path, f"it is not text in UTF-8: {error}", "Save it as UTF-8") from error
        if not more:
            self._ended = True
            return False
        self._line += self._buffer.count("\n", 0, self._at)
        self._buffer, self._at = self._buffer[self._at :] + more, 0
        return True

    def _broken(self, problem: str, at: int) -> DataError:
        line = self._line + self._buffer.count("\n", 0, at)
        return unreadable(
            self._path, f"it is not valid JSON: {problem}, in line {line}", "Correct it there, or write it again"
        )


def _stream(path: Path, notes: Notes) -> Iterator[tuple[str, object]]:
    """Yield the records of an array, of an object around an array, or of objects one after the other."""
    with _open(path) as (stream, encoding):
        reader = _JsonReader(io.TextIOWrapper(stream, encoding, newline=""), path)
        if reader.peek() == "[":
            values = reader.elements()
        elif _begins_with_wrapper(path):
            values = _wrapped(reader, path, notes)
        else:
            values = _concatenated(reader)
        for number, value in enumerate(values, 1):
            yield f"record {number}", value
        if reader.peek():
            reader.take()


def _concatenated(reader: _JsonReader) -> Iterator[Any]:
    while reader.peek():
        yield reader.value()


def _begins_with_wrapper(path: Path) -> bool:
    with _open(path) as (stream, encoding):
        reader = _JsonReader(io.TextIOWrapper(stream, encoding, newline=""), path)
        try:
            return reader.peek() == "{" and _is_wrapper(reader.value())
        except DataError as error:
            return "longer than" in error.message


def _wrapped(reader: _JsonReader, path: Path, notes: Notes) -> Iterator[Any]:
    """Yield the elements of the one array of objects in an object, and note what stands beside it."""
    reader.take("{")
    found = ""
    while True:
        key = sanitize(reader.value(), limit=80)
        reader.take(":")
        is_list = reader.peek() == "["
        elements = reader.elements() if is_list else iter([reader.value()])
        first = next(elements, None)
        if not (is_list and isinstance(first, Mapping)):
            notes.unused[f"{key} (beside the list of records)"] += 1
            for _ in elements:
                pass
        elif found:
            raise unreadable(
                path,
                f"it holds several lists, {found} and {key}; only one can be trained on",
                f"Write the one to train on into a file of its own: jq -c '.{found}[]' {path.name}",
            )
        else:
            found = key
            yield first
            yield from elements
        if reader.take(",", "}") == "}":
            return


# -- CSV --------------------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[tuple[str, object]]:
    """Yield the rows of a CSV file as objects; the first row names the columns."""
    csv.field_size_limit(MAX_RECORD_BYTES)  # of the process; the default is 128 kB
    lines = _TextLines(path)
    try:
        header_line = next(iter(lines))
    except StopIteration:
        return
    delimiter = "\t" if file_type(path) == ".tsv" else _delimiter(header_line)
    reader = csv.reader(itertools.chain([header_line], lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    while True:
        first_line = reader.line_num + 1
        lines.begin_row()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise unreadable(
                path,
                f"line {first_line} begins a row that is not valid CSV: {error}",
                'Quote cells with " and write "" for " in them',
            ) from error
        if not any(cells):
            continue
        if not header:
            header = _header(cells, path)
        elif len(cells) != len(header):
            yield (
                f"line {first_line}",
                Unreadable(f"it has {len(cells)} cells, but the header has {len(header)}", SkipReason.BAD_VALUE),
            )
        else:
            yield f"line {first_line}", {key: _cell(key, text) for key, text in zip(header, cells, strict=True)}


class _TextLines:
    """The lines of a text file, with a limit on the size of a row, which may have many lines."""

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, 0
        self._lines = self._read()

    def __iter__(self) -> Iterator[str]:
        return self._lines

    def begin_row(self) -> None:
        self._size = 0

    def _read(self) -> Iterator[str]:
        for number, line in _lines(self._path):
            self._size += MAX_RECORD_BYTES + 1 if line is None else len(line)
            if line is None or self._size > MAX_RECORD_BYTES:
                raise unreadable(
                    self._path,
                    f"the row that ends in line {number} has more than {MAX_RECORD_BYTES} bytes",
                    "Shorten it, or close the quotation mark that it begins with",
                )
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise unreadable(
                    self._path,
                    f"line {number} is not UTF-8 ({error.reason} at byte {error.start})",
                    "Save it as 'CSV UTF-8'",
                ) from error


def _delimiter(header_line: str) -> str:
    """Return the delimiter with which the first line names the keys of a record; spreadsheets also write ';' and tabs."""
    for delimiter in (",", ";", "\t"):
        if is_record(dict.fromkeys(name.strip().strip('"') for name in header_line.strip().split(delimiter))):
            return delimiter
    return ","


def _header(cells: list[str], path: Path) -> list[str]:
    names = [
        cell.strip() or f"Unnamed: {number}" for number, cell in enumerate(cells)
    ]  # pandas writes its index without a name
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise unreadable(
            path, f"its header has the column {sanitize(twice[0])!r} twice", "Give each column a name of its own"
        )
    return names


def _cell(key: str, text: str) -> object:
    if key not in _NUMERIC:
        return text
    try:
        return float(text) if text.strip() else None
    except ValueError:
        return text
