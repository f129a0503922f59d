"""This process's end of the inference host: start it, ask it, notice its death.

A call talks to the host from the task that makes it; nothing runs in the background. Calls take turns. One that is
cancelled tells the host so and leaves; what the host still says about it is skipped by the next one. Only the call whose
turn it is changes anything here: whoever else looks, from another task or thread, only reads.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import BaseModel

from peft_core.errors import AdapterNotLoaded, InferenceError
from peft_core.inference.protocol import (
    FROM_HOST,
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

HOST = [sys.executable, "-P", "-m", "peft_core.inference.host"]  # -P: the working directory is no place for modules
MAX_LINE = 64 << 20
GRACE_S = 1.0
CATCH_UP_S = 2.0
TAIL_BYTES = 2000
MAX_LOG_BYTES = 4 << 20

Report = Callable[[float, float | None, str], Awaitable[None]]  # done, total, message
AnswerT = TypeVar("AnswerT", bound=BaseModel)


@dataclass
class _Host:
    """A host process, and what it has said of itself."""

    process: Process
    lines: BufferedByteReceiveStream
    log_start: int  # where in the log file its words begin
    resident: Resident
    unheard: set[int] = field(default_factory=set)  # requests that were given up, and are still to be answered

    @property
    def ended(self) -> bool:
        return self.process.returncode is not None


class InferenceHost:
    """One host process at most, started when it is first needed."""

    def __init__(self, config: HostConfig, log_path: Path) -> None:
        self._config = config
        self._log_path = log_path
        self._turn = anyio.Lock()
        self._host: _Host | None = None
        self._last_id = 0
        self._closed = False
        self._obituary: str | None = None  # of the last host that was lost with something in memory

    @property
    def resident(self) -> Resident:
        """What the host holds in memory, as far as it has said; nothing when it does not run."""
        host = self._host
        return Resident() if host is None or host.ended else host.resident

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
            if reply is None and await _exit_code(host) == IDLE_EXIT:
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
        if host is None or not host.unheard or self._turn.locked():
            return
        async with self._turn:
            with anyio.move_on_after(CATCH_UP_S):
                while host.unheard and (reply := await _receive(host)) is not None:
                    if not isinstance(reply, Progress):
                        _hear(host, reply)

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
            with anyio.CancelScope(shield=True):
                with suppress(ProcessLookupError):
                    host.process.kill()
                await host.process.aclose()

    async def _ready(self, request: Request, report: Report | None) -> _Host:
        """The host that runs, or a fresh one."""
        if self._closed:
            raise InferenceError("The manager is closed.", code="closed")
        if self._host is not None:
            if not self._host.ended:
                return self._host
            self._obituary = self._words_on(self._host) or self._obituary
            await self._host.process.aclose()
            self._host = None
        if not (isinstance(request, Load) or (isinstance(request, Generate) and request.without_adapter)):
            raise self.nothing_loaded()
        if report is not None:
            await report(0, None, "starting the inference process")
        self._host = await self._start()
        return self._host

    async def _start(self) -> _Host:
        try:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            if self._log_path.exists() and self._log_path.stat().st_size > MAX_LOG_BYTES:
                self._log_path.replace(self._log_path.with_suffix(".old.log"))
            with self._log_path.open("ab") as log, anyio.CancelScope(shield=True):  # no host that nobody knows of
                process = await anyio.open_process(
                    [*HOST, self._config.model_dump_json()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=self._log_path.parent,
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                )
                assert process.stdout is not None  # noqa: S101 -- asked for as a pipe
                return _Host(process, BufferedByteReceiveStream(process.stdout), log.tell(), Resident())
        except OSError as error:
            raise InferenceError(
                f"The inference process cannot be started: {error.strerror or error} ({error.filename or HOST[0]}).",
                code="host_start",
                suggestions=["Check that CODEBASE_GARDENER_DATA_DIR is writable and that the machine has memory left"],
            ) from error
        raise AssertionError("the shield lets nothing through")

    async def _exchange(self, host: _Host, request: Request, report: Report | None) -> Answered | Failed | None:
        """Send and follow until the answer; None when the host ends before."""
        self._last_id += 1
        number = self._last_id
        try:
            await _send(host, Ask(id=number, request=request))
            while True:
                reply = await _receive(host)
                if reply is None or (reply.id == number and not isinstance(reply, Progress)):
                    return reply
                if not isinstance(reply, Progress):
                    _hear(host, reply)
                elif reply.id == number and report is not None:
                    await report(reply.done, reply.total, reply.message)
        except BaseException:  # cancelled, mostly: whatever it is, nobody waits any more
            host.unheard.add(number)
            with anyio.CancelScope(shield=True):
                await _send(host, Cancel(id=number))
            raise

    async def _death(self, host: _Host, request: Request) -> InferenceError:
        code = await _exit_code(host)
        last = f" Its last words: {words}" if code > 0 and (words := self._last_words(host)) else ""
        return InferenceError(
            f"The inference process died during this call ({request.kind}): {how_it_ended(code)}.{last} "
            "Nothing is loaded now.",
            code="host_died",
            suggestions=["Call load_adapter again: a fresh process starts", f"The log is {self._log_path}"],
            details={"exit_code": code, "log_path": str(self._log_path)},
        )

    def _words_on(self, host: _Host) -> str | None:
        """How it ended; None where nothing was lost by it."""
        if host.resident.base_model is None or host.process.returncode is None:
            return None
        if host.process.returncode == IDLE_EXIT:
            return f"The inference process was ended after {self._config.idle_s:g} s without a call"
        return f"The inference process died ({how_it_ended(host.process.returncode)})"

    def _last_words(self, host: _Host) -> str:
        try:
            with self._log_path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(min(host.log_start, end), end - TAIL_BYTES))
                tail = log.read().decode("utf-8", "replace").strip()
        except OSError:
            return ""
        return tail.splitlines()[-1][:300] if tail else ""


def _hear(host: _Host, reply: Answered | Failed) -> None:
    """Take note of the answer to a call that was given up."""
    host.resident = reply.resident
    host.unheard.discard(reply.id)


async def _send(host: _Host, said: Ask | Cancel) -> None:
    assert host.process.stdin is not None  # noqa: S101 -- asked for as a pipe
    with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):  # dead: no answer will come, and that tells
        await host.process.stdin.send(said.model_dump_json().encode() + b"\n")


async def _receive(host: _Host) -> Progress | Answered | Failed | None:
    try:
        line = await host.lines.receive_until(b"\n", MAX_LINE)
    except (anyio.IncompleteRead, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
        return None
    return FROM_HOST.validate_json(line)


async def _exit_code(host: _Host) -> int:
    """Of a host that has closed its output."""
    with anyio.move_on_after(GRACE_S):
        return await host.process.wait()
    with suppress(ProcessLookupError):
        host.process.kill()
    return await host.process.wait()


def how_it_ended(code: int) -> str:
    """Of an exit code, in words."""
    if code >= 0:
        return f"it ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (", perhaps because memory ran out" if code == -signal.SIGKILL else "")
