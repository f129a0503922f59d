"""Read the rows of a LanceDB table as records, in a process of its own: a TableRequest (JSON) on standard input, an answer or
an ErrorInfo on standard output.

To run it by hand: `python -m peft_core.data.worker.lance_reader < request.json`. The columns are those of a CodeChunk; only the
columns that a record needs are read, a few hundred rows at a time. It needs the extra `lancedb`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft_core.data.lance_table import ExportResult, TableRequest
from peft_core.data.records import FORMATS, numbered, write_records
from peft_core.data.summarise import MAX_JSONL_BYTES, summarise_records
from peft_core.errors import DataError, StorageError
from peft_core.schemas.dataset import SourceKind
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.child_process import answer_request
from peft_core.system.failures import TaskKind

TASK = TaskKind(
    name="reading of the table",
    crash_code="inspection_failed",
    log="the log of the server",
    memory_advice=("Close other programs, or give a smaller table.",),
)
REQUIRED = ("content", "language")
OPTIONAL = ("file_path", "chunk_type", "start_line", "end_line")
_BATCH_ROWS = 256
_BUFFER_BYTES = 32 << 20


def rows(table: Path) -> Iterator[dict[str, Any]]:
    """Yield every row as a mapping.

    Raises:
        DataError: 'extra_missing', 'not_a_table', 'foreign_data', 'missing_columns', 'training_data_empty', 'too_large'.
    """
    try:
        import lance  # noqa: PLC0415 - an extra, and heavy
    except ImportError as error:
        raise DataError(
            f"Reading {table} needs the package pylance, which is not installed.",
            code="extra_missing",
            suggestions=(
                "Install peft-mcp with its extra: pip install 'peft-mcp[lancedb]' (in a clone: pip install '.[lancedb]')",
                "Or export the chunks as .jsonl, one object per line",
            ),
        ) from error
    try:
        dataset = lance.dataset(str(table))
    except (ValueError, OSError) as error:
        raise _unreadable(table, error) from error
    if base_paths := dataset.base_paths():
        where = ", ".join(sorted(base.path for base in base_paths.values())[:3])
        raise DataError(
            f"{table} refers to data in another place ({where}); a table must contain its data itself.",
            code="foreign_data",
            suggestions=("Give the table that it was cloned from, or make a full copy",),
        )
    _require_columns(table, dataset.schema.names)
    columns = [name for name in (*REQUIRED, *OPTIONAL) if name in dataset.schema.names]
    scanner = dataset.scanner(
        columns=columns,
        batch_size=_BATCH_ROWS,
        batch_readahead=1,
        fragment_readahead=1,
        io_buffer_size=_BUFFER_BYTES,
        scan_in_order=True,  # so that two reads of one version are equal
    )
    size = count = 0
    try:
        for batch in scanner.to_batches():
            for row in batch.to_pylist():
                count += 1
                size += len(row["content"]) if isinstance(row["content"], str) else 0
                if size > MAX_JSONL_BYTES:
                    raise _too_large(table)
                yield {name: value for name, value in row.items() if value is not None or name in REQUIRED}
    except (ValueError, OSError) as error:
        raise _unreadable(table, error) from error
    if not count:
        raise DataError(
            f"{table} contains no rows.",
            code="training_data_empty",
            suggestions=("Index the code first, so that the table holds its chunks, or give the repository itself",),
        )


def answer(request: TableRequest) -> FrozenModel:
    if request.records is None:
        records = numbered(rows(request.table), "row", where=str(request.table))
        return summarise_records(SourceKind.RECORDS, request.table, records, request.max_length, request.purpose)
    written = _CountedRows(rows(request.table))
    try:
        write_records(written, request.records)
    except OSError as error:
        raise StorageError(
            f"The rows of {request.table} could not be written: {error}.",
            code="data_directory_unwritable",
            suggestions=("Free some space, or set CODEBASE_GARDENER_DATA_DIR to another disk and restart the server",),
        ) from error
    return ExportResult(rows=written.count)


class _CountedRows:
    """Passes on rows and counts them."""

    def __init__(self, records: Iterator[dict[str, Any]]) -> None:
        self._records = records
        self.count = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for record in self._records:
            self.count += 1
            yield record


def _require_columns(table: Path, columns: list[str]) -> None:
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise DataError(
            f"{table} lacks {' and '.join(f'the column {name!r}' for name in missing)}; it has "
            f"{', '.join(columns[:30]) or 'none'}. "
            f"A table of code chunks has {' and '.join(REQUIRED)}, and may have {', '.join(OPTIONAL)} "
            "(README, 'What is trained on').",
            code="missing_columns",
            suggestions=(
                f"Rename the column that holds the code to {REQUIRED[0]!r}, and name its language in {REQUIRED[1]!r}",
                f"Or export the rows as .jsonl, each {FORMATS}",
            ),
        )


def _unreadable(table: Path, error: Exception) -> DataError:
    reason = str(error).partition(", /")[0]  # the rest are paths in Lance's own source
    return DataError(
        f"{table} cannot be read as a LanceDB table: {reason[:300]}.",
        code="not_a_table",
        suggestions=("Give the table itself, DATABASE/NAME.lance, complete and not being written",),
    )


def _too_large(table: Path) -> DataError:
    return DataError(
        f"{table} contains more than {MAX_JSONL_BYTES / 1e9:.0f} GB of code.",
        code="too_large",
        suggestions=("Give a part of it: a LoRA adapter learns from thousands of examples, not from millions",),
    )


if __name__ == "__main__":
    sys.exit(answer_request(TableRequest, answer, TASK))
