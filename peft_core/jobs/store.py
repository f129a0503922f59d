"""Jobs and their events in SQLite: with `schema`, the only module that speaks SQL.

One row per job (its state as JSON, with the columns that are searched), one row per event. Appending an event and
changing its job is one transaction; so is everything that decides on a job's state before it writes.
Connections are opened per operation (0.2 ms): any thread and any process may call, and nothing is held open.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from peft_core.errors import JobNotFound, JobStateError, StorageError, unwritable
from peft_core.jobs.state import Job, apply
from peft_core.schemas.events import EVENT, Event, JobCancelled
from peft_core.schemas.results import Status

BUSY_S = 20.0  # how long a writer waits for another one
MOST_OF_A_KIND = (
    2000  # events that are read at once, of a job that may have a million: more than a curve or a report shows
)
NEXT_TURN = "(SELECT coalesce(max(turn), 0) + 1 FROM jobs)"
OPEN = (Status.QUEUED, Status.IN_PROGRESS)


class EndedJob(NamedTuple):
    """What pruning needs to know of a job."""

    job_id: str
    project_id: str
    has_history: bool


class Store:
    """The jobs of one data directory. `now` gives seconds since the epoch."""

    def __init__(self, path: Path, now: Callable[[], float]) -> None:
        self._path = path
        self._now = now

    def create(self) -> None:
        """Make the database where there is none. Idempotent, safe among processes.

        Raises:
            StorageError: the directory cannot be written.
        """
        if not self.exists:
            create(self._path)

    @property
    def exists(self) -> bool:
        try:
            return self._path.exists()
        except OSError as error:  # a directory that may not be searched
            raise unwritable(self._path.parent, error) from error

    def insert(self, job: Job) -> None:
        with self._transaction() as db:
            db.execute(
                f"INSERT INTO jobs (job_id, project_id, status, turn, state) VALUES (?, ?, ?, {NEXT_TURN}, ?)",  # noqa: S608 -- ours
                (job.job_id, job.project_id, job.status, job.model_dump_json()),
            )

    def append(self, job_id: str, event: Event) -> Job:
        """Record a fact and the state that it leads to.

        Raises:
            JobNotFound: no such job.
            IllegalTransition: the event cannot follow the job's state; nothing is written.
        """
        with self._transaction() as db:
            return self._append(db, job_id, event)

    def request_cancel(self, job_id: str) -> Job:
        """Cancel a queued job at once; ask the runner to cancel a running one.

        Raises:
            JobStateError: the job has ended already.
        """
        with self._transaction() as db:
            job = self._get(db, job_id)
            if job.status is Status.QUEUED:
                return self._append(db, job_id, JobCancelled())
            if job.status.is_final:
                raise JobStateError(
                    f"Job {job_id} cannot be cancelled: it is {job.status}.",
                    code="job_already_ended",
                    suggestions=["Nothing needs to be done."],
                )
            db.execute("UPDATE jobs SET cancel_requested = 1 WHERE job_id = ?", (job_id,))
            return job

    def requeue(self, job_id: str, event: Event) -> Job:
        """Put a job that ended early at the end of the queue."""
        with self._transaction() as db:
            job = self._append(db, job_id, event)
            db.execute(f"UPDATE jobs SET turn = {NEXT_TURN}, cancel_requested = 0 WHERE job_id = ?", (job_id,))  # noqa: S608 -- ours
            return job

    def get(self, job_id: str) -> Job:
        with self._connection() as db:
            return self._get(db, job_id)

    def latest(self, project_id: str) -> Job | None:
        query = "SELECT job_id, state FROM jobs WHERE project_id = ? ORDER BY turn DESC LIMIT 1"
        with self._connection() as db:
            row = db.execute(query, (project_id,)).fetchone()
        return _job(*row) if row else None

    def in_state(self, *states: Status) -> list[Job]:
        """Jobs in one of the states, in the order in which they were queued."""
        marks = ", ".join("?" * len(states))
        query = f"SELECT job_id, state FROM jobs WHERE status IN ({marks}) ORDER BY turn"  # noqa: S608 -- marks only
        with self._connection() as db:
            return _readable(db.execute(query, states))

    def last_completed(self, count: int) -> list[Job]:
        """The newest completed jobs, newest first."""
        query = "SELECT job_id, state FROM jobs WHERE status = ? ORDER BY turn DESC LIMIT ?"
        with self._connection() as db:
            return _readable(db.execute(query, (Status.COMPLETED, count)))

    def queue_position(self, job_id: str) -> int | None:
        """1 for the job that is next; a running job counts as ahead. None when the job is not queued."""
        jobs = self.in_state(*OPEN)
        waiting = [job.job_id for job in jobs if job.status is Status.QUEUED]
        return len(jobs) - len(waiting) + waiting.index(job_id) + 1 if job_id in waiting else None

    def cancel_requested(self, job_id: str) -> bool:
        with self._connection() as db:
            row = db.execute("SELECT cancel_requested FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return bool(row and row[0])

    def changed_since(self, event_id: int | None) -> tuple[int, list[str]]:
        """(newest event id, jobs with events after `event_id`; none for None)."""
        with self._connection() as db:
            newest = int(db.execute("SELECT coalesce(max(event_id), 0) FROM events").fetchone()[0])
            after = newest if event_id is None else event_id
            if after > newest:  # the database was removed, and another one counts anew
                after = 0
            between = (after, newest)  # one that comes meanwhile is told the next time
            jobs = db.execute("SELECT DISTINCT job_id FROM events WHERE event_id > ? AND event_id <= ?", between)
            return newest, [row[0] for row in jobs]

    def events(self, job_id: str) -> list[Event]:
        """What happened to a job, in order; of each kind `MOST_OF_A_KIND` at most, evenly spread, the newest among them."""
        rank = "PARTITION BY CASE WHEN json_valid(event) THEN json_extract(event, '$.kind') END"
        thinned = f"""
            SELECT event FROM events WHERE event_id IN (
                SELECT event_id FROM (
                    SELECT event_id, count(*) OVER ({rank}) AS many, row_number() OVER ({rank} ORDER BY event_id DESC) AS age
                    FROM events WHERE job_id = ?
                ) WHERE (age - 1) % ((many + {MOST_OF_A_KIND - 1}) / {MOST_OF_A_KIND}) = 0
            ) ORDER BY event_id
        """  # noqa: S608 -- ours
        with self._connection() as db:
            many = db.execute("SELECT count(*) FROM events WHERE job_id = ?", (job_id,)).fetchone()[0]
            all_ = "SELECT event FROM events WHERE job_id = ? ORDER BY event_id"
            return _events(db.execute(thinned if many > MOST_OF_A_KIND else all_, (job_id,)))

    def newest_events(self, job_id: str, count: int) -> list[Event]:
        """The last that happened to a job, newest first."""
        query = "SELECT event FROM events WHERE job_id = ? ORDER BY event_id DESC LIMIT ?"
        with self._connection() as db:
            return _events(db.execute(query, (job_id, count)))

    def job_ids(self) -> set[str]:
        with self._connection() as db:
            return {row[0] for row in db.execute("SELECT job_id FROM jobs")}

    def ended_beyond(self, keep: int) -> list[EndedJob]:
        """Jobs that ended, but for the newest `keep` of them."""
        query = """
            SELECT job_id, project_id, EXISTS (SELECT 1 FROM events WHERE events.job_id = jobs.job_id)
            FROM jobs WHERE status NOT IN (?, ?) ORDER BY turn DESC LIMIT -1 OFFSET ?
        """
        with self._connection() as db:
            rows = db.execute(query, (*OPEN, keep)).fetchall()
        return [EndedJob(job_id, project_id, bool(has_history)) for job_id, project_id, has_history in rows]

    def forget_events(self, job_id: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM events WHERE job_id = ?", (job_id,))

    def delete_ended(self, job_id: str) -> bool:
        """Forget a job; False where it is waiting or running again."""
        with self._transaction() as db:
            deleted = db.execute("DELETE FROM jobs WHERE job_id = ? AND status NOT IN (?, ?)", (job_id, *OPEN))
            return deleted.rowcount > 0

    def _append(self, db: sqlite3.Connection, job_id: str, event: Event) -> Job:
        at = self._now()
        job = apply(self._get(db, job_id), event, at)
        db.execute(
            "INSERT INTO events (job_id, at, event) VALUES (?, ?, ?)",
            (job_id, at, EVENT.dump_json(event).decode()),
        )
        db.execute(
            "UPDATE jobs SET status = ?, state = ? WHERE job_id = ?",
            (job.status, job.model_dump_json(), job_id),
        )
        return job

    def _get(self, db: sqlite3.Connection, job_id: str) -> Job:
        row = db.execute("SELECT job_id, state FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        if row is None:
            raise self.unknown(job_id)
        return _job(*row)

    def unknown(self, job_id: str) -> JobNotFound:
        return JobNotFound(
            f"No training job {job_id!r} in {self._path.parent}.",
            suggestions=["Call get_training_status with the project_id alone: it shows the latest job of the project."],
            details={"job_id": job_id},
        )

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            # isolation_level=None: transactions begin where this module says so, not where the driver guesses.
            db = sqlite3.connect(f"{self._path.as_uri()}?mode=rw", uri=True, timeout=BUSY_S, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise unwritable(self._path.parent, error) from error
        with closing(db):
            try:
                bring_up_to_date(db, self._path)
                # With WAL: a power cut may lose the last events, never corrupt.
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute("PRAGMA foreign_keys = ON")
                yield db
            except sqlite3.DatabaseError as error:
                raise unwritable(self._path.parent, error) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as db, transaction(db):
            yield db


def _job(job_id: str, state: str) -> Job:
    """A row.

    Raises:
        StorageError: it is of a peft-mcp that wrote other fields under the same version, or somebody changed it.
    """
    try:
        return Job.model_validate_json(state)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise StorageError(
            f"The record of job {job_id} cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}.",
            code="unreadable_job",
            suggestions=[
                "Call train_adapter to train anew: other jobs, and adapters that were published, are not concerned",
                "Or, if another version of peft-mcp wrote it, restart the server with that one",
            ],
            details={"job_id": job_id},
        ) from error


def _readable(rows: Iterable[tuple[str, str]]) -> list[Job]:
    """Those that can be read: one that cannot is told of to whoever asks for it, and stops no other."""
    jobs = []
    for job_id, state in rows:
        with suppress(StorageError):
            jobs.append(_job(job_id, state))
    return jobs


def _events(rows: Iterable[tuple[str]]) -> list[Event]:
    """Those that can be read, as for jobs: the state of a job is told by its own row."""
    events = []
    for (event,) in rows:
        with suppress(ValidationError):
            events.append(EVENT.validate_json(event))
    return events


# FOLDED FROM peft_core.jobs.store: The database's tables, and how those of an older version become today's.
#
# The version counts what is stored, which is more than the tables: a job's state and its events are JSON, whose fields are
# those of `Job` and `Event`. An older peft-mcp does not know a field that was added, so that a new field is a new version, too.
#

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
_REMOVED_KEY = "'$.request.execution.unpacked_bytes'"
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
    # Fields were added, which have defaults, and one was removed.
    2: (
        f"""
        UPDATE jobs SET state = json_remove(state, {_REMOVED_KEY})
        WHERE CASE WHEN json_valid(state) THEN json_type(state, {_REMOVED_KEY}) END IS NOT NULL
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
