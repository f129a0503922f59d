"""Code chunks of Codebase Gardener as records: any objects with the attributes of its `CodeChunk`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

FIELDS = (
    "id", "content", "language", "chunk_type", "file_path", "start_line", "end_line", "start_byte", "end_byte", "metadata",
    "dependencies", "complexity_score",
)  # fmt: skip


class CodeChunk(Protocol):
    """A piece of code: a dataclass, a pydantic model or any other object. The attributes of `FIELDS` that it has are used."""

    @property
    def content(self) -> str: ...

    @property
    def language(self) -> str: ...


Records = Sequence[Mapping[str, Any] | CodeChunk]


def plain_records(data: str | Records) -> str | list[Mapping[str, Any]]:
    """Return records as mappings of plain values; a path stays as it is.

    What is neither a mapping nor a chunk stays as it is, too: the check of the records refuses it with its number.
    """
    return data if isinstance(data, str) else [_plain_record(record) for record in data]


def _plain_record(record: Any) -> Any:
    if isinstance(record, Mapping):
        kind = record.get("chunk_type")
        return {**record, "chunk_type": kind.value} if isinstance(kind, Enum) else record
    if not (hasattr(record, "content") and hasattr(record, "language")):
        return record
    fields = {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
    return {name: value.value if isinstance(value, Enum) else value for name, value in fields.items()}
