"""The store: events and states in one place, for many processes."""

from __future__ import annotations

import itertools
import sqlite3
import threading
from pathlib import Path

import pytest

from peft_core.errors import JobNotFound, JobStateError, StorageError
from peft_core.jobs.state import IllegalTransition
from peft_core.jobs.store import Store
from peft_core.schemas.events import (
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
def store(tmp_path: Path) -> Store:
    clock = itertools.count(1.0)
    store = Store(tmp_path / "data" / "peft.db", now=lambda: next(clock))
    store.create()
    return store


def test_what_was_inserted_is_read_back_equal(store: Store) -> None:
    job = make_job()
    store.insert(job)
    assert store.get(job.job_id) == job
    assert store.latest("web") == job
    assert store.latest("other") is None


def test_an_event_and_its_state_are_written_together_or_not_at_all(store: Store) -> None:
    store.insert(make_job("a"))
    store.append("a", JobStarted())
    with pytest.raises(IllegalTransition):
        store.append("a", JobStarted())
    assert [event.kind for event in store.events("a")] == ["job_started"]
    assert store.get("a").status is Status.IN_PROGRESS


def test_each_event_is_found_by_followers(store: Store) -> None:
    store.insert(make_job("a"))
    store.insert(make_job("b"))
    cursor, _ = store.changed_since(0)
    store.append("a", JobStarted())
    cursor, changed = store.changed_since(cursor)
    assert changed == ["a"]
    assert store.changed_since(cursor) == (cursor, [])


def test_the_queue_position_counts_what_runs_and_what_waits_before(store: Store) -> None:
    for number, name in enumerate("abc"):
        store.insert(make_job(name, created_at=float(number)))
    assert [store.queue_position(name) for name in "abc"] == [1, 2, 3]
    store.append("a", JobStarted())
    assert [store.queue_position(name) for name in "abc"] == [None, 2, 3]
    store.request_cancel("b")
    assert [store.queue_position(name) for name in "abc"] == [None, None, 2]


def test_cancelling_a_queued_job_is_immediate_and_a_running_one_only_asked(store: Store) -> None:
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


def test_a_resumed_job_goes_to_the_end_of_the_queue_and_forgets_the_request_to_cancel(store: Store) -> None:
    store.insert(make_job("a", created_at=-2.0))
    store.insert(make_job("b", created_at=-1.0))
    store.append("a", JobStarted())
    store.request_cancel("a")
    store.append("a", JobInterrupted(reason="x"))
    store.requeue("a", JobResumed())
    assert [job.job_id for job in store.in_state(Status.QUEUED)] == ["b", "a"]
    assert not store.cancel_requested("a")


def test_the_newest_completed_jobs_come_newest_first_and_no_more_than_asked_for(store: Store) -> None:
    for name in ("a", "b", "c", "running"):
        store.insert(make_job(name))
        store.append(name, JobStarted())
    for name in ("a", "c", "b"):
        store.append(name, JobCompleted(adapter_path="/x", metrics=Metrics()))
    assert [job.job_id for job in store.last_completed(2)] == ["c", "b"]


def test_an_unknown_job_is_an_error_that_says_what_to_call(store: Store) -> None:
    with pytest.raises(JobNotFound, match="get_training_status"):
        store.get("nope")


def test_many_writers_lose_nothing(store: Store) -> None:
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
                    step=step,
                    loss=1,
                    learning_rate=1,
                    tokens=1,
                    tokens_per_second=1,
                    eta_s=1,
                    memory_bytes=1,
                ),
            )

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.get(name).step for name in names] == [25] * 4
    assert [len(store.events(name)) for name in names] == [28] * 4


def test_two_that_create_at_once_share_one_database(tmp_path: Path) -> None:
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


def test_a_database_of_a_newer_version_is_refused_politely(store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "data" / "peft.db") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(StorageError, match="newer peft-mcp") as caught:
        store.latest("web")
    assert caught.value.code == "newer_database"


def test_a_damaged_database_is_an_error_that_names_its_place(store: Store, tmp_path: Path) -> None:
    (tmp_path / "data" / "peft.db").write_bytes(b"this was a database once" * 100)
    with pytest.raises(StorageError, match="not a database"):
        store.latest("web")


def test_a_place_that_cannot_be_a_directory_is_named_with_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="CODEBASE_GARDENER_DATA_DIR"):
        Store(tmp_path / "file" / "peft.db", now=lambda: 0.0).create()
