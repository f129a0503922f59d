"""Records that somebody else prepared: one JSON object a line of a .jsonl file, or given inline.

All records of one source have the same form; what is wrong with one is said with its number, the rule, and an example.
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

MAX_LINE_BYTES = 16_000_000
MAX_PATH = 4096  # characters of a file_path, which is told in reports
RECORD = "record"  # the kind of what is no chunk of code
CHUNK_TYPES = ("function", "class", "method", "module", "import", "variable", "comment", "interface", "type", "block")
ROLES = ("system", "user", "assistant", "tool")


class RecordFormat(StrEnum):
    """What a record looks like; the value is the example that messages show."""

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
_PLACES = (("start_line", "end_line"), ("start_byte", "end_byte"))
_READ = (
    *dict.fromkeys(key for keys in _KEYS.values() for key in keys),
    *("file_path", "chunk_type"),
    *(key for keys in _PLACES for key in keys),
)
FORMS = "one of " + ", ".join(RecordFormat)


@dataclass(frozen=True, slots=True)
class Record:
    """A valid record. `texts` are (text, learn) in order; empty for messages, which a chat template puts in order."""

    name: str  # "record 17", "line 17"
    form: RecordFormat
    texts: tuple[tuple[str, bool], ...]
    messages: tuple[dict[str, str], ...] = ()
    path: str = ""
    language: str = "text"
    kind: str = RECORD
    start_line: int = 0

    @property
    def content(self) -> str:
        return "\n".join([*(text for text, _ in self.texts), *(message["content"] for message in self.messages)])


def read_jsonl(path: Path, *, called: str = "line") -> Iterator[Record]:
    """Records of a file, one after the other; blank lines are skipped, a byte-order mark is tolerated.

    Raises:
        DataError: 'broken_record' or 'mixed_formats', with the number of the line.
    """
    return _one_form(_parsed_lines(path, called), where=str(path) if called == "line" else "")


def read_inline(records: Sequence[Mapping[str, Any]]) -> Iterator[Record]:
    return numbered(records, "record")


def numbered(records: Iterable[Mapping[str, Any]], called: str, *, where: str = "") -> Iterator[Record]:
    parsed = (parse(record, f"{called} {number}", where=where) for number, record in enumerate(records, 1))
    return _one_form(parsed, where=where)


def write_records(records: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Inline records as a .jsonl file, one record a line, so that line N is record N.

    Of each the fields that are read: others may hold what JSON cannot.

    Raises:
        DataError: 'broken_record', one that was not read before.
    """
    with path.open("w", encoding="utf-8") as stream:
        for number, record in enumerate(records, 1):
            try:
                fields = {name: record[name] for name in _READ if name in record}
                if "messages" in fields:
                    fields["messages"] = [
                        {"role": one["role"], "content": one["content"]} for one in fields["messages"]
                    ]
                stream.write(json.dumps(fields, default=os.fspath) + "\n")
            except (TypeError, ValueError, LookupError) as error:
                raise _broken(f"record {number}", f"it cannot be written as JSON: {error}") from error


def parse(value: object, name: str, *, where: str = "") -> Record:
    """One record, checked.

    Raises:
        DataError: 'broken_record', naming the rule that it breaks.
    """
    at = f"{name} of {where}" if where else name
    if not isinstance(value, Mapping):
        raise _broken(at, f"it is {_kind(value)}, a record is a JSON object")
    form = _form(value, at)
    path = value.get("file_path")
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise _broken(at, f"'file_path' is {_kind(path)}, it must be text or null")
    record_path = "" if path is None else os.fspath(path).replace("\\", "/")
    _encodable(record_path, "file_path", at)
    if len(record_path) > MAX_PATH:
        raise _broken(at, f"'file_path' has {len(record_path)} characters, at most {MAX_PATH} are allowed")
    if form is RecordFormat.MESSAGES:
        return Record(name, form, (), messages=_messages(value["messages"], at), path=record_path)
    keys = _KEYS[form]
    if form is RecordFormat.CHUNK:
        return _chunk(value, name, at, record_path)
    for key in keys:
        _text(value[key], key, at, may_be_blank=key in {"prompt", "input"})
    language = value.get("language")
    known = (
        language_named(language)
        if isinstance(language, str) and language.strip()
        else language_of_file(record_path.rpartition("/")[2])
    )
    texts = tuple((str(value[key]), key not in {"prompt", "input"}) for key in keys)
    return Record(name, form, texts, path=record_path, language=known.name if known else "text")


