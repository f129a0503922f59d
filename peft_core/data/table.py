"""A LanceDB table of code chunks or a Parquet file of records as a data source: the side that asks.
`worker/table_reader.py` reads.

Lance and Arrow bring numpy and 100 MB, which belong neither in the server nor in a training with a memory limit. So one child
process summarises the rows when a source is inspected, and another writes them to the job's records.jsonl when the job is
queued. From there on they are inline records, and the job trains on what the table held when it was queued.
"""

from __future__ import annotations

import os
from pathlib import Path

from peft_core.errors import DataError, InvalidArgument
from peft_core.schemas.dataset import DatasetPurpose, SourceSummary
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.child_process import AnswerT, run_json_child

LANCE_SUFFIX = ".lance"
PARQUET_SUFFIX = ".parquet"
TIMEOUT_S = 300.0
_CHILD = "peft_core.data.worker.table_reader"


class TableRequest(FrozenModel):
    table: Path
    max_length: int = 512
    purpose: DatasetPurpose = DatasetPurpose.TRAINING
    skip_unusable_records: bool = False
    records: Path | None = None  # the file to write; None: summarise only


class ExportResult(FrozenModel):
    rows: int


def require_table(path: Path, given: str, purpose: DatasetPurpose) -> None:
    """Check by file names that a directory is a LanceDB table.

    Raises:
        InvalidArgument: the directory is not a table, or contains symbolic links.
    """
    if not (path / "_versions").is_dir():
        raise InvalidArgument(
            purpose.field,
            given,
            f"a directory whose name ends in {LANCE_SUFFIX} must be a LanceDB table, but this one has no _versions",
            suggestions=(
                "Give the table itself, DATABASE/NAME.lance",
                "Or rename the directory, if it is a repository",
            ),
        )
    for parent, directories, files in os.walk(path):
        for name in (*directories, *files):
            if os.path.islink(os.path.join(parent, name)):  # noqa: PTH114, PTH118 - thousands of them, quickly
                raise InvalidArgument(
                    purpose.field,
                    given,
                    f"it contains a symbolic link, {os.path.relpath(os.path.join(parent, name), path)}; "  # noqa: PTH118
                    "a table must contain its data itself",
                    suggestions=("Copy the table, and follow its links",),
                )


def summarise_table(
    path: Path, max_length: int, purpose: DatasetPurpose, *, skip_unusable_records: bool = False
) -> SourceSummary:
    """Return what the table holds.

    Raises:
        DataError: one of the codes of `worker/table_reader.py`, or the records are too few or broken.
    """
    request = TableRequest(
        table=path, max_length=max_length, purpose=purpose, skip_unusable_records=skip_unusable_records
    )
    return _run_reader(request, SourceSummary)


def export_records(path: Path, records: Path, *, skip_unusable_records: bool = False) -> int:
    """Write the rows to a .jsonl file, row N on line N, and return their number.

    Raises:
        DataError: one of the codes of `worker/table_reader.py`, or the table has become empty.
    """
    request = TableRequest(table=path, records=records, skip_unusable_records=skip_unusable_records)
    rows = _run_reader(request, ExportResult).rows
    if not rows:
        raise DataError(f"{path} contains no rows any more.", code="training_data_empty")
    return rows


def _run_reader(request: TableRequest, answer: type[AnswerT]) -> AnswerT:
    return run_json_child(
        _CHILD,
        request,
        answer,
        timeout_s=TIMEOUT_S,
        action=f"Reading the table {request.table}",
        on_timeout=("Give a table with fewer rows", "Or export a part of it as .jsonl"),
    )
