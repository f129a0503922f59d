"""Read records: examples that another tool prepared, one JSON object per line of a .jsonl file, per row of a table, or inline.

In: a path, or an iterable of mappings. Out: `Record`s that are checked and all have one `RecordFormat`. The error for a record
that cannot be used names the record, the rule that it breaks, and the formats that are allowed.

To add a record format:
1. Add a member to `RecordFormat` (its value is the example that error messages show) and its required keys to `_KEYS`. No other
   format's keys may be a subset of them, and the other way round: only the keys distinguish formats.
2. Parse it in `parse`: `Record.texts` are (text, learn) pairs in the order in which they are tokenised.
3. If its records may be split when they are too long, add it to the split formats in `examples.examples_from_record` and
   `summarise._expected_examples`.
4. Test it in tests/unit/data/test_summarise.py: add a record to `RECORDS` there, and its broken forms to the table of
   `test_a_broken_record_is_named_with_the_rule_it_breaks`.

To add a kind of data source (another table, another file type), see `summarise.py`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from peft_core.data.languages import language_named, language_of_file
from peft_core.errors import DataError
from peft_core.schemas.conversation import Conversation

MAX_LINE_BYTES = 16_000_000
MAX_PATH = 4096  # characters of a file_path, which reports show
RECORD = "record"  # the kind of examples that are not chunks of code
CHUNK_TYPES = ("function", "class", "method", "module", "import", "variable", "comment", "interface", "type", "block")
ROLES = ("system", "user", "assistant", "tool")


class RecordFormat(StrEnum):
    """The format of a record. The value is the example that error messages show."""

    TEXT = '{"text": "def add(a, b): …"}'
    COMPLETION = '{"prompt": "…", "completion": "…"}'
    OUTPUT = '{"input": "…", "output": "…"}'
    MESSAGES = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'
    CHUNK = '{"content": "def add(a, b): …", "language": "python", "file_path": "src/app.py"}'


_KEYS = {
    RecordFormat.TEXT: ("text",),
    RecordFormat.COMPLETION: ("prompt", "completion"),
    RecordFormat.OUTPUT: ("input", "output"),
    RecordFormat.MESSAGES: ("messages",),
    RecordFormat.CHUNK: ("content", "language"),
}
_RANGES = (("start_line", "end_line"), ("start_byte", "end_byte"))
_KEYS_READ = (
    *dict.fromkeys(key for keys in _KEYS.values() for key in keys),
    *("file_path", "chunk_type"),
    *(key for keys in _RANGES for key in keys),
)
FORMATS = "one of " + ", ".join(RecordFormat)


@dataclass(frozen=True, slots=True)
class Record:
    """A valid record."""

    name: str  # "record 17", "line 17"
    format: RecordFormat
    texts: tuple[tuple[str, bool], ...]  # (text, learn) in order; empty for messages, which a chat template renders
    conversation: Conversation | None = None
    path: str = ""
    language: str = "text"
    kind: str = RECORD
    start_line: int = 0

    @property
    def content(self) -> str:
        messages = () if self.conversation is None else self.conversation.messages
        return "\n".join([*(text for text, _ in self.texts), *(message["content"] for message in messages)])


def read_jsonl(path: Path, *, noun: str = "line") -> Iterator[Record]:
    """Yield the records of a file. Blank lines are skipped, and a byte-order mark is tolerated.

    Args:
        path: The file.
        noun: What errors call a line: "record" for a file that was written from inline records, which the user never saw.

    Raises:
        DataError: 'broken_record' or 'mixed_formats', with the number of the line.
    """
    return _require_one_format(_parsed_lines(path, noun), where=str(path) if noun == "line" else "")


def read_inline(records: Sequence[Mapping[str, Any]]) -> Iterator[Record]:
    return numbered(records, "record")


def numbered(records: Iterable[Mapping[str, Any]], noun: str, *, where: str = "") -> Iterator[Record]:
    """Yield the records, checked, and named by their position: "row 17"."""
    parsed = (parse(record, f"{noun} {number}", where=where) for number, record in enumerate(records, 1))
    return _require_one_format(parsed, where=where)


def write_records(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write inline records as a .jsonl file; record N is on line N.

    Only the fields that are read are written: the values of other fields may have no JSON form.

    Raises:
        DataError: 'broken_record', for a record that was not checked before.
    """
    with path.open("w", encoding="utf-8") as stream:
        for number, record in enumerate(records, 1):
            try:
                fields = {name: record[name] for name in _KEYS_READ if name in record}
                if "messages" in fields:
                    fields["messages"] = [
                        {"role": message["role"], "content": message["content"]} for message in fields["messages"]
                    ]
                stream.write(json.dumps(fields, default=os.fspath) + "\n")
            except (TypeError, ValueError, LookupError) as error:
                raise _broken(f"record {number}", f"it cannot be written as JSON: {error}") from error


