"""Jobs and their events in SQLite: the only module that contains SQL.

There is one row per job (its state as JSON, and the columns that are searched) and one row per event. Appending an event
and updating its job is one transaction, as is everything that reads a job's state to decide what to write. Each operation
opens its own connection (0.2 ms), so that any thread and any process may call.
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
from peft_core.jobs.state import Job, apply, in_turn
from peft_core.schemas.events import EVENT, Event, JobCancelled
from peft_core.schemas.results import Status
from peft_core.system.packages import install_command

BUSY_TIMEOUT_S = 20.0  # how long a writer waits for another one
MAX_EVENTS_PER_KIND = 2000  # that `events` returns for a job, which may have a million: a curve or report shows fewer

# The version covers the JSON as well as the tables: adding, renaming or removing a field of `Job` or `Event` is a new
# version, because another version of peft-mcp would reject the row. Versions 1 to 3 were never released.
SCHEMA_VERSION = 4
SCHEMA = """
CREATE TABLE jobs (
    job_id           TEXT PRIMARY KEY,
    project_id       TEXT NOT NULL,
    status           TEXT NOT NULL,
    turn             INTEGER NOT NULL,  -- position in the queue; a counter, because clocks jump
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
NEXT_TURN = "(SELECT coalesce(max(turn), 0) + 1 FROM jobs)"
TRAININGS = """
    SELECT job_id, state FROM jobs
    WHERE project_id = ? AND json_valid(state) AND json_extract(state, '$.request.evaluated') IS NULL ORDER BY turn DESC
"""
_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
UNFINISHED = (Status.QUEUED, Status.IN_PROGRESS)


class EndedJob(NamedTuple):
    """What pruning needs to know about a job."""

    job_id: str
    project_id: str
    has_events: bool


class Store:
    """The jobs of one data directory.

    Args:
        path: The database.
        now: Returns seconds since the epoch.
        on_status: Called with the project and the status of each training that is new or whose status has changed, after that
            is recorded. It must not raise.
    """

    def __init__(
        self, path: Path, now: Callable[[], float], on_status: Callable[[str, Status], None] = lambda *_: None
    ) -> None:
        self._path = path
        self._now = now
        self._on_status = on_status

    # -- the database --------------------------------------------------------------------------------------------------

    @property
    def exists(self) -> bool:
        try:
            return self._path.exists()
        except OSError as error:  # a directory that may not be searched
            raise unwritable(self._path.parent, error) from error

    def create(self) -> None:
        """Create the database if there is none: completely or not at all. Safe among processes.

        Raises:
            StorageError: the directory cannot be written.
        """
        if self.exists:
            return
        draft = self._path.with_name(f".{self._path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds the user's code
            with closing(sqlite3.connect(draft)) as db:
                # WAL is a property of the file: switching it on later would need all other connections closed.
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(SCHEMA)
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            with suppress(FileExistsError):  # another process was first
                os.link(draft, self._path)
        except (OSError, sqlite3.DatabaseError) as error:
            raise unwritable(self._path.parent, error) from error
        finally:
            with suppress(OSError):
                draft.unlink()

    # -- writing -------------------------------------------------------------------------------------------------------

    def insert(self, *jobs: Job) -> None:
        """Insert jobs, all or none."""
        with self._transaction() as db:
            for job in jobs:
                self._insert(db, job)
        for job in jobs:
            self._announce(job)

    def insert_next_training(self, job: Job, latest: str | None) -> bool:
        """Insert a training if the project's latest one still has the id `latest`, and none is queued or running.

        Return False if not: another process was first. Of several that decide on the same state, one inserts its job.
        """
        with self._transaction() as db:
            trainings = _parse_jobs(db.execute(TRAININGS, (job.project_id,)))
            if (trainings[0].job_id if trainings else None) != latest:
                return False
            if any(not training.status.is_final for training in trainings):
                return False
            self._insert(db, job)
        self._announce(job)
        return True

    def append(self, job_id: str, event: Event) -> Job:
        """Record an event and the state that it leads to.

        Raises:
            JobNotFound: no such job.
            IllegalTransition: the event cannot follow the job's state; nothing is written.
        """
        with self._transaction() as db:
            before = self._get(db, job_id)
            job = self._append(db, before, event)
        if job.status is not before.status:
            self._announce(job)
        return job

    def request_cancel(self, job_id: str) -> Job:
        """Cancel a queued job immediately; ask the runner to cancel a running one.

        Raises:
            JobStateError: the job has already ended.
        """
        with self._transaction() as db:
            job = self._get(db, job_id)
            if job.status.is_final:
                raise JobStateError(
                    f"Job {job_id} cannot be cancelled: it is {job.status}.",
                    code="job_already_ended",
                    suggestions=["Nothing needs to be done."],
                )
            if job.status is Status.QUEUED:
                job = self._append(db, job, JobCancelled())
            else:
                db.execute("UPDATE jobs SET cancel_requested = 1 WHERE job_id = ?", (job_id,))
        if job.status.is_final:
            self._announce(job)
        return job

    def requeue(self, job_id: str, event: Event) -> Job:
        """Put a job that ended early at the end of the queue."""
        with self._transaction() as db:
            job = self._append(db, self._get(db, job_id), event)
            db.execute(f"UPDATE jobs SET turn = {NEXT_TURN}, cancel_requested = 0 WHERE job_id = ?", (job_id,))  # noqa: S608 -- constant
        self._announce(job)
        return job

    def delete_events(self, job_id: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM events WHERE job_id = ?", (job_id,))

    def delete_ended(self, job_id: str) -> bool:
        """Delete a job and its events; return False if it is waiting or running again."""
        with self._transaction() as db:
            query = "DELETE FROM jobs WHERE job_id = ? AND status NOT IN (?, ?)"
            return db.execute(query, (job_id, *UNFINISHED)).rowcount > 0

    @contextmanager
    def while_ended(self, job_id: str) -> Iterator[bool]:
        """Yield whether a job has ended, or never existed; it is neither queued nor resumed while the block runs."""
        with self._transaction() as db:
            row = db.execute("SELECT status FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
            yield row is None or row[0] not in UNFINISHED

    def _announce(self, job: Job) -> None:
        if job.is_training:
            self._on_status(job.project_id, job.status)

    # -- reading jobs --------------------------------------------------------------------------------------------------

    def get(self, job_id: str) -> Job:
        """Return a job.

        Raises:
            JobNotFound: no such job.
            StorageError: its record cannot be read.
        """
        with self._connection() as db:
            return self._get(db, job_id)

    def latest(self, project_id: str) -> Job | None:
        """Return the project's latest training, or its latest evaluation if it has no training."""
        query = """
            SELECT job_id, state FROM jobs WHERE project_id = ?
            ORDER BY json_valid(state) AND json_extract(state, '$.request.evaluated') IS NOT NULL, turn DESC LIMIT 1
        """
        with self._connection() as db:
            row = db.execute(query, (project_id,)).fetchone()
        return _parse_job(*row) if row else None

    def trainings(self, project_id: str) -> list[Job]:
        """Return a project's trainings, the one that was queued last first."""
        with self._connection() as db:
            return _parse_jobs(db.execute(TRAININGS, (project_id,)))

    def runs_of_sweep(self, job: Job) -> list[Job]:
        """Return all runs of the sweep that a job is part of, in order; none if it is not part of one."""
        if (sweep := job.request.sweep) is None:
            return []
        others = [(other.request.sweep, other) for other in self.trainings(job.project_id)]
        runs = [(run.number, other) for run, other in others if run is not None and run.sweep_id == sweep.sweep_id]
        return [run for _, run in sorted(runs, key=lambda each: each[0])]

    def projects(self) -> list[str]:
        """Return the ids of all projects with jobs, the latest first."""
        query = "SELECT project_id FROM jobs GROUP BY project_id ORDER BY max(turn) DESC"
        with self._connection() as db:
            return [row[0] for row in db.execute(query)]

    def in_state(self, *states: Status) -> list[Job]:
        """Return the jobs in one of the states, in the order in which they were queued."""
        marks = ", ".join("?" * len(states))
        query = f"SELECT job_id, state FROM jobs WHERE status IN ({marks}) ORDER BY turn"  # noqa: S608 -- marks only
        with self._connection() as db:
            return _parse_jobs(db.execute(query, states))

    def last_completed(self, count: int) -> list[Job]:
        """Return the newest completed jobs, newest first."""
        query = "SELECT job_id, state FROM jobs WHERE status = ? ORDER BY turn DESC LIMIT ?"
        with self._connection() as db:
            return _parse_jobs(db.execute(query, (Status.COMPLETED, count)))

    def newest(self, count: int) -> list[Job]:
        """Return the jobs that were queued last, newest first."""
        query = "SELECT job_id, state FROM jobs ORDER BY turn DESC LIMIT ?"
        with self._connection() as db:
            return _parse_jobs(db.execute(query, (count,)))

    def unfinished_ids(self) -> set[str]:
        """Return the ids of the jobs that are queued or running."""
        with self._connection() as db:
            return {row[0] for row in db.execute("SELECT job_id FROM jobs WHERE status IN (?, ?)", UNFINISHED)}

    def job_ids(self) -> set[str]:
        with self._connection() as db:
            return {row[0] for row in db.execute("SELECT job_id FROM jobs")}

    def ended_beyond(self, keep: int) -> list[EndedJob]:
        """Return the jobs that have ended, without the newest `keep` of them."""
        query = """
            SELECT job_id, project_id, EXISTS (SELECT 1 FROM events WHERE events.job_id = jobs.job_id)
            FROM jobs WHERE status NOT IN (?, ?) ORDER BY turn DESC LIMIT -1 OFFSET ?
        """
        with self._connection() as db:
            rows = db.execute(query, (*UNFINISHED, keep)).fetchall()
        return [EndedJob(job_id, project_id, bool(has_events)) for job_id, project_id, has_events in rows]

    def queue_position(self, job_id: str) -> int | None:
        """Return 1 for the job that is next, counting running jobs as ahead; None if the job is not queued.

        Jobs on this machine and jobs on the cluster do not wait for each other.
        """
        jobs = self.in_state(*UNFINISHED)
        of_cluster = any(job.on_cluster for job in jobs if job.job_id == job_id)
        jobs = [job for job in jobs if job.on_cluster == of_cluster]
        waiting = [job.job_id for job in in_turn(job for job in jobs if job.status is Status.QUEUED)]
        return len(jobs) - len(waiting) + waiting.index(job_id) + 1 if job_id in waiting else None

    def cancel_requested(self, job_id: str) -> bool:
        with self._connection() as db:
            row = db.execute("SELECT cancel_requested FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        return bool(row and row[0])

    # -- reading events ------------------------------------------------------------------------------------------------

    def changed_since(self, event_id: int | None) -> tuple[int, list[str]]:
        """Return (newest event id, ids of the jobs with events after `event_id`; no ids for None)."""
        with self._connection() as db:
            newest = int(db.execute("SELECT coalesce(max(event_id), 0) FROM events").fetchone()[0])
            after = newest if event_id is None else event_id
            if after > newest:  # the database was deleted, and a new one counts from 1
                after = 0
            interval = (after, newest)  # an event that arrives meanwhile is reported by the next call
            jobs = db.execute("SELECT DISTINCT job_id FROM events WHERE event_id > ? AND event_id <= ?", interval)
            return newest, [row[0] for row in jobs]

    def events(self, job_id: str) -> list[Event]:
        """Return a job's events in order. If there are many, they are thinned out evenly, to at most
        `MAX_EVENTS_PER_KIND` of each kind with the newest among them.
        """
        kind = "PARTITION BY CASE WHEN json_valid(event) THEN json_extract(event, '$.kind') END"
        thinned = f"""
            SELECT event FROM events WHERE event_id IN (
                SELECT event_id FROM (
                    SELECT event_id, count(*) OVER ({kind}) AS total, row_number() OVER ({kind} ORDER BY event_id DESC) AS age
                    FROM events WHERE job_id = ?
                ) WHERE (age - 1) % ((total + {MAX_EVENTS_PER_KIND - 1}) / {MAX_EVENTS_PER_KIND}) = 0
            ) ORDER BY event_id
        """  # noqa: S608 -- constants
        every = "SELECT event FROM events WHERE job_id = ? ORDER BY event_id"
        with self._connection() as db:
            total = db.execute("SELECT count(*) FROM events WHERE job_id = ?", (job_id,)).fetchone()[0]
            return _parse_events(db.execute(thinned if total > MAX_EVENTS_PER_KIND else every, (job_id,)))

    def newest_events(self, job_id: str, count: int) -> list[Event]:
        """Return a job's newest events, newest first."""
        query = "SELECT event FROM events WHERE job_id = ? ORDER BY event_id DESC LIMIT ?"
        with self._connection() as db:
            return _parse_events(db.execute(query, (job_id, count)))

    # -- inside a transaction ------------------------------------------------------------------------------------------

    def _insert(self, db: sqlite3.Connection, job: Job) -> None:
        db.execute(
            f"INSERT INTO jobs (job_id, project_id, status, turn, state) VALUES (?, ?, ?, {NEXT_TURN}, ?)",  # noqa: S608 -- constant
            (job.job_id, job.project_id, job.status, job.model_dump_json()),
        )

    def _append(self, db: sqlite3.Connection, before: Job, event: Event) -> Job:
        at, job_id = self._now(), before.job_id
        job = apply(before, event, at)
        db.execute(
            "INSERT INTO events (job_id, at, event) VALUES (?, ?, ?)", (job_id, at, EVENT.dump_json(event).decode())
        )
        db.execute(
            "UPDATE jobs SET status = ?, state = ? WHERE job_id = ?", (job.status, job.model_dump_json(), job_id)
        )
        return job

    def _get(self, db: sqlite3.Connection, job_id: str) -> Job:
        row = db.execute("SELECT job_id, state FROM jobs WHERE job_id = ?", (job_id,)).fetchone()
        if row is None:
            raise self.unknown(job_id)
        return _parse_job(*row)

    def unknown(self, job_id: str) -> JobNotFound:
        return JobNotFound(
            f"No training job {job_id!r} in {self._path.parent}.",
            suggestions=["Call get_training_status with the project_id alone: it shows the latest job of the project."],
            details={"job_id": job_id},
        )

    # -- connections ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        try:
            # isolation_level=None: transactions begin where this class begins them, not where the driver guesses.
            db = sqlite3.connect(
                f"{self._path.as_uri()}?mode=rw", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
            )
        except sqlite3.OperationalError as error:
            raise unwritable(self._path.parent, error) from error
        with closing(db):
            try:
                self._require_version(db)
                # With WAL, a power cut may lose the last events but never corrupts the database.
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute("PRAGMA foreign_keys = ON")
                yield db
            except sqlite3.DatabaseError as error:
                if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:  # the driver's own errors have no code
                    raise self._damaged(error) from error
                raise unwritable(self._path.parent, error) from error

    def _damaged(self, error: sqlite3.DatabaseError) -> StorageError:
        parts = f"{self._path.name}-wal and {self._path.name}-shm"
        return StorageError(
            f"The database of jobs {self._path} is damaged: {error}.",
            code="damaged_database",
            suggestions=[
                f"Move it away, with {parts} if they exist: train_adapter creates a new one, and adapters are not affected",
                "Or restore it from a backup",
            ],
        )

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
            except BaseException:
                if db.in_transaction:  # a full disk has already rolled it back
                    db.execute("ROLLBACK")
                raise
            db.execute("COMMIT")

    def _require_version(self, db: sqlite3.Connection) -> None:
        version = int(db.execute("PRAGMA user_version").fetchone()[0])
        if version > SCHEMA_VERSION:
            raise StorageError(
                f"{self._path} was written by a newer peft-mcp (schema version {version}; this one reads {SCHEMA_VERSION}).",
                code="newer_database",
                suggestions=[
                    f"Upgrade peft-mcp ({install_command('peft-mcp', '--upgrade')}) and restart the server",
                    "Or set CODEBASE_GARDENER_DATA_DIR to another directory",
                ],
            )
        if version < SCHEMA_VERSION:
            raise StorageError(
                f"{self._path} is not a database of a released peft-mcp (schema version {version}; this one reads "
                f"{SCHEMA_VERSION}).",
                code="not_our_database",
                suggestions=[
                    "Move it away: train_adapter creates a new one, and published adapters are not affected",
                    "Or set CODEBASE_GARDENER_DATA_DIR to another directory",
                ],
            )


# -- rows to objects -------------------------------------------------------------------------------------------------


def _parse_job(job_id: str, state: str) -> Job:
    """Parse the record of a job.

    Raises:
        StorageError: it was edited by hand, or written by a peft-mcp with other fields under the same version.
    """
    try:
        return Job.model_validate_json(state)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise StorageError(
            f"The record of job {job_id} cannot be read: {'.'.join(map(str, first['loc']))}: {first['msg']}.",
            code="unreadable_job",
            suggestions=[
                "Call train_adapter to train again; other jobs and published adapters are not affected",
                "Or, if another version of peft-mcp wrote it, restart the server with that version",
            ],
            details={"job_id": job_id},
        ) from error


def _parse_jobs(rows: Iterable[tuple[str, str]]) -> list[Job]:
    """Parse several records without the unreadable ones, which must not stop other jobs; `get` reports them."""
    jobs = []
    for job_id, state in rows:
        with suppress(StorageError):
            jobs.append(_parse_job(job_id, state))
    return jobs


def _parse_events(rows: Iterable[tuple[str]]) -> list[Event]:
    """Parse events without the unreadable ones: the job's state has its own row and does not depend on them."""
    events = []
    for (event,) in rows:
        with suppress(ValidationError):
            events.append(EVENT.validate_json(event))
    return events
