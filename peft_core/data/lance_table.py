"""A LanceDB table of code chunks: our end of the process that reads it (`table_rows`).

Lance brings numpy, Arrow and a hundred megabytes; none of it belongs into the server, nor into a training that keeps to a
limit of memory. So one child counts the rows for the first look, and another writes them down as a job's records.jsonl when
the job is queued: from there on they are inline records, and the job trains on what the table held when it was asked for.
"""

from __future__ import annotations

import os
from pathlib import Path

from peft_core.errors import DataError, InvalidArgument
from peft_core.schemas.dataset import DatasetPurpose, SourceSummary
from peft_core.schemas.frozen import FrozenModel
from peft_core.system.child_process import AnswerT, run_json_child

SUFFIX = ".lance"
TIMEOUT_S = 300.0
_CHILD = "peft_core.data.worker.lance_reader"


class TableRequest(FrozenModel):
    table: Path
    max_length: int = 512
    purpose: DatasetPurpose = DatasetPurpose.TRAINING
    records: Path | None = None  # where to write; None: look only


class ExportResult(FrozenModel):
    rows: int


def require_table(path: Path, given: str, purpose: DatasetPurpose) -> None:
    """That a directory looks like a table, as far as its names tell.

    Raises:
        InvalidArgument: it is none, or holds links.
    """
    if not (path / "_versions").is_dir():
        raise InvalidArgument(
            purpose.field,
            given,
            f"a directory whose name ends in {SUFFIX} must be a LanceDB table, and this one is none: it holds no _versions",
            suggestions=("Give the table itself, DATABASE/NAME.lance", "Rename a repository that is called so"),
        )
    for parent, directories, files in os.walk(path):
        for name in (*directories, *files):
            if os.path.islink(os.path.join(parent, name)):  # noqa: PTH114, PTH118 - thousands of them, quickly
                raise InvalidArgument(
                    purpose.field,
                    given,
                    f"it holds a link, {os.path.relpath(os.path.join(parent, name), path)}; "  # noqa: PTH118
                    "a table must hold its data itself",
                    suggestions=("Copy the table, following its links",),
                )


def summarise_table(path: Path, max_length: int, purpose: DatasetPurpose) -> SourceSummary:
    """What the table holds.

    Raises:
        DataError: as `table_rows`; or the records are too few or broken.
    """
    return _ask(TableRequest(table=path, max_length=max_length, purpose=purpose), SourceSummary)


def export_records(path: Path, records: Path) -> int:
    """The rows as a .jsonl file, row N on line N; how many there are.

    Raises:
        DataError: as `look`.
    """
    rows = _ask(TableRequest(table=path, records=records), ExportResult).rows
    if not rows:
        raise DataError(f"{path} has been emptied.", code="training_data_empty")
    return rows


def _ask(request: TableRequest, answer: type[AnswerT]) -> AnswerT:
    return run_json_child(
        _CHILD,
        request,
        answer,
        timeout_s=TIMEOUT_S,
        action=f"Reading the table {request.table}",
        on_timeout=("Give a table of fewer chunks", "Or export what matters as .jsonl"),
    )
