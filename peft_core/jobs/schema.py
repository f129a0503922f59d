"""The database's tables, and how those of an older version become today's.

The version counts what is stored, which is more than the tables: a job's state and its events are JSON, whose fields are
those of `Job` and `Event`. An older peft-mcp does not know a field that was added, so that a new field is a new version, too.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from peft_core.errors import StorageError, unwritable

SCHEMA_VERSION = 3
SCHEMA = """
CREATE TABLE jobs (
    job_id           TEXT PRIMARY KEY,
    project_id       TEXT NOT NULL,
    status           TEXT NOT NULL,
    turn             INTEGER NOT NULL,  -- the queue's order; counted, as clocks jump
    cancel_requested INTEGER NOT NULL DEFAULT 0,
    state            TEXT NOT NULL
) STRICT;
CREATE INDEX jobs_by_project ON jobs (project_id, turn);
CREATE INDEX jobs_by_status ON jobs (status, turn);
CREATE TABLE events (
    event_id INTEGER PRIMARY KEY AUTOINCREMENT,
    job_id   TEXT NOT NULL REFERENCES jobs (job_id) ON DELETE CASCADE,
    at       REAL NOT NULL,
    event    TEXT NOT NULL
) STRICT;
CREATE INDEX events_by_job ON events (job_id, event_id);
"""
_OLD_BYTES, _BYTES = (f"'$.request.execution.{name}_bytes'" for name in ("unpacked", "repacked"))
# From each older version to the next one: statements that run in one transaction.
MIGRATIONS: dict[int, tuple[str, ...]] = {
    1: (
        "ALTER TABLE jobs ADD COLUMN turn INTEGER NOT NULL DEFAULT 0",
        """
        UPDATE jobs SET turn = ranked.turn
        FROM (SELECT job_id, row_number() OVER (ORDER BY queued_at, rowid) AS turn FROM jobs) AS ranked
        WHERE jobs.job_id = ranked.job_id
        """,
        "DROP INDEX jobs_by_project",
        "DROP INDEX jobs_by_status",
        "ALTER TABLE jobs DROP COLUMN queued_at",
        "CREATE INDEX jobs_by_project ON jobs (project_id, turn)",
        "CREATE INDEX jobs_by_status ON jobs (status, turn)",
    ),
    # Fields were added, which have defaults, and one was renamed.
    2: (
        f"""
        UPDATE jobs SET state = json_remove(json_set(state, {_BYTES}, json_extract(state, {_OLD_BYTES})), {_OLD_BYTES})
        WHERE CASE WHEN json_valid(state) THEN json_type(state, {_OLD_BYTES}) END IS NOT NULL
        """,  # noqa: S608 -- ours
    ),
}


def create(path: Path) -> None:
    """Make the database: complete, or not at all. Safe among processes.

    Raises:
        StorageError: the directory cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # other users of the machine need not read the code
        with closing(sqlite3.connect(draft)) as db:
            # WAL is a property of the file, set before anybody else can see it: switching later needs all others out.
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(SCHEMA)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        with suppress(FileExistsError):
            os.link(draft, path)
    except (OSError, sqlite3.DatabaseError) as error:
        raise unwritable(path.parent, error) from error
    finally:
        with suppress(OSError):
            draft.unlink()


def bring_up_to_date(db: sqlite3.Connection, path: Path) -> None:
    """Make an older database today's.

    Raises:
        StorageError: it is a newer one, or none of ours.
    """
    if _version(db) < SCHEMA_VERSION:
        with transaction(db):
            for old in range(_version(db), SCHEMA_VERSION):  # read again: another process may have been first
                if old not in MIGRATIONS:
                    raise StorageError(
                        f"{path} is not a database of peft-mcp: it has none of its tables (version {old}).",
                        code="not_our_database",
                        suggestions=[
                            "Move it away: train_adapter makes a new one; published adapters stay",
                            "Or set CODEBASE_GARDENER_DATA_DIR to another directory",
                        ],
                    )
                for statement in MIGRATIONS[old]:
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {old + 1}")
    if (version := _version(db)) > SCHEMA_VERSION:
        raise StorageError(
            f"{path} was written by a newer peft-mcp (schema {version}; this one knows up to {SCHEMA_VERSION}).",
            code="newer_database",
            suggestions=[
                "Upgrade peft-mcp (pip install --upgrade peft-mcp) and restart the server",
                "Or set CODEBASE_GARDENER_DATA_DIR to another directory",
            ],
        )


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if db.in_transaction:  # a full disk has ended it already
            db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")


def _version(db: sqlite3.Connection) -> int:
    return int(db.execute("PRAGMA user_version").fetchone()[0])
