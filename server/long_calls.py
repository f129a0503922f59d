"""Calls that continue after their request was answered, because they can take longer than clients wait for an answer: a load,
an export, and a training for which a cluster is asked what it has.

A client with the extension for tasks follows such a call as a task (`tasks.py`). Any other gets an answer that the call is
still at work, and makes the same call again to wait for its result.

That call may end between the two requests. Its result answers the second one only while it is true: for a few minutes, and
until the client calls a tool that changes something or generates, for it has moved on then. A load that succeeded is never
answered from its result: another one takes milliseconds if the adapter is still in memory, and whether it is, and whether it
is still the project's current adapter, is what only a load finds out.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
from anyio.abc import TaskGroup
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.shared.exceptions import MCPError
from mcp.types import INTERNAL_ERROR, CallToolRequestParams, CallToolResult
from pydantic import BaseModel

from peft_core.schemas.results import NextStep
from peft_core.system.durations import format_duration
from server.format_results import compact, tool_result
from server.progress import recipient

LONG_TOOLS = frozenset({"load_adapter", "export_adapter"})
MAY_ASK_CLUSTER = frozenset({"train_adapter", "inspect_training_data", "refresh_project"})
MAX_REPEATED = 1000  # characters of a call's arguments
KEPT_S = 3600.0  # how long a task's result is kept for a client that does not ask for it
REPEATED_WITHIN_S = 300.0  # how long a result answers an equal call; a model repeats it in seconds, a user may be asked


def may_be_long(params: CallToolRequestParams) -> bool:
    return params.name in LONG_TOOLS or _may_ask_cluster(params)


def _may_ask_cluster(params: CallToolRequestParams) -> bool:
    """Return whether the call may ask a cluster, which can take minutes. A refresh does if the project was trained there."""
    config = (params.arguments or {}).get("config")
    if isinstance(config, str):  # tools take JSON written as text, too
        with suppress(ValueError, RecursionError):
            config = json.loads(config)
    is_for_cluster = isinstance(config, Mapping) and config.get("run_on") == "cluster"
    return params.name in MAY_ASK_CLUSTER and (is_for_cluster or params.name == "refresh_project")


class StillWorking(BaseModel):
    """What a client without the extension for tasks is answered before the call has ended."""

    status: Literal["working"] = "working"
    elapsed_s: float
    next: str
    next_step: NextStep | None  # None if its arguments are too long to repeat, such as inline records


@dataclass(eq=False)
class LongCall:
    """A call of a tool, which one request after another may wait for."""

    tool: str
    call_id: str = field(default_factory=lambda: secrets.token_hex(16))
    message: str = ""  # of its latest progress
    result: HandlerResult | None = None
    error: Exception | None = None
    created_at: float = field(default_factory=time.time)
    updated_at: float = field(default_factory=time.time)
    _scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    _done: anyio.Event = field(default_factory=anyio.Event)
    _waiting: list[ServerRequestContext[Any, Any]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self._done.is_set() or self._scope.cancel_called

    @property
    def was_cancelled(self) -> bool:
        return self._scope.cancelled_caught

    def ended_before(self, at: float) -> bool:
        return self._done.is_set() and self.updated_at < at

    @property
    def has_loaded(self) -> bool:
        """Whether it loaded an adapter."""
        content = self.result.structured_content if isinstance(self.result, CallToolResult) else None
        return self.tool == "load_adapter" and (content or {}).get("status") == "loaded"

    @property
    def elapsed_s(self) -> float:
        return time.time() - self.created_at

    def cancel(self) -> None:
        self._scope.cancel()

    async def record(self, done: float, total: float | None, message: str) -> None:
        """Keep a progress message, and send it to the requests that wait."""
        self.message, self.updated_at = message.removesuffix("."), time.time()
        for ctx in tuple(self._waiting):
            await ctx.session.report_progress(done, total, message)

    async def wait(self, ctx: ServerRequestContext[Any, Any], patience_s: float) -> HandlerResult | None:
        """Return what the call returns, or None if it is still at work after `patience_s`.

        The call is cancelled when the last request that waits for it is cancelled.

        Raises:
            Exception: the call ended with it.
        """
        self._waiting.append(ctx)
        try:
            with anyio.move_on_after(patience_s):
                await self._done.wait()
        except BaseException:
            if self._waiting == [ctx]:
                self.cancel()
            raise
        finally:
            self._waiting.remove(ctx)
        if self.error is not None:
            raise self.error
        return self.result

    async def run(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> None:
        """Make the call. It continues whatever becomes of its request."""
        recipient.set(self)
        try:
            with self._scope:
                self.result = await call_next(ctx)
            if self._scope.cancelled_caught:
                self.error = MCPError(code=INTERNAL_ERROR, message="The call was cancelled.")
        except Exception as error:  # noqa: BLE001 -- raised in the request, and must not end the session
            self.error = error
        finally:
            self.updated_at = time.time()
            self._done.set()


class LongCalls:
    """The long calls of this session: each is kept until its result was fetched, or for as long as that is of use."""

    def __init__(self, group: TaskGroup) -> None:
        self._group = group  # in which the calls run: it ends with the session
        self._calls: dict[str, LongCall] = {}  # by id
        self._repeatable: dict[str, LongCall] = {}  # by tool and arguments

    def get(self, call_id: str) -> LongCall | None:
        return self._calls.get(call_id)

    async def call(
        self, params: CallToolRequestParams, ctx: ServerRequestContext[Any, Any], call_next: CallNext, patience_s: float
    ) -> HandlerResult | LongCall:
        """Return the result of a call, or the call if it is still at work after a while: `get` finds it by its id."""
        _drop(self._calls, lambda kept: kept.ended_before(time.time() - KEPT_S))
        call = self._start(params, ctx, call_next)
        self._calls[call.call_id] = call
        result = await _wait(self._calls, call.call_id, ctx, patience_s)
        return result if result is not None else call

    async def call_again(
        self, params: CallToolRequestParams, ctx: ServerRequestContext[Any, Any], call_next: CallNext, patience_s: float
    ) -> HandlerResult:
        """Return the result of a call that an equal one may have started, or the answer that it is still at work.

        See the module's docstring for which results of calls that have ended are returned.
        """
        key = _key(params)
        oldest = time.time() - REPEATED_WITHIN_S
        _drop(self._repeatable, lambda kept: kept.ended_before(oldest) or kept.has_loaded)
        if key not in self._repeatable:
            self._repeatable[key] = self._start(params, ctx, call_next)
        call = self._repeatable[key]
        if _may_ask_cluster(params) and not call.message:
            call.message = "waiting for the answer of the cluster"
        result = await _wait(self._repeatable, key, ctx, patience_s)
        return result if result is not None else _still_working(params, call)

    def move_on(self, params: CallToolRequestParams) -> None:
        """Drop the results that were not fetched, except of an equal call: this one may change what they say."""
        equal = self._repeatable.get(_key(params))
        _drop(self._repeatable, lambda kept: kept.is_over and kept is not equal)

    def _start(
        self, params: CallToolRequestParams, ctx: ServerRequestContext[Any, Any], call_next: CallNext
    ) -> LongCall:
        call = LongCall(params.name)
        self._group.start_soon(call.run, ctx, call_next)
        return call


async def _wait(
    calls: dict[str, LongCall], key: str, ctx: ServerRequestContext[Any, Any], patience_s: float
) -> HandlerResult | None:
    """Wait for a call, which is kept no longer when it has ended."""
    call = calls[key]
    try:
        return await call.wait(ctx, patience_s)
    finally:
        if call.is_over and calls.get(key) is call:
            del calls[key]


def _drop(calls: dict[str, LongCall], is_stale: Callable[[LongCall], bool]) -> None:
    for key in [key for key, call in calls.items() if is_stale(call)]:
        del calls[key]


def _key(params: CallToolRequestParams) -> str:
    return f"{params.name} {json.dumps(compact(params.arguments or {}), sort_keys=True)}"


def _still_working(params: CallToolRequestParams, call: LongCall) -> HandlerResult:
    tool, arguments = params.name, compact(params.arguments or {})
    step: NextStep | None = None
    sentence = f"Call {tool} again with the same arguments: that waits for its result."
    if len(json.dumps(arguments)) <= MAX_REPEATED:
        step = NextStep(tool=tool, arguments=arguments, reason="The same call again waits for its result.")
        sentence = step.sentence
    stage = f": {call.message}" if call.message else ""
    return tool_result(
        StillWorking(elapsed_s=round(call.elapsed_s, 1), next=sentence, next_step=step),
        f"{tool} is still at work after {format_duration(call.elapsed_s)}{stage}.",
    )
