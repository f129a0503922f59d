"""Several servers and many concurrent calls on one data directory."""

from __future__ import annotations

import os
import random
import sqlite3
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing
from itertools import pairwise
from typing import Any

import pytest

from peft_core.jobs.store import Store
from peft_core.schemas.results import Status
from tests.survival.scenario import Scenario, until
from tests.survival.wire import Server, server

pytestmark = pytest.mark.survival

SERVERS = 4
CALLS = int(os.environ.get("PEFT_SURVIVAL_CALLS", "200"))
SEED = int(os.environ.get("PEFT_SURVIVAL_SEED", "0"))
EXPECTED_ERRORS = (
    "unknown_project",
    "job_already_ended",
    "not_resumable",
    "job_not_found",
    "nothing_to_cancel",
    "adapter_not_found",
)


def test_four_servers_on_one_data_directory_lose_no_job_and_run_none_twice(scenario: Scenario) -> None:
    answers: list[tuple[str, dict[str, Any]]] = []
    submitted: list[str] = []

    def call(running: Server, number: int, chooser: random.Random) -> None:
        project = f"p{number % 6}"
        tool = chooser.choices(
            ["train_adapter", "get_training_status", "list_adapters", "cancel_training", "resume_training"],
            [8, 50, 20, 8, 14],
        )[0]
        arguments: dict[str, Any] = {"project_id": project}
        if tool == "train_adapter":
            arguments |= {
                "training_data": str(scenario.source),
                "config": {"base_model": str(scenario.base), **scenario.config},
            }
        elif tool == "get_training_status":
            arguments["wait_s"] = 0
        elif tool == "resume_training":
            arguments = {"job_id": chooser.choice(submitted) if submitted else "none"}
        answer = running.call(tool, **arguments)
        answers.append((tool, answer))
        if tool == "train_adapter" and not answer.get("isError"):
            submitted.append(answer["structuredContent"]["job_id"])

    def work(running: Server, numbers: range) -> None:
        chooser = random.Random(f"{SEED} {numbers}")  # noqa: S311 -- not for cryptography
        for number in numbers:
            call(running, number, chooser)

    with ExitStack() as stack:
        servers = [stack.enter_context(server(scenario.paths.root, cwd=scenario.root)) for _ in range(SERVERS)]
        # Two threads per server, so that calls to the same server overlap too.
        threads = [
            threading.Thread(target=work, args=(servers[n % SERVERS], range(n, CALLS, 2 * SERVERS)))
            for n in range(2 * SERVERS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    # The servers are gone; the runner finishes the queue.
    until(lambda: all(scenario.status(job).status.is_final for job in submitted), "all jobs to end", 240)
    scenario.expect_no_processes()

    errors = [str(answer) for _, answer in answers if answer.get("isError")]
    assert len(answers) == CALLS
    assert [error for error in errors if not any(f"[{code}]" in error for code in EXPECTED_ERRORS)] == []
    print(Counter(tool for tool, _ in answers), f"{len(submitted)} jobs, {len(errors)} refusals")
    expect_one_at_a_time(scenario, submitted)
    for job in submitted:
        status = scenario.status(job)
        assert status.status in (Status.COMPLETED, Status.CANCELLED), status
        published = scenario.registry.published(status.project_id, job)
        assert (published is not None) == (status.status is Status.COMPLETED)
    scenario.check()


def expect_one_at_a_time(scenario: Scenario, jobs: list[str]) -> None:
    """Check that no run started before the previous one ended, and that each started at most as often as it was queued."""
    store = Store(scenario.paths.database, time.time)
    spans = []
    for job in jobs:
        kinds = [event.kind for event in store.events(job)]
        assert kinds.count("job_started") <= 1 + kinds.count("job_resumed")
        if store.get(job).status is Status.COMPLETED:
            spans.append((time_of(scenario, job, "job_started"), time_of(scenario, job, "job_completed")))
    for (_, ended), (started, _) in pairwise(sorted(spans)):
        assert ended <= started


def time_of(scenario: Scenario, job: str, kind: str) -> float:
    """Return when the latest event of this kind was recorded."""
    query = "SELECT max(at) FROM events WHERE job_id = ? AND json_extract(event, '$.kind') = ?"
    with closing(sqlite3.connect(scenario.paths.database)) as db:
        return float(db.execute(query, (job, kind)).fetchone()[0])
