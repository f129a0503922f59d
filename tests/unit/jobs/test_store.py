"""The store: jobs and events in one database, for many processes."""

from __future__ import annotations

import itertools
import json
import sqlite3
import threading
from contextlib import closing
from pathlib import Path

import pytest

from peft_core.errors import JobNotFound, JobStateError, StorageError
from peft_core.jobs.state import IllegalTransition
from peft_core.jobs.store import Store
from peft_core.schemas.events import (
    JobCancelled,
    JobCompleted,
    JobInterrupted,
    JobResumed,
    JobStarted,
    PhaseStarted,
    RunPlanned,
    StepCompleted,
)
from peft_core.schemas.results import Metrics, Phase, Status
from tests.factories import make_job


@pytest.fixture
def database(tmp_path: Path) -> Path:
    return tmp_path / "data" / "peft.db"


@pytest.fixture
def store(database: Path) -> Store:
    clock = itertools.count(1.0)
    store = Store(database, now=lambda: next(clock))
    store.create()
    return store


def test_an_inserted_job_is_read_back_unchanged(store: Store) -> None:
    job = make_job()
    store.insert(job)
    assert store.get(job.job_id) == job
    assert store.latest("web") == job
    assert store.latest("other") is None


def test_an_illegal_event_writes_neither_event_nor_state(store: Store) -> None:
    store.insert(make_job("a"))
    store.append("a", JobStarted())
    with pytest.raises(IllegalTransition):
        store.append("a", JobStarted())
    assert [event.kind for event in store.events("a")] == ["job_started"]
    assert store.get("a").status is Status.IN_PROGRESS


def test_changed_since_reports_each_changed_job_once(store: Store) -> None:
    store.insert(make_job("a"))
    store.insert(make_job("b"))
    cursor, _ = store.changed_since(0)
    store.append("a", JobStarted())
    cursor, changed = store.changed_since(cursor)
    assert changed == ["a"]
    assert store.changed_since(cursor) == (cursor, [])


def test_the_queue_position_counts_running_and_waiting_jobs_ahead(store: Store) -> None:
    for number, name in enumerate("abc"):
        store.insert(make_job(name, created_at=float(number)))
    assert [store.queue_position(name) for name in "abc"] == [1, 2, 3]
    store.append("a", JobStarted())
    assert [store.queue_position(name) for name in "abc"] == [None, 2, 3]
    store.request_cancel("b")
    assert [store.queue_position(name) for name in "abc"] == [None, None, 2]


def test_cancelling_takes_effect_immediately_only_for_a_queued_job(store: Store) -> None:
    store.insert(make_job("a"))
    store.insert(make_job("b"))
    assert store.request_cancel("a").status is Status.CANCELLED
    store.append("b", JobStarted())
    assert store.request_cancel("b").status is Status.IN_PROGRESS
    assert store.cancel_requested("b")


def test_an_ended_job_cannot_be_cancelled(store: Store) -> None:
    store.insert(make_job("a"))
    store.append("a", JobStarted())
    store.append("a", JobCompleted(adapter_path="/x", metrics=Metrics()))
    with pytest.raises(JobStateError, match="it is completed"):
        store.request_cancel("a")


def test_a_resumed_job_joins_the_end_of_the_queue_without_its_cancel_request(store: Store) -> None:
    store.insert(make_job("a", created_at=-2.0))
    store.insert(make_job("b", created_at=-1.0))
    store.append("a", JobStarted())
    store.request_cancel("a")
    store.append("a", JobInterrupted(reason="x"))
    store.requeue("a", JobResumed())
    assert [job.job_id for job in store.in_state(Status.QUEUED)] == ["b", "a"]
    assert not store.cancel_requested("a")


def test_last_completed_returns_the_newest_jobs_first_up_to_the_count(store: Store) -> None:
    for name in ("a", "b", "c", "running"):
        store.insert(make_job(name))
        store.append(name, JobStarted())
    for name in ("a", "c", "b"):
        store.append(name, JobCompleted(adapter_path="/x", metrics=Metrics()))
    assert [job.job_id for job in store.last_completed(2)] == ["c", "b"]


def test_the_error_for_an_unknown_job_names_the_call_to_make(store: Store) -> None:
    with pytest.raises(JobNotFound, match="get_training_status"):
        store.get("nope")


