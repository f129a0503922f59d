"""This process's end of the inference host: start it, ask it, notice its death.

A call talks to the host from the task that makes it; nothing runs in the background. Calls take turns. One that is
cancelled tells the host so and leaves; what the host still says about it is skipped by the next one.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import BaseModel

from peft_core.errors import InferenceError, ModelError
from peft_core.inference.protocol import (
    FROM_HOST,
    IDLE_EXIT,
    Answered,
    Ask,
    Cancel,
    Failed,
    HostConfig,
    Progress,
    Request,
)
from peft_core.results import Resident

HOST = [sys.executable, "-P", "-m", "peft_core.inference.host"]  # -P: the working directory is no place for modules
MAX_LINE = 16 << 20
GRACE_S = 1.0
TAIL_BYTES = 2000

Report = Callable[[float, float | None, str], Awaitable[None]]  # done, total, message
AnswerT = TypeVar("AnswerT", bound=BaseModel)


class InferenceHost:
    """One host process at most, started when it is first needed."""

    def __init__(self, config: HostConfig, log_path: Path) -> None:
        self._config = config
        self._log_path = log_path
        self._turn = anyio.Lock()
        self._process: Process | None = None
        self._lines: BufferedByteReceiveStream | None = None
        self._last_id = 0
        self._resident = Resident()
        self._obituary: str | None = None

    @property
    def resident(self) -> Resident:
        """What the host holds in memory, as far as it has said; nothing when it does not run."""
        self._notice_death()
        return self._resident

    @property
    def pid(self) -> int | None:
        """Of the host, where one runs."""
        self._notice_death()
        return self._process.pid if self._process is not None else None

    @property
    def runs(self) -> bool:
        self._notice_death()
        return self._process is not None

    @property
    def obituary(self) -> str | None:
        """How the last host ended, if it did and none was started since. For errors that say that nothing is loaded."""
        self._notice_death()
        return self._obituary

    async def ask(self, request: Request, answer_type: type[AnswerT], report: Report | None = None) -> AnswerT:
        """One request, in its turn; starts the host if there is none. `elapsed_s` of the answer is what the caller waited.

        Raises:
            ModelError: the host refused, with its own code; or it died (`host_died`), and with it all that was loaded.
        """
        began = time.monotonic()
        if report is not None and self._turn.locked():
            await report(0, None, "waiting for another call to the model")
        async with self._turn:
            self._notice_death()
            started = await self._start()
            self._last_id += 1
            try:
                reply = await self._exchange(Ask(id=self._last_id, request=request), report)
                code = await self._exit_code() if reply is None else None
                if code == IDLE_EXIT and not started:
                    # It had just gone to sleep: nothing was begun.
                    await self._start()
                    reply = await self._exchange(Ask(id=self._last_id, request=request), report)
                    code = await self._exit_code() if reply is None else None
            except BaseException:  # cancelled, mostly: whatever it is, nobody waits any more
                with anyio.CancelScope(shield=True):
                    await self._send(Cancel(id=self._last_id))
                raise
            if reply is None:
                raise self._death(request, code)
            self._resident = reply.resident
            if isinstance(reply, Failed):
                raise _error(reply)
            waited = round(time.monotonic() - began, 3)
            return answer_type.model_validate({**reply.answer, "elapsed_s": waited})

    async def aclose(self) -> None:
        """End the host. It has nothing to save."""
        process, self._process = self._process, None
        self._resident = Resident()
        if process is None:
            return
        with anyio.CancelScope(shield=True):
            with suppress(ProcessLookupError):
                process.kill()
            await process.aclose()

    async def _start(self) -> bool:
        """True when there was no host."""
        if self._process is not None:
            return False
        try:
            self._log_path.parent.mkdir(parents=True, exist_ok=True)
            with self._log_path.open("ab") as log_file, anyio.CancelScope(shield=True):  # no host that nobody knows of
                self._process = await anyio.open_process(
                    [*HOST, self._config.model_dump_json()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log_file,
                    cwd=self._log_path.parent,
                    env={**os.environ, "HF_HUB_OFFLINE": "1"},
                )
        except OSError as error:
            raise InferenceError(
                f"The inference process cannot be started: {error.strerror or error} ({error.filename or HOST[0]}).",
                code="host_start",
                suggestions=["Check that CODEBASE_GARDENER_DATA_DIR is writable and that the machine has memory left"],
            ) from error
        assert self._process is not None  # noqa: S101 -- mypy believes that the shield may swallow what failed
        assert self._process.stdout is not None  # noqa: S101 -- asked for as a pipe
        self._lines = BufferedByteReceiveStream(self._process.stdout)
        self._resident, self._obituary = Resident(), None
        return True

    async def _exchange(self, ask: Ask, report: Report | None) -> Answered | Failed | None:
        """Send and follow until the answer; None when the host ends before."""
        await self._send(ask)
        while True:
            reply = await self._receive()
            if reply is None or (reply.id == ask.id and not isinstance(reply, Progress)):
                return reply
            if isinstance(reply, Progress):
                if reply.id == ask.id and report is not None:
                    await report(reply.done, reply.total, reply.message)
            else:
                self._resident = reply.resident  # of a call that nobody waited for

    async def _send(self, said: Ask | Cancel) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with suppress(
            anyio.BrokenResourceError, anyio.ClosedResourceError
        ):  # dead: the answer will not come, and tells
            await self._process.stdin.send(said.model_dump_json().encode() + b"\n")

    async def _receive(self) -> Progress | Answered | Failed | None:
        assert self._lines is not None  # noqa: S101 -- there is a process
        try:
            line = await self._lines.receive_until(b"\n", MAX_LINE)
        except (anyio.IncompleteRead, anyio.EndOfStream, anyio.BrokenResourceError):
            return None
        return FROM_HOST.validate_json(line)

    async def _exit_code(self) -> int:
        """Of a host that has closed its output."""
        assert self._process is not None  # noqa: S101 -- it was asked
        with anyio.move_on_after(GRACE_S):
            await self._process.wait()
        if self._process.returncode is None:
            self._process.kill()
        code = await self._process.wait()
        self._notice_death()
        return code

    def _death(self, request: Request, code: int | None) -> InferenceError:
        how = "it closed its output" if code is None else how_it_ended(code)
        last = f" Its last words: {words}" if code is not None and code > 0 and (words := self._last_words()) else ""
        return InferenceError(
            f"The inference process died during this call ({request.kind}): {how}.{last} Nothing is loaded now.",
            code="host_died",
            suggestions=[
                "Call load_adapter again: a fresh process starts",
                f"The log is {self._log_path}",
            ],
            details={"exit_code": code, "log_path": str(self._log_path)},
        )

    def _notice_death(self) -> None:
        if self._process is None or self._process.returncode is None:
            return
        code = self._process.returncode
        lost = bool(self._resident.base_model)
        self._process, self._lines, self._resident = None, None, Resident()
        if lost:
            self._obituary = (
                f"The inference process was ended after {self._config.idle_s:g} s without a call"
                if code == IDLE_EXIT
                else f"The inference process died ({how_it_ended(code)})"
            )

    def _last_words(self) -> str:
        try:
            tail = self._log_path.read_bytes()[-TAIL_BYTES:].decode("utf-8", "replace").strip()
        except OSError:
            return ""
        return tail.splitlines()[-1][:300] if tail else ""


def how_it_ended(code: int) -> str:
    """Of an exit code, in words."""
    if code >= 0:
        return f"it ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"killed by {name}" + (", perhaps because memory ran out" if code == -signal.SIGKILL else "")


def _error(reply: Failed) -> ModelError:
    problem = reply.problem
    return InferenceError(problem.message, code=problem.code, suggestions=problem.suggestions)