def _parsed_lines(path: Path, called: str) -> Iterator[Record]:
    where = str(path) if called == "line" else ""
    with path.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            at = f"{called} {number} of {where}" if where else f"{called} {number}"
            if len(line) > MAX_LINE_BYTES:
                raise _broken(at, f"it is longer than {MAX_LINE_BYTES} bytes; give one record a line")
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
            yield parse(value, f"{called} {number}", where=where)


def _one_form(records: Iterable[Record], *, where: str) -> Iterator[Record]:
    first: Record | None = None
    for record in records:
        first = first or record
        if record.form is not first.form:
            place = f" of {where}" if where else ""
            raise DataError(
                f"{record.name}{place} has the form {record.form}, but {first.name} has the form {first.form}.",
                code="mixed_formats",
                suggestions=("Give all records of one source the same form, or train on one form at a time.",),
            )
        yield record


def _form(value: Mapping[str, Any], at: str) -> RecordFormat:
    forms = [form for form, keys in _KEYS.items() if all(key in value for key in keys)]
    if len(forms) == 1:
        return forms[0]
    keys = ", ".join(sorted(str(key) for key in value)[:12]) or "none"
    if not forms:
        raise _broken(at, f"its keys ({keys[:200]}) are none of the known forms")
    raise _broken(at, f"its keys ({keys[:200]}) fit {len(forms)} forms: {' and '.join(forms)}")


def _text(value: object, key: str, at: str, *, may_be_blank: bool = False) -> None:
    if not isinstance(value, str):
        raise _broken(at, f"'{key}' is {_kind(value)}, it must be text")
    if not may_be_blank and not value.strip():
        raise _broken(at, f"'{key}' is blank, there is nothing to learn from it")
    _encodable(value, key, at)


def _encodable(value: str, key: str, at: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise _broken(at, f"'{key}' holds half of a surrogate pair at character {error.start}") from error


def _messages(value: object, at: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise _broken(at, "'messages' must be a list of at least one message")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise _broken(at, f"message {number} must be an object whose 'role' is one of {', '.join(ROLES)}")
        _text(message.get("content"), f"content' of message '{number}", at)
        messages.append({"role": message["role"], "content": message["content"]})
    if not any(message["role"] == "assistant" for message in messages):
        raise _broken(at, "no message has the role 'assistant', so there is no answer to learn")
    return tuple(messages)


def _chunk(value: Mapping[str, Any], name: str, at: str, path: str) -> Record:
    """A CodeChunk of Codebase Gardener."""
    _text(value["content"], "content", at)
    _text(value["language"], "language", at)
    kind = value.get("chunk_type")
    if kind is not None and not isinstance(kind, str):
        raise _broken(at, f"'chunk_type' is {_kind(kind)}, it must be text, such as {', '.join(CHUNK_TYPES)}")
    for low, high in _PLACES:
        first, last = _whole_number(value, low, at), _whole_number(value, high, at)
        if first is not None and last is not None and first > last:
            raise _broken(at, f"'{low}' ({first}) is behind '{high}' ({last})")
    score = value.get("complexity_score", 0.0)
    if not isinstance(score, (int, float)) or isinstance(score, bool) or not score >= 0:
        raise _broken(at, f"'complexity_score' is {score!r:.80}, it must be a number of at least 0")
    if not isinstance(value.get("metadata", {}), Mapping):
        raise _broken(at, f"'metadata' is {_kind(value['metadata'])}, it must be an object")
    if not isinstance(value.get("dependencies", []), (list, tuple)):
        raise _broken(at, f"'dependencies' is {_kind(value['dependencies'])}, it must be a list")
    return Record(
        name,
        RecordFormat.CHUNK,
        ((value["content"], True),),
        path=path,
        language=language_named(value["language"]).name,
        kind=kind if kind in CHUNK_TYPES else "block",  # other tools have names of their own for what they cut
        start_line=_whole_number(value, "start_line", at) or 0,
    )


def _whole_number(value: Mapping[str, Any], key: str, at: str) -> int | None:
    """None where it is not given, or given as what tables make of that. They also make floats of all numbers beside it."""
    number = value.get(key)
    if number is None or (isinstance(number, float) and math.isnan(number)):
        return None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or number < 0 or number % 1:
        raise _broken(at, f"'{key}' is {number!r:.80}, it must be a whole number of at least 0")
    return int(number)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", tuple: "a list", str: "text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def _broken(at: str, rule: str) -> DataError:
    return DataError(
        f"{at[0].upper()}{at[1:]} cannot be used: {rule}.",
        code="broken_record",
        suggestions=(f"Give every record as {FORMS}.",),
    )