def parse(value: object, name: str, *, where: str = "") -> Record:
    """Check one record.

    Raises:
        DataError: 'broken_record', with the rule that the record breaks.
    """
    at = f"{name} of {where}" if where else name
    if not isinstance(value, Mapping):
        raise _broken(at, f"it is {_type_in_words(value)}; it must be a JSON object")
    record_format = _format(value, at)
    path = value.get("file_path")
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise _broken(at, f"'file_path' is {_type_in_words(path)}; it must be text or null")
    record_path = "" if path is None else os.fspath(path).replace("\\", "/")
    _require_encodable(record_path, "file_path", at)
    if len(record_path) > MAX_PATH:
        raise _broken(at, f"'file_path' has {len(record_path)} characters; it must have at most {MAX_PATH}")
    if record_format is RecordFormat.MESSAGES:
        return Record(name, record_format, (), conversation=_conversation(value["messages"], at), path=record_path)
    keys = _KEYS[record_format]
    if record_format is RecordFormat.CHUNK:
        return _chunk(value, name, at, record_path)
    for key in keys:
        _require_text(value[key], key, at, may_be_blank=key in {"prompt", "input"})
    language = value.get("language")
    file_name = record_path.rpartition("/")[2]
    known = language_named(language) if isinstance(language, str) and language.strip() else language_of_file(file_name)
    texts = tuple((str(value[key]), key not in {"prompt", "input"}) for key in keys)
    return Record(name, record_format, texts, path=record_path, language=known.name if known else "text")


def _parsed_lines(path: Path, noun: str) -> Iterator[Record]:
    where = str(path) if noun == "line" else ""
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            at = f"{noun} {number} of {where}" if where else f"{noun} {number}"
            if len(line) > MAX_LINE_BYTES:
                raise _broken(at, f"it is longer than {MAX_LINE_BYTES} bytes; write one record per line")
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except UnicodeDecodeError as error:
                raise _broken(at, f"it is not UTF-8 ({error.reason} at byte {error.start})") from error
            except RecursionError as error:
                raise _broken(at, "its JSON is nested too deeply") from error
            except ValueError as error:
                hint = "" if number > 1 or not line.lstrip().startswith(b"[") else "; a JSON array is not JSON Lines"
                raise _broken(at, f"it is not valid JSON: {error}{hint}") from error
            yield parse(value, f"{noun} {number}", where=where)


def _require_one_format(records: Iterable[Record], *, where: str) -> Iterator[Record]:
    first: Record | None = None
    for record in records:
        first = first or record
        if record.format is not first.format:
            place = f" of {where}" if where else ""
            raise DataError(
                f"{record.name}{place} has the format {record.format}, but {first.name} has the format {first.format}.",
                code="mixed_formats",
                suggestions=("Give all records of a source the same format, or train on one format at a time.",),
            )
        yield record


