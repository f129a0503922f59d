"""Who hears of a job that has changed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from mcp.types import SubscribeRequestParams

from server.resources import TrainingUpdates

URI = "training://job"


class Manager:
    """One whose job changes all the time."""

    async def ensure_runner(self) -> None: ...

    async def changed_jobs(self, _: int | None) -> tuple[int, list[str]]:
        return 1, ["job"]


class Session:
    def __init__(self, *, closed: bool) -> None:
        self.closed = closed
        self.told = 0
        self.often = anyio.Event()

    async def send_resource_updated(self, uri: str) -> None:
        assert uri == URI
        self.told += 1
        if self.closed:
            raise anyio.ClosedResourceError
        if self.told == 3:
            self.often.set()


async def test_a_session_that_was_closed_is_not_told_again_and_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.resources.POLL_INTERVAL_S", 0.0)
    updates = TrainingUpdates()
    closed, open_ = Session(closed=True), Session(closed=False)
    for session in (closed, open_):
        await updates.subscribe(cast("Any", SimpleNamespace(session=session)), SubscribeRequestParams(uri=URI))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(updates.tell, cast("Any", Manager()))
            await open_.often.wait()
            group.cancel_scope.cancel()
    assert closed.told == 1


async def test_a_bus_that_fails_keeps_nobody_from_hearing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.resources.POLL_INTERVAL_S", 0.0)
    updates = TrainingUpdates()
    session = Session(closed=False)

    async def fail(_: object) -> None:
        raise anyio.BrokenResourceError

    monkeypatch.setattr(updates.bus, "publish", fail)
    await updates.subscribe(cast("Any", SimpleNamespace(session=session)), SubscribeRequestParams(uri=URI))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(updates.tell, cast("Any", Manager()))
            await session.often.wait()
            group.cancel_scope.cancel()
