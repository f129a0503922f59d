"""This process's end of the inference host: start it, ask it, notice its death.

A call talks to the host from the task that makes it; nothing runs in the background. Calls take turns. One that is
cancelled tells the host so and leaves; what the host still says about it is skipped by the next one. Only the call whose
turn it is changes anything here: whoever else looks, from another task or thread, only reads.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import anyio
from pydantic import BaseModel

from peft_core.errors import AdapterNotLoaded, InferenceError
from peft_core.inference.process import HostProcess, how_it_ended
from peft_core.inference.protocol import (
    IDLE_EXIT,
    Answered,
    Ask,
    Cancel,
    Failed,
    Generate,
    HostConfig,
    Load,
    Progress,
    Request,
)
from peft_core.results import Resident

CATCH_UP_S = 2.0

Report = Callable[[float, float | None, str], Awaitable[None]]  # done, total, message
AnswerT = TypeVar("AnswerT", bound=BaseModel)


class InferenceHost:
    """One host process at most, started when it is first needed."""

    def __init__(self, config: HostConfig, log_path: Path) -> None:
        self._config = config
        self._log_path = log_path
        self._turn = anyio.Lock()
        self._host: HostProcess | None = None
        self._last_id = 0
        self._closed = False
        self._obituary: str | None = None  # of the last host that was lost with something in memory

    @property
    def resident(self) -> Resident:
        """What the host holds in memory, as far as it has said; nothing when it does not run."""
        host = self._host
        return Resident() if host is None or host.ended else host.resident

    def is_still_loading(self, adapter_path: Path) -> bool:
        """Whether a load of it that was given up has not come to its end."""
        host = self._host
        requests = [one.request for one in list(host.given_up.values())] if host is not None and not host.ended else []
        return any(isinstance(request, Load) and request.adapter_path == adapter_path for request in requests)

    @property
    def pid(self) -> int | None:
        """Of the host, where one runs."""
        host = self._host
        return None if host is None or host.ended else host.process.pid

    async def ask(self, request: Request, answer_type: type[AnswerT], report: Report | None = None) -> AnswerT:
        """One request, in its turn. `elapsed_s` of the answer is what the caller waited.

        Starts a host where there is none and the request can do with an empty one.

        Raises:
            AdapterNotLoaded: there is no host, and so nothing that the request asks for.
            ModelError: the host refused, with its own code; or it died (`host_died`), and with it all that was loaded.
        """
        began = time.monotonic()
        if report is not None and self._turn.locked():
            await report(0, None, "waiting for another call to the model")
        async with self._turn:
            host = await self._ready(request, report)
            reply = await self._exchange(host, request, report)
            if reply is None and await host.exit_code() == IDLE_EXIT:
                # It had just gone to sleep: nothing was begun.
                host = await self._ready(request, report)
                reply = await self._exchange(host, request, report)
            if reply is None:
                raise await self._death(host, request)
            host.resident = reply.resident
            if isinstance(reply, Failed):
                problem = reply.problem
                raise InferenceError(problem.message, code=problem.code, suggestions=problem.suggestions)
            self._obituary = None
            waited = round(time.monotonic() - began, 3)
            return answer_type.model_validate({**reply.answer, "elapsed_s": waited})

    async def catch_up(self) -> None:
        """Hear what became of calls that were given up, so that `resident` is true; not for long."""
        host = self._host
        if host is None or not host.given_up or self._turn.locked():
            return
        async with self._turn:
            with anyio.move_on_after(CATCH_UP_S):
                await host.hear_out()

    def nothing_loaded(self, what: str = "No adapter is loaded", *, needed: bool = True) -> AdapterNotLoaded:
        """The error of a request for what is not there; says how it was lost, and where it was needed, what to do."""
        host = self._host
        lost = self._words_on(host) if host is not None and host.ended else self._obituary
        return AdapterNotLoaded(
            f"{what}.{f' {lost}: what it held is gone.' if lost else ''}",
            suggestions=[
                "Call load_adapter(adapter_path=...) first; list_adapters shows what there is",
                "Or call generate with use_base=true to have the base answer without an adapter",
            ]
            if needed
            else [],
        )

    async def aclose(self) -> None:
        """End the host, which has nothing to save. No other is started afterwards."""
        self._closed = True
        host, self._host = self._host, None
        if host is not None:
            await host.aclose()

    async def _ready(self, request: Request, report: Report | None) -> HostProcess:
        """The host that runs, or a fresh one."""
        if self._closed:
            raise _closed()
        if (host := self._host) is not None:
            free = not host.ended and await self._is_free(host, report)
            if self._closed:  # meanwhile
                raise _closed()
            if free:
                return host
            self._obituary = self._words_on(host) or self._obituary
            await host.aclose()
            self._host = None
        if not (isinstance(request, Load) or (isinstance(request, Generate) and request.without_adapter)):
            raise self.nothing_loaded()
        if report is not None:
            await report(0, None, "starting the inference process")
        host = await HostProcess.start(self._config, self._log_path)
        if self._closed:  # meanwhile
            await host.aclose()
            raise _closed()
        self._host = host
        return host

    async def _is_free(self, host: HostProcess, report: Report | None) -> bool:
        """Whether the host came back from all calls that were given up; where it does not in time, it is ended."""
        if not host.given_up:
            return True
        if report is not None:
            await report(0, None, "waiting for the end of a call that was cancelled")
        first = min(host.given_up.values(), key=lambda one: one.deadline)
        with anyio.move_on_after(max(0.0, first.deadline - time.monotonic())):
            await host.hear_out()
            if not host.given_up:
                return True
            await host.exit_code()  # it has ended instead
            return False
        self._obituary = (
            f"The inference process was ended: {first.patience_s:g} s after a call was cancelled ({first.request.kind}) it was "
            "still busy with it"
        )
        host.resident = Resident()
        with anyio.CancelScope(shield=True):
            await host.kill()
        return False

    async def _exchange(self, host: HostProcess, request: Request, report: Report | None) -> Answered | Failed | None:
        """Send and follow until the answer; None when the host ends before."""
        self._last_id += 1
        number = self._last_id
        try:
            await host.send(Ask(id=number, request=request))
            while True:
                reply = await host.receive()
                if reply is None or (reply.id == number and not isinstance(reply, Progress)):
                    return reply
                if not isinstance(reply, Progress):
                    host.hear(reply)
                elif reply.id == number and report is not None:
                    await report(reply.done, reply.total, reply.message)
        except BaseException:  # cancelled, mostly: whatever it is, nobody waits any more
            host.give_up(number, request)
            with anyio.CancelScope(shield=True):
                await host.send(Cancel(id=number))
            raise

    async def _death(self, host: HostProcess, request: Request) -> InferenceError:
        code = await host.exit_code()
        last = f" Its last words: {words}" if code > 0 and (words := host.last_words()) else ""
        return InferenceError(
            f"The inference process died during this call ({request.kind}): {how_it_ended(code)}.{last} "
            "Nothing is loaded now.",
            code="host_died",
            suggestions=["Call load_adapter again: a fresh process starts", f"The log is {self._log_path}"],
            details={"exit_code": code, "log_path": str(self._log_path)},
        )

    def _words_on(self, host: HostProcess) -> str | None:
        """How it ended; None where nothing was lost by it."""
        if host.resident.base_model is None or host.process.returncode is None:
            return None
        if host.process.returncode == IDLE_EXIT:
            return f"The inference process was ended after {self._config.idle_s:g} s without a call"
        return f"The inference process died ({how_it_ended(host.process.returncode)})"


def _closed() -> InferenceError:
    return InferenceError("The manager is closed.", code="closed")
