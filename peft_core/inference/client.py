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
from typing import BinaryIO, TypeVar

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import BaseModel

from peft_core.errors import AdapterNotLoaded, InferenceError
from peft_core.inference.protocol import (
    FROM_HOST,
    IDLE_EXIT,
    Cancel,
    Command,
    ErrorResponse,
    Generate,
    HostConfig,
    Load,
    Progress,
    Request,
    Response,
)
from peft_core.schemas.results import MemoryState

CATCH_UP_S = 2.0

ProgressCallback = Callable[[float, float | None, str], Awaitable[None]]  # done, total, message
AnswerT = TypeVar("AnswerT", bound=BaseModel)


class InferenceClient:
    """One host process at most, started when it is first needed."""

    def __init__(self, config: HostConfig, log_path: Path) -> None:
        self._config = config
        self._log_path = log_path
        self._turn = anyio.Lock()
        self._host: WorkerProcess | None = None
        self._last_id = 0
        self._closed = False
        self._last_exit_reason: str | None = None  # of the last host that was lost with something in memory

    @property
    def resident(self) -> MemoryState:
        """What the host holds in memory, as far as it has said; nothing when it does not run."""
        host = self._host
        return MemoryState() if host is None or host.ended else host.resident

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

    async def ask(
        self,
        request: Command,
        answer_type: type[AnswerT],
        report: ProgressCallback | None = None,
    ) -> AnswerT:
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
            if isinstance(reply, ErrorResponse):
                problem = reply.problem
                raise InferenceError(problem.message, code=problem.code, suggestions=problem.suggestions)
            self._last_exit_reason = None
            waited = round(time.monotonic() - began, 3)
            return answer_type.model_validate({**reply.answer, "elapsed_s": waited})

    async def sync(self) -> None:
        """Hear what became of calls that were given up, so that `resident` is true; not for long."""
        host = self._host
        if host is None or not host.given_up or self._turn.locked():
            return
        async with self._turn:
            with anyio.move_on_after(CATCH_UP_S):
                await host.drain()

    def nothing_loaded(self, what: str = "No adapter is loaded", *, needed: bool = True) -> AdapterNotLoaded:
        """The error of a request for what is not there; says how it was lost, and where it was needed, what to do."""
        host = self._host
        lost = self._words_on(host) if host is not None and host.ended else self._last_exit_reason
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

    async def _ready(self, request: Command, report: ProgressCallback | None) -> WorkerProcess:
        """The host that runs, or a fresh one."""
        if self._closed:
            raise _closed()
        if (host := self._host) is not None:
            free = not host.ended and await self._is_free(host, report)
            if self._closed:  # meanwhile
                raise _closed()
            if free:
                return host
            self._last_exit_reason = self._words_on(host) or self._last_exit_reason
            await host.aclose()
            self._host = None
        if not (isinstance(request, Load) or (isinstance(request, Generate) and request.without_adapter)):
            raise self.nothing_loaded()
        if report is not None:
            await report(0, None, "starting the inference process")
        host = await WorkerProcess.start(self._config, self._log_path)
        if self._closed:  # meanwhile
            await host.aclose()
            raise _closed()
        self._host = host
        return host

    async def _is_free(self, host: WorkerProcess, report: ProgressCallback | None) -> bool:
        """Whether the host came back from all calls that were given up; where it does not in time, it is ended."""
        if not host.given_up:
            return True
        if report is not None:
            await report(0, None, "waiting for the end of a call that was cancelled")
        first = min(host.given_up.values(), key=lambda one: one.deadline)
        with anyio.move_on_after(max(0.0, first.deadline - time.monotonic())):
            await host.drain()
            if not host.given_up:
                return True
            await host.exit_code()  # it has ended instead
            return False
        self._last_exit_reason = (
            f"The inference process was ended: {first.patience_s:g} s after a call was cancelled ({first.request.kind}) it was "
            "still busy with it"
        )
        host.resident = MemoryState()
        with anyio.CancelScope(shield=True):
            await host.kill()
        return False

    async def _exchange(
        self,
        host: WorkerProcess,
        request: Command,
        report: ProgressCallback | None,
    ) -> Response | ErrorResponse | None:
        """Send and follow until the answer; None when the host ends before."""
        self._last_id += 1
        number = self._last_id
        try:
            await host.send(Request(id=number, request=request))
            while True:
                reply = await host.receive()
                if reply is None or (reply.id == number and not isinstance(reply, Progress)):
                    return reply
                if not isinstance(reply, Progress):
                    host.hear(reply)
                elif reply.id == number and report is not None:
                    await report(reply.done, reply.total, reply.message)
        except BaseException:  # cancelled, mostly: whatever it is, nobody waits any more
            host.abandon(number, request)
            with anyio.CancelScope(shield=True):
                await host.send(Cancel(id=number))
            raise

    async def _death(self, host: WorkerProcess, request: Command) -> InferenceError:
        code = await host.exit_code()
        last = f" Its last words: {words}" if code > 0 and (words := host.log_tail()) else ""
        return InferenceError(
            f"The inference process died during this call ({request.kind}): {how_it_ended(code)}.{last} "
            "Nothing is loaded now.",
            code="host_died",
            suggestions=["Call load_adapter again: a fresh process starts", f"The log is {self._log_path}"],
            details={"exit_code": code, "log_path": str(self._log_path)},
        )

    def _words_on(self, host: WorkerProcess) -> str | None:
        """How it ended; None where nothing was lost by it."""
        if host.resident.base_model is None or host.process.returncode is None:
            return None
        if host.process.returncode == IDLE_EXIT:
            return f"The inference process was ended after {self._config.idle_s:g} s without a call"
        return f"The inference process died ({how_it_ended(host.process.returncode)})"


