"""The inference process as its client holds it: started, spoken to, heard, ended. Who may speak when is the client's affair."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import anyio
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream

from peft_core.errors import InferenceError
from peft_core.inference.protocol import (
    FROM_HOST,
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
# How long a request that was given up may keep the host busy: until a long prompt is read; or until a base is loaded, which
# may be converted for it once. The next call needs that, too: thrown away with the host, it would be begun again by each
# call of a client that does not wait as long.
ANSWER_PATIENCE_S = 120.0
LOAD_PATIENCE_S = 900.0
TAIL_BYTES = 2000
MAX_LOG_BYTES = 4 << 20


@dataclass(frozen=True)
class GivenUp:
    """A request that nobody waits for any more, and that is still to be answered."""

    request: Request
    patience_s: float
    deadline: float  # monotonic clock


@dataclass
class HostProcess:
    process: Process
    lines: BufferedByteReceiveStream
    log_path: Path
    log_start: int  # where in the log file its words begin
    resident: Resident = field(default_factory=Resident)  # as far as it has said
    given_up: dict[int, GivenUp] = field(default_factory=dict)

    @classmethod
    async def start(cls, config: HostConfig, log_path: Path) -> HostProcess:
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

    async def send(self, said: Ask | Cancel) -> None:
        assert self.process.stdin is not None  # noqa: S101 -- asked for as a pipe
        with suppress(
            anyio.BrokenResourceError, anyio.ClosedResourceError
        ):  # dead: no answer will come, and that tells
            await self.process.stdin.send(said.model_dump_json().encode() + b"\n")

    async def receive(self) -> Progress | Answered | Failed | None:
        """The next thing it says; None when it has ended."""
        try:
            line = await self.lines.receive_until(b"\n", MAX_LINE)
        except (anyio.IncompleteRead, anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            return None
        except anyio.DelimiterNotFound:  # where its next word begins cannot be known
            await self.kill()
            return None
        return FROM_HOST.validate_json(line)

    def give_up(self, number: int, request: Request) -> None:
        """Nobody waits for the answer to this request any more."""
        loads = isinstance(request, Load) or (isinstance(request, Generate) and request.without_adapter is not None)
        patience_s = LOAD_PATIENCE_S if loads else ANSWER_PATIENCE_S
        self.given_up[number] = GivenUp(request, patience_s, time.monotonic() + patience_s)

    def hear(self, reply: Answered | Failed) -> None:
        """Take note of the answer to a request that was given up."""
        self.resident = reply.resident
        self.given_up.pop(reply.id, None)

    async def hear_out(self) -> None:
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

    def last_words(self) -> str:
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