def _format(value: Mapping[str, Any], at: str) -> RecordFormat:
    matching = [record_format for record_format, keys in _KEYS.items() if all(key in value for key in keys)]
    if len(matching) == 1:
        return matching[0]
    keys = ", ".join(sorted(str(key) for key in value)[:12]) or "none"
    if not matching:
        raise _broken(at, f"its keys ({keys[:200]}) match none of the known formats")
    raise _broken(at, f"its keys ({keys[:200]}) match {len(matching)} formats: {' and '.join(matching)}")


def _require_text(value: object, key: str, at: str, *, may_be_blank: bool = False) -> None:
    if not isinstance(value, str):
        raise _broken(at, f"'{key}' is {_type_in_words(value)}; it must be text")
    if not may_be_blank and not value.strip():
        raise _broken(at, f"'{key}' is blank; it must hold some text")
    _require_encodable(value, key, at)


def _require_encodable(value: str, key: str, at: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _broken(at, f"'{key}' holds an unpaired surrogate at character {error.start}") from error


def _conversation(value: object, at: str) -> Conversation:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _broken(at, "'messages' must be a list of at least one message")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise _broken(at, f"message {number} must be an object whose 'role' is one of {', '.join(ROLES)}")
        _require_text(message.get("content"), f"content' of message '{number}", at)
        messages.append({"role": message["role"], "content": message["content"]})
    if not any(message["role"] == "assistant" for message in messages):
        raise _broken(at, "no message has the role 'assistant'; at least one must, because answers are what is learned")
    return Conversation.learning_every_answer(messages)


def _chunk(value: Mapping[str, Any], name: str, at: str, path: str) -> Record:
    """Check a code chunk, which has the fields of Codebase Gardener's CodeChunk."""
    _require_text(value["content"], "content", at)
    _require_text(value["language"], "language", at)
    kind = value.get("chunk_type")
    if kind is not None and not isinstance(kind, str):
        raise _broken(at, f"'chunk_type' is {_type_in_words(kind)}; it must be text, such as {', '.join(CHUNK_TYPES)}")
    for start_key, end_key in _RANGES:
        first, last = _whole_number(value, start_key, at), _whole_number(value, end_key, at)
        if first is not None and last is not None and first > last:
            raise _broken(at, f"'{start_key}' ({first}) is greater than '{end_key}' ({last})")
    score = value.get("complexity_score", 0.0)
    if not isinstance(score, (int, float)) or isinstance(score, bool) or not score >= 0:
        raise _broken(at, f"'complexity_score' is {score!r:.80}; it must be a number of at least 0")
    if not isinstance(value.get("metadata", {}), Mapping):
        raise _broken(at, f"'metadata' is {_type_in_words(value['metadata'])}; it must be an object")
    if not isinstance(value.get("dependencies", []), (list, tuple)):
        raise _broken(at, f"'dependencies' is {_type_in_words(value['dependencies'])}; it must be a list")
    return Record(
        name,
        RecordFormat.CHUNK,
        ((value["content"], True),),
        path=path,
        language=language_named(value["language"]).name,
        kind=kind if kind in CHUNK_TYPES else "block",  # other tools name their chunks differently
        start_line=_whole_number(value, "start_line", at) or 0,
    )


def _whole_number(value: Mapping[str, Any], key: str, at: str) -> int | None:
    """Return a whole number, or None if it is missing.

    Tables represent a missing number as NaN, and then all numbers of the column as floats.
    """
    number = value.get(key)
    if number is None or (isinstance(number, float) and math.isnan(number)):
        return None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number < 0 or number % 1:
        raise _broken(at, f"'{key}' is {number!r:.80}; it must be a whole number of at least 0")
    return int(number)


def _type_in_words(value: object) -> str:
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def _broken(at: str, rule: str) -> DataError:
    return DataError(
        f"{at[0].upper()}{at[1:]} cannot be used: {rule}.",
        code="broken_record",
        suggestions=(f"Give every record as {FORMATS}.",),
    )
