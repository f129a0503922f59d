"""Subscriptions to jobs: which sessions are notified of a change."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import anyio
import anyio.lowlevel
import pytest
from mcp.server.subscriptions import ResourcesListChanged, ResourceUpdated
from mcp.types import SubscribeRequestParams, UnsubscribeRequestParams

from server.resources import TrainingUpdates

URI = "training://job"


class Manager:
    """A manager whose only job changes all the time."""

    async def ensure_runner(self) -> None: ...

    async def changed_jobs(self, _: int | None) -> tuple[int, list[str]]:
        return 1, ["job"]

    async def unfinished_jobs(self) -> set[str]:
        return {"job"}


class Session:
    def __init__(self, *, closed: bool = False) -> None:
        self.closed = closed
        self.updates = 0
        self.updated_thrice = anyio.Event()

    async def send_resource_updated(self, uri: str) -> None:
        assert uri == URI
        self.updates += 1
        if self.closed:
            raise anyio.ClosedResourceError
        if self.updates == 3:
            self.updated_thrice.set()


@pytest.fixture(autouse=True)
def poll_without_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.resources.POLL_INTERVAL_S", 0.0)


async def subscribe(updates: TrainingUpdates, *sessions: Session) -> None:
    for session in sessions:
        await updates.subscribe(cast("Any", SimpleNamespace(session=session)), SubscribeRequestParams(uri=URI))


async def publish_until_updated(updates: TrainingUpdates, session: Session) -> None:
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(updates.publish_changes, cast("Any", Manager()))
            await session.updated_thrice.wait()
            group.cancel_scope.cancel()


async def test_a_closed_session_is_dropped_and_the_others_stay_subscribed() -> None:
    updates, closed, open_ = TrainingUpdates(), Session(closed=True), Session()
    await subscribe(updates, closed, open_)
    await publish_until_updated(updates, open_)
    assert closed.updates == 1


async def test_a_session_that_unsubscribes_does_not_unsubscribe_the_others() -> None:
    updates, leaving, staying = TrainingUpdates(), Session(), Session()
    await subscribe(updates, leaving, staying)
    context = cast("Any", SimpleNamespace(session=leaving))
    await updates.unsubscribe(context, UnsubscribeRequestParams(uri=URI))
    await publish_until_updated(updates, staying)
    assert leaving.updates == 0


async def test_unsubscribing_without_a_subscription_does_nothing() -> None:
    updates = TrainingUpdates()
    context = cast("Any", SimpleNamespace(session=Session()))
    await updates.unsubscribe(context, UnsubscribeRequestParams(uri=URI))


async def test_a_failing_bus_does_not_keep_updates_from_subscribed_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, session = TrainingUpdates(), Session()

    async def fail(_: object) -> None:
        raise anyio.BrokenResourceError

    monkeypatch.setattr(updates.bus, "publish", fail)
    await subscribe(updates, session)
    await publish_until_updated(updates, session)


async def test_the_list_of_resources_is_reported_as_changed_when_a_job_starts_and_when_it_ends() -> None:
    class Starting(Manager):
        states = iter([set[str](), {"job"}, {"job"}, set[str]()])

        async def unfinished_jobs(self) -> set[str]:
            return next(self.states, set())

    updates, session, published = TrainingUpdates(), Session(), list[object]()
    updates.bus.subscribe(published.append)
    await subscribe(updates, session)
    with anyio.fail_after(20):
        async with anyio.create_task_group() as group:
            group.start_soon(updates.publish_changes, cast("Any", Starting()))
            while published.count(ResourceUpdated(uri=URI)) < 6:
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    assert published.count(ResourcesListChanged()) == 2
