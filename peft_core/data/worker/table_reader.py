"""Read the rows of a table as records, in a process of its own: a TableRequest (JSON) on standard input, an answer or an
ErrorInfo on standard output.

A table is a LanceDB table of code chunks, of which only the columns that a CodeChunk needs are read, or a Parquet file of
records in any format. A few hundred rows are read at a time. Both need the extra `lancedb`.
To run it by hand: `python -m peft_core.data.worker.table_reader < request.json`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from peft_core.data.records import FORMATS, MAX_FILE_BYTES, Notes, numbered, write_records
from peft_core.data.records.checks import METADATA
from peft_core.data.records.formats import USED_KEYS
from peft_core.data.summarise import summarise_records
from peft_core.data.table import PARQUET_SUFFIX, ExportResult, TableRequest
from peft_core.errors import DataError, StorageError, sanitize
from peft_core.schemas.dataset import SourceKind
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.child_process import answer_request
from peft_core.system.failures import TaskKind
from peft_core.system.packages import install_extra

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


def answer(request: TableRequest) -> FrozenModel:
    notes = Notes()
    read = _parquet_rows if request.table.suffix.lower() == PARQUET_SUFFIX else _lance_rows
    rows = _CountedRows(read(request.table, notes), request.table)
    if request.records is None:
        records = numbered(rows, "row", where=str(request.table), skip=request.skip_unusable_records, notes=notes)
        return summarise_records(
            SourceKind.RECORDS, request.table, records, request.max_length, request.purpose, notes=notes
        )
    try:
        write_records(rows, request.records, skip=request.skip_unusable_records)
    except OSError as error:
        raise StorageError(
            f"The rows of {request.table} could not be written: {error}.",
            code="data_directory_unwritable",
            suggestions=("Free some space, or set CODEBASE_GARDENER_DATA_DIR to another disk and restart the server",),
        ) from error
    return ExportResult(rows=rows.count)


class _CountedRows:
    """Passes on the rows of a table and counts them.

    Raises:
        DataError: 'training_data_empty', 'too_large'; the codes of the functions that read the rows.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], table: Path) -> None:
        self._rows, self._table = rows, table
        self.count = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        size = 0
        for row in self._rows:
            self.count += 1
            size += _size(row)
            if size > MAX_FILE_BYTES:
                raise DataError(
                    f"{self._table} contains more than {MAX_FILE_BYTES / 1e9:.0f} GB of text.",
                    code="too_large",
                    suggestions=(
                        "Give a part of it: a LoRA adapter learns from thousands of examples, not from millions",
                    ),
                )
            yield row
        if not self.count:
            raise DataError(
                f"{self._table} contains no rows.",
                code="training_data_empty",
                suggestions=("Write the records, or index the code, first; or give the repository itself",),
            )


def _size(value: object) -> int:
    """Return the characters of all texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 0


# -- LanceDB ----------------------------------------------------------------------------------------------------------------


def _lance_rows(table: Path, notes: Notes) -> Iterator[dict[str, Any]]:
    """Yield every row as a mapping of the columns that a code chunk needs; note the other columns.

    Raises:
        DataError: 'extra_missing', 'not_a_table', 'foreign_data', 'missing_columns'.
    """
    try:
        import lance  # noqa: PLC0415 - an extra, and heavy
    except ImportError as error:
        raise _extra_missing(table, "pylance") from error
    try:
        dataset = lance.dataset(str(table))
    except (ValueError, OSError) as error:
        raise _not_a_lance_table(table, error) from error
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
    unused = [name for name in dataset.schema.names if name not in columns]
    try:
        for batch in scanner.to_batches():
            for row in batch.to_pylist():
                notes.unused.update(unused)
                yield {name: value for name, value in row.items() if value is not None or name in REQUIRED}
    except (ValueError, OSError) as error:
        raise _not_a_lance_table(table, error) from error


def _require_columns(table: Path, columns: list[str]) -> None:
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        raise DataError(
            f"{table} lacks {' and '.join(f'the column {name!r}' for name in missing)}; it has "
            f"{', '.join(columns[:30]) or 'none'}. "
            f"A table of code chunks has {' and '.join(REQUIRED)}, and may have {', '.join(OPTIONAL)} "
            "(docs/training-data.md, 'LanceDB tables').",
            code="missing_columns",
            suggestions=(
                f"Rename the column that holds the code to {REQUIRED[0]!r}, and name its language in {REQUIRED[1]!r}",
                f"Or export the rows as .jsonl, each {FORMATS}",
            ),
        )


def _not_a_lance_table(table: Path, error: Exception) -> DataError:
    reason = str(error).partition(", /")[0]  # the rest are paths in Lance's own source
    return DataError(
        f"{table} cannot be read as a LanceDB table: {reason[:300]}.",
        code="not_a_table",
        suggestions=("Give the table itself, DATABASE/NAME.lance, complete and not being written",),
    )


# -- Parquet ----------------------------------------------------------------------------------------------------------------


def _parquet_rows(table: Path, notes: Notes) -> Iterator[dict[str, Any]]:
    """Yield every row as a mapping, without nulls. Columns of metadata, such as embeddings, are not read but noted.

    Raises:
        DataError: 'extra_missing', 'not_a_table'.
    """
    try:
        import pyarrow.parquet  # noqa: PLC0415 - an extra, and heavy
    except ImportError as error:
        raise _extra_missing(table, "pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in USED_KEYS or name.lower() not in METADATA]
            unused = [name for name in names if name not in columns]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns, use_threads=False):
                for row in batch.to_pylist():
                    notes.unused.update(unused)
                    yield _without_nulls(row)
    except (ValueError, OSError, NotImplementedError) as error:
        raise DataError(
            f"{table} cannot be read as a Parquet file: {sanitize(error, limit=300).rstrip('.')}.",
            code="not_a_table",
            suggestions=("Download or write it again", "Or export the rows as .jsonl, one object per line"),
        ) from error


def _without_nulls(value: Any) -> Any:
    """Drop the keys whose value is null: Arrow gives each object the keys of all objects in the column."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _extra_missing(table: Path, package: str) -> DataError:
    return DataError(
        f"Reading {table} needs the package {package}, which is not installed.",
        code="extra_missing",
        suggestions=(
            f"Install it: {install_extra('lancedb')}",
            "Or export the rows as .jsonl, one object per line",
        ),
    )


if __name__ == "__main__":
    sys.exit(answer_request(TableRequest, answer, TASK))