def _closed() -> InferenceError:
    return InferenceError("The manager is closed.", code="closed")


# FOLDED FROM peft_core.inference.client: The inference process as its client holds it: started, spoken to, heard,
# ended. Who may speak when is the client's affair.

HOST = [sys.executable, "-P", "-m", "peft_core.inference.worker"]  # -P: the working directory is no place for modules
MAX_LINE = 64 << 20
GRACE_S = 1.0
# How long a request that was given up may keep the host busy: until a long prompt is read; or until a base is loaded, which
# may be converted for it once. The next call needs that, too: thrown away with the host, it would be begun again by each
# call of a client that does not wait as long.
ANSWER_PATIENCE_S = 120.0
LOAD_PATIENCE_S = 900.0
TAIL_BYTES = 2000
MAX_LOG_BYTES = 4 << 20


@dataclass(frozen=True)
class CancelledRequest:
    """A request that nobody waits for any more, and that is still to be answered."""

    request: Command
    patience_s: float
    deadline: float  # monotonic clock


@dataclass
class WorkerProcess:
    process: Process
    lines: BufferedByteReceiveStream
    log_path: Path
    log_start: int  # where in the log file its words begin
    resident: MemoryState = field(default_factory=MemoryState)  # as far as it has said
    given_up: dict[int, CancelledRequest] = field(default_factory=dict)

    @classmethod
    async def start(cls, config: HostConfig, log_path: Path) -> WorkerProcess:
        """A fresh one, in seconds.

        Raises:
            InferenceError: it cannot be started.
        """
        try:
            with _log(log_path) as log, anyio.CancelScope(shield=True):  # no host that nobody knows of
                process = await anyio.open_process(
                    [*HOST, config.model_dump_json()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=log_path.parent,
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                )
                assert process.stdout is not None  # noqa: S101 -- asked for as a pipe
                return cls(process, BufferedByteReceiveStream(process.stdout), log_path, log.tell())
        except OSError as error:
            raise InferenceError(
                f"The inference process cannot be started: {error.strerror or error} ({error.filename or HOST[0]}).",
                code="host_start",
                suggestions=["Check that CODEBASE_GARDENER_DATA_DIR is writable and that the machine has memory left"],
            ) from error
        raise AssertionError("the shield lets nothing through")

    @property
    def ended(self) -> bool:
        return self.process.returncode is not None

    async def send(self, said: Request | Cancel) -> None:
        assert self.process.stdin is not None  # noqa: S101 -- asked for as a pipe
        with suppress(
            anyio.BrokenResourceError,
            anyio.ClosedResourceError,
        ):  # dead: no answer will come, and that tells
            await self.process.stdin.send(said.model_dump_json().encode() + b"\n")

    async def receive(self) -> Progress | Response | ErrorResponse | None:
        """The next thing it says; None when it has ended."""
        try:
            line = await self.lines.receive_until(b"\n", MAX_LINE)
        except (anyio.IncompleteRead, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            return None
        except anyio.DelimiterNotFound:  # where its next word begins cannot be known
            await self.kill()
            return None
        return FROM_HOST.validate_json(line)

    def abandon(self, number: int, request: Command) -> None:
        """Nobody waits for the answer to this request any more."""
        loads = isinstance(request, Load) or (isinstance(request, Generate) and request.without_adapter is not None)
        patience_s = LOAD_PATIENCE_S if loads else ANSWER_PATIENCE_S
        self.given_up[number] = CancelledRequest(request, patience_s, time.monotonic() + patience_s)

    def hear(self, reply: Response | ErrorResponse) -> None:
        """Take note of the answer to a request that was given up."""
        self.resident = reply.resident
        self.given_up.pop(reply.id, None)

    async def drain(self) -> None:
        """What it says to the requests that were given up, until it has answered them all or ends."""
        while self.given_up and (reply := await self.receive()) is not None:
            if not isinstance(reply, Progress):
                self.hear(reply)

    async def exit_code(self) -> int:
        """Of a host that has closed its output."""
        with anyio.move_on_after(GRACE_S):
            return await self.process.wait()
        return await self.kill()

    async def kill(self) -> int:
        with suppress(ProcessLookupError):
            self.process.kill()
        return await self.process.wait()

    async def aclose(self) -> None:
        """Let go of it, ended or not."""
        with anyio.CancelScope(shield=True):
            with suppress(ProcessLookupError):
                self.process.kill()
            await self.process.aclose()

    def log_tail(self) -> str:
        try:
            with self.log_path.open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                log.seek(max(min(self.log_start, end), end - TAIL_BYTES))
                tail = log.read().decode("utf-8", "replace").strip()
        except OSError:
            return ""
        return tail.splitlines()[-1][:300] if tail else ""


def _log(path: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > MAX_LOG_BYTES:
        path.replace(path.with_suffix(".old.log"))
    return path.open("ab")


def how_it_ended(code: int) -> str:
    """Of an exit code, in words."""
    if code >= 0:
        return f"it ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (", perhaps because memory ran out" if code == -signal.SIGKILL else "")