def test_concurrent_writers_lose_no_event(store: Store) -> None:
    names = [f"job-{number}" for number in range(4)]
    for name in names:
        store.insert(make_job(name))

    def work(name: str) -> None:
        store.append(name, JobStarted())
        store.append(name, PhaseStarted(phase=Phase.TRAINING))
        store.append(name, RunPlanned(device="cpu", total_steps=25))
        for step in range(1, 26):
            store.append(
                name,
                StepCompleted(
                    step=step, loss=1, learning_rate=1, tokens=1, tokens_per_second=1, eta_s=1, memory_bytes=1
                ),
            )

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.get(name).step for name in names] == [25] * 4
    assert [len(store.events(name)) for name in names] == [28] * 4


def test_processes_that_create_the_database_concurrently_share_it(tmp_path: Path) -> None:
    stores = [Store(tmp_path / "peft.db", now=lambda: 0.0) for _ in range(8)]
    barrier = threading.Barrier(len(stores))

    def create(store: Store, name: str) -> None:
        barrier.wait()
        store.create()
        store.insert(make_job(name))

    threads = [threading.Thread(target=create, args=(s, f"job-{n}")) for n, s in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(stores[0].in_state(Status.QUEUED)) == len(stores)
    leftovers = [p.name for p in tmp_path.iterdir() if not p.name.startswith("peft.db")]
    assert leftovers == []


def test_a_damaged_database_is_a_storage_error(store: Store, database: Path) -> None:
    database.write_bytes(b"this was a database once" * 100)
    with pytest.raises(StorageError, match=r"not a database.* Move it away.* adapters are not affected") as caught:
        store.latest("web")
    assert caught.value.code == "damaged_database"


def test_a_database_with_damaged_pages_is_reported_as_damaged(store: Store, database: Path) -> None:
    store.insert(make_job("a"))
    with closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        page = db.execute("PRAGMA page_size").fetchone()[0]
    with database.open("r+b") as file:
        file.seek(page)
        file.write(b"\xff" * (database.stat().st_size - page))
    with pytest.raises(StorageError, match="is damaged: database disk image is malformed") as caught:
        store.get("a")
    assert caught.value.code == "damaged_database"


def test_an_unusable_data_directory_is_reported_with_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="CODEBASE_GARDENER_DATA_DIR"):
        Store(tmp_path / "file" / "peft.db", now=lambda: 0.0).create()


def test_an_unreadable_record_is_reported_by_name_and_stops_no_other_job(store: Store, database: Path) -> None:
    for name in ("edited", "fine"):
        store.insert(make_job(name, name))
    with closing(sqlite3.connect(database)) as db, db:
        state = json.loads(db.execute("SELECT state FROM jobs WHERE job_id = 'edited'").fetchone()[0])
        state["request"]["unknown_field"] = 1
        db.execute("UPDATE jobs SET state = ? WHERE job_id = 'edited'", (json.dumps(state),))
    for call in (
        lambda: store.get("edited"),
        lambda: store.latest("edited"),
        lambda: store.append("edited", JobStarted()),
        lambda: store.request_cancel("edited"),
    ):
        with pytest.raises(StorageError, match=r"job edited cannot be read: .*unknown_field") as caught:
            call()
        assert caught.value.code == "unreadable_job"
        assert "train_adapter" in str(caught.value)
    assert [job.job_id for job in store.in_state(Status.QUEUED)] == ["fine"]
    assert store.queue_position("fine") == 1
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE jobs SET status = 'completed'")
    assert [job.job_id for job in store.last_completed(9)] == ["fine"]


def test_a_record_that_is_not_json_is_skipped(store: Store, database: Path) -> None:
    for name in ("a", "broken"):
        store.insert(make_job(name))
    with closing(sqlite3.connect(database)) as db, db:
        db.execute("UPDATE jobs SET state = 'no JSON' WHERE job_id = 'broken'")
    assert [job.job_id for job in store.in_state(Status.QUEUED)] == ["a"]


def test_an_unreadable_event_is_skipped(store: Store, database: Path) -> None:
    store.insert(make_job("a"))
    with closing(sqlite3.connect(database)) as db, db:
        for event in ('{"kind": "of another version"}', "no JSON"):
            db.execute("INSERT INTO events (job_id, at, event) VALUES ('a', 0, ?)", (event,))
    store.append("a", JobCancelled())
    assert store.events("a") == store.newest_events("a", 9) == [JobCancelled()]


def test_a_cursor_of_a_deleted_database_reports_all_events_of_the_new_one(store: Store) -> None:
    store.insert(make_job("a"))
    store.append("a", JobStarted())
    assert store.changed_since(1_000) == (1, ["a"])


def test_a_long_history_is_thinned_out_per_kind_and_keeps_the_newest_event(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peft_core.jobs.store.MAX_EVENTS_PER_KIND", 10)
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
