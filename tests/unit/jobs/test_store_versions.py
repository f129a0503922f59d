"""What is stored, and that no version of it is taken for another."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from peft_core.errors import StorageError
from peft_core.jobs import store as schema
from peft_core.jobs.state import Job
from peft_core.jobs.store import SCHEMA_VERSION, Store
from peft_core.schemas.events import EVENT, JobCancelled, JobStarted, PhaseStarted
from peft_core.schemas.results import Phase, Status
from peft_core.schemas.task import ComputePlan
from tests.factories import make_job

# (version, hash of what it stores.) A peft-mcp that is out there does not know a field that is added, and does not find one
# that is renamed or removed. So where this test fails: raise SCHEMA_VERSION, write what brings the older one up to date (for
# a field that has a default, nothing needs to be done), and put both numbers here. Only where this version was never
# released, as in a merge of two branches that both change it, put in the new hash alone.
PINNED = (3, "b8128e5a5032f39e")


def shape_of(schema: Any) -> Any:
    """A JSON schema without what is for people, and without defaults: every field is stored with its value."""
    if isinstance(schema, list):
        return [shape_of(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        name: {key: shape_of(part) for key, part in value.items()}
        if name in ("properties", "$defs")
        else shape_of(value)
        for name, value in schema.items()
        if name not in ("title", "description", "default")
    }


def test_no_stored_field_changes_without_a_new_version() -> None:
    stored = [shape_of(Job.model_json_schema()), shape_of(EVENT.json_schema())]
    found = hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest()[:16]
    assert (SCHEMA_VERSION, found) == PINNED


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "peft.db"


@pytest.fixture
def store(path: Path) -> Store:
    store = Store(path, lambda: 0.0)
    store.create()
    return store


def rewrite(path: Path, job_id: str, change: Callable[[dict[str, Any]], None]) -> None:
    """A job's record, changed by somebody else."""
    with closing(sqlite3.connect(path)) as db, db:
        state = json.loads(db.execute("SELECT state FROM jobs WHERE job_id = ?", (job_id,)).fetchone()[0])
        change(state)
        db.execute("UPDATE jobs SET state = ? WHERE job_id = ?", (json.dumps(state), job_id))


def as_in_version_2(state: dict[str, Any]) -> None:
    execution = state["request"]["execution"]
    execution["unpacked_bytes"] = 123_456


def test_a_database_of_version_2_keeps_its_jobs_without_the_removed_key(
    store: Store,
    path: Path,
) -> None:
    job = make_job("a")
    execution = ComputePlan(weights="file")
    store.insert(job.model_copy(update={"request": job.request.model_copy(update={"execution": execution})}))
    store.insert(make_job("broken"))
    rewrite(path, "a", as_in_version_2)
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE jobs SET state = 'no JSON' WHERE job_id = 'broken'")
        db.execute("PRAGMA user_version = 2")
    assert store.get("a").request.execution == execution
    assert [job.job_id for job in store.in_state(Status.QUEUED)] == ["a"]
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)


def test_a_job_that_cannot_be_read_is_told_of_by_name_and_stops_no_other(store: Store, path: Path) -> None:
    for name in ("odd", "fine"):
        store.insert(make_job(name, name))
    rewrite(path, "odd", as_in_version_2)
    for ask in (
        lambda: store.get("odd"),
        lambda: store.latest("odd"),
        lambda: store.append("odd", JobStarted()),
        lambda: store.request_cancel("odd"),
    ):
        with pytest.raises(StorageError, match=r"job odd cannot be read: .*unpacked_bytes") as told:
            ask()
        assert told.value.code == "unreadable_job"
        assert "train_adapter" in str(told.value)
    assert [job.job_id for job in store.in_state(Status.QUEUED)] == ["fine"]
    assert store.queue_position("fine") == 1
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE jobs SET status = 'completed'")
    assert [job.job_id for job in store.last_completed(9)] == ["fine"]


def test_an_event_that_cannot_be_read_is_passed_over(store: Store, path: Path) -> None:
    store.insert(make_job("a"))
    with closing(sqlite3.connect(path)) as db, db:
        for event in ('{"kind": "of another version"}', "no JSON"):
            db.execute("INSERT INTO events (job_id, at, event) VALUES ('a', 0, ?)", (event,))
    store.append("a", JobCancelled())
    assert store.events("a") == store.newest_events("a", 9) == [JobCancelled()]


@pytest.mark.parametrize("version", [0, -1])
def test_a_database_that_is_none_of_ours_is_refused_with_what_to_do(path: Path, version: int) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version = {version}")
    path.touch()
    with pytest.raises(StorageError, match="Move it away") as told:
        Store(path, lambda: 0.0).latest("web")
    assert told.value.code == "not_our_database"


def test_a_database_that_a_newer_version_migrates_at_this_moment_is_refused(
    store: Store,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 2")
    plain = schema._version
    seen: list[int] = []

    def version(db: sqlite3.Connection) -> int:
        """Another process is faster than this one, once it has looked."""
        seen.append(plain(db))
        return seen[0] if len(seen) == 1 else SCHEMA_VERSION + 1

    monkeypatch.setattr(schema, "_version", version)
    with pytest.raises(StorageError, match="newer peft-mcp"):
        store.latest("web")


def test_a_cursor_of_a_database_that_was_made_anew_tells_of_all_that_is_new(store: Store) -> None:
    store.insert(make_job("a"))
    store.append("a", JobStarted())
    assert store.changed_since(1_000) == (1, ["a"])


def test_of_a_long_history_each_kind_is_read_thinly_and_the_newest_always(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peft_core.jobs.store.MOST_OF_A_KIND", 10)
    store.insert(make_job("a"))
    store.append("a", JobStarted())
    for number in range(95):
        store.append("a", PhaseStarted(phase=Phase.PREPARING_DATA, detail=str(number)))
    events = store.events("a")
    assert events[0] == JobStarted()
    assert [event.detail for event in events[1:] if isinstance(event, PhaseStarted)] == [
        str(number) for number in range(4, 95, 10)
    ]
    newest = store.newest_events("a", 2)
    assert [event.detail for event in newest if isinstance(event, PhaseStarted)] == ["94", "93"]
