"""The server's end of the inference worker: start it, send it requests, and notice its death.

`InferenceClient` is what the rest of the server uses. It owns at most one `WorkerProcess`, starts it when a request needs it,
and replaces it when it has died.

Each call talks to the worker from the task that makes it; there is no background task. Calls take turns. A call that is
cancelled sends the worker a `Cancel` and returns immediately; the next call skips what the worker still writes about it. Only
the call whose turn it is changes the state here; other tasks and threads just read it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from pydantic import BaseModel

from peft_core.errors import AdapterNotLoaded, InferenceError
from peft_core.inference.protocol import (
    FROM_WORKER,
    IDLE_EXIT,
    Cancel,
    Command,
    ErrorResponse,
    Generate,
    Load,
    Progress,
    Request,
    Response,
    WorkerConfig,
)
from peft_core.schemas.results import MemoryState
from peft_core.system.child_process import (
    LineTooLongError,
    child_environment,
    describe_exit,
    log_tail,
    open_log,
    python_module,
    receive_line,
)

WORKER = python_module("peft_core.inference.worker")
MAX_LINE = 64 << 20
EXIT_TIMEOUT_S = 1.0  # between the end of the worker's output and its exit
SYNC_TIMEOUT_S = 2.0
# How long a cancelled request may keep the worker busy: until a long prompt has been read, or until a base model has been
# loaded and perhaps converted. The next call usually needs that base model too; if the worker were killed earlier, every call
# of an impatient client would start the load again.
CANCEL_TIMEOUT_S = 120.0
CANCELLED_LOAD_TIMEOUT_S = 900.0

ProgressCallback = Callable[[float, float | None, str], Awaitable[None]]  # done, total, message
TextCallback = Callable[[str], Awaitable[None]]
"""Awaited with the whole text so far."""
AnswerT = TypeVar("AnswerT", bound=BaseModel)


class InferenceClient:
    """Sends requests to one worker process, which it starts when the first request needs it."""

    def __init__(self, config: WorkerConfig, log_path: Path) -> None:
        self._config = config
        self._log_path = log_path
        self._turn = anyio.Lock()
        self._worker: WorkerProcess | None = None
        self._last_id = 0
        self._closed = False
        self._last_exit_reason: str | None = None  # of the last worker that died with something in memory

    @property
    def resident(self) -> MemoryState:
        """What the worker has in memory, by its last answer; nothing if it does not run."""
        worker = self._worker
        return MemoryState() if worker is None or worker.exited else worker.resident

    @property
    def pid(self) -> int | None:
        """Pid of the worker, or None if it does not run."""
        worker = self._worker
        return None if worker is None or worker.exited else worker.process.pid

    def is_still_loading(self, adapter_path: Path) -> bool:
        """Return whether a cancelled request to load this adapter is still being worked on."""
        worker = self._worker
        if worker is None or worker.exited:
            return False
        requests = [cancelled.request for cancelled in list(worker.cancelled.values())]
        return any(isinstance(request, Load) and request.adapter_path == adapter_path for request in requests)

    async def ask(
        self,
        request: Command,
        answer_type: type[AnswerT],
        on_progress: ProgressCallback | None = None,
        on_text: TextCallback | None = None,
    ) -> AnswerT:
        """Send a request when its turn has come, and return the answer; its `elapsed_s` includes the wait.

        If no worker runs, one is started, provided that the request makes sense to a worker with nothing in memory.

        Raises:
            AdapterNotLoaded: No worker runs, so what the request needs is not loaded.
            InferenceError: The worker refused the request (its own code), or it died (`host_died`) with all that was loaded.
        """
        started = time.monotonic()
        if on_progress is not None and self._turn.locked():
            await on_progress(0, None, "waiting for another call to the model")
        async with self._turn:
            worker = await self._ready_worker(request, on_progress)
            reply = await self._exchange(worker, request, on_progress, on_text)
            if reply is None and await worker.exit_code() == IDLE_EXIT:
                # It exited just before the request, because it was idle: no work was lost.
                worker = await self._ready_worker(request, on_progress)
                reply = await self._exchange(worker, request, on_progress, on_text)
            if reply is None:
                raise await self._death(worker, request)
            worker.resident = reply.resident
            if isinstance(reply, ErrorResponse):
                problem = reply.problem
                raise InferenceError(problem.message, code=problem.code, suggestions=problem.suggestions)
            self._last_exit_reason = None
            elapsed_s = round(time.monotonic() - started, 3)
            return answer_type.model_validate({**reply.answer, "elapsed_s": elapsed_s})

    async def sync(self) -> None:
        """Read the answers to cancelled calls, so that `resident` is up to date. Returns after SYNC_TIMEOUT_S at the latest."""
        worker = self._worker
        if worker is None or not worker.cancelled or self._turn.locked():
            return
        async with self._turn:
            with anyio.move_on_after(SYNC_TIMEOUT_S):
                await worker.drain()

    def nothing_loaded(self, what: str = "No adapter is loaded", *, needed: bool = True) -> AdapterNotLoaded:
        """Return the error for a request whose adapter is not loaded; it says whether a worker died with it.

        Args:
            what: What is not loaded, as a sentence without its full stop.
            needed: Whether the user has to load something to continue.
        """
        worker = self._worker
        reason = self._exit_reason(worker) if worker is not None and worker.exited else self._last_exit_reason
        return AdapterNotLoaded(
            f"{what}.{f' {reason}; what it had loaded is gone.' if reason else ''}",
            suggestions=[
                "Call load_adapter(adapter_path=...) first; list_adapters lists the adapters",
                "Or call generate with use_base=true for an answer of the base model without an adapter",
            ]
            if needed
            else [],
        )

    async def aclose(self) -> None:
        """Kill the worker, which has nothing to save, and start no other."""
        self._closed = True
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.aclose()

    async def _ready_worker(self, request: Command, on_progress: ProgressCallback | None) -> WorkerProcess:
        """Return the running worker, or start one."""
        if self._closed:
            raise _closed()
        if (worker := self._worker) is not None:
            ready = not worker.exited and await self._finish_cancelled(worker, on_progress)
            if self._closed:  # while this call waited
                raise _closed()
            if ready:
                return worker
            self._last_exit_reason = self._exit_reason(worker) or self._last_exit_reason
            await worker.aclose()
            self._worker = None
        if not (isinstance(request, Load) or (isinstance(request, Generate) and request.without_adapter)):
            raise self.nothing_loaded()
        if on_progress is not None:
            await on_progress(0, None, "starting the inference process")
        worker = await WorkerProcess.start(self._config, self._log_path)
        if self._closed:  # while the worker started
            await worker.aclose()
            raise _closed()
        self._worker = worker
        return worker

    async def _finish_cancelled(self, worker: WorkerProcess, on_progress: ProgressCallback | None) -> bool:
        """Wait until the worker has answered all cancelled calls, and kill it if that takes too long. True: it is ready."""
        if not worker.cancelled:
            return True
        if on_progress is not None:
            await on_progress(0, None, "waiting for the end of a call that was cancelled")
        first = min(worker.cancelled.values(), key=lambda cancelled: cancelled.deadline)
        with anyio.move_on_after(max(0.0, first.deadline - time.monotonic())):
            await worker.drain()
            if not worker.cancelled:
                return True
            await worker.exit_code()  # it exited instead of answering
            return False
        self._last_exit_reason = (
            f"The inference process was ended, because {first.timeout_s:g} s after a call was cancelled ({first.request.kind}) "
            "it was still busy with it"
        )
        worker.resident = MemoryState()
        with anyio.CancelScope(shield=True):
            await worker.kill()
        return False

    async def _exchange(
        self,
        worker: WorkerProcess,
        request: Command,
        on_progress: ProgressCallback | None,
        on_text: TextCallback | None,
    ) -> Response | ErrorResponse | None:
        """Send a request and read until its answer; return None if the worker exits first."""
        self._last_id += 1
        number = self._last_id
        try:
            await worker.send(Request(id=number, request=request))
            while True:
                reply = await worker.receive()
                if reply is None or (reply.id == number and not isinstance(reply, Progress)):
                    return reply
                if not isinstance(reply, Progress):
                    worker.record(reply)
                elif reply.id == number:
                    if on_progress is not None:
                        await on_progress(reply.done, reply.total, reply.message)
                    if on_text is not None and reply.text is not None:
                        await on_text(reply.text)
                    # The next reply may be buffered, and reading it would not notice a cancellation.
                    await anyio.lowlevel.checkpoint_if_cancelled()
        except BaseException:  # usually a cancellation
            worker.abandon(number, request)
            with anyio.CancelScope(shield=True):
                await worker.send(Cancel(id=number))
            raise

    async def _death(self, worker: WorkerProcess, request: Command) -> InferenceError:
        code = await worker.exit_code()
        tail = log_tail(self._log_path, start=worker.log_start, lines=1) if code > 0 else ""
        return InferenceError(
            f"The inference process died during this call ({request.kind}): it {describe_exit(code)}."
            f"{f' Its log ends with: {tail}.' if tail else ''} Nothing is loaded now.",
            code="host_died",
            suggestions=["Call load_adapter again: a new process starts", f"The log is {self._log_path}"],
            details={"exit_code": code, "log_path": str(self._log_path)},
        )

    def _exit_reason(self, worker: WorkerProcess) -> str | None:
        """Return why a worker exited that had something in memory; None for any other."""
        code = worker.process.returncode
        if worker.resident.base_model is None or code is None:
            return None
        if code == IDLE_EXIT:
            return f"The inference process ended after {self._config.idle_s:g} s without a call"
        return f"The inference process {describe_exit(code)}"


def _closed() -> InferenceError:
    return InferenceError("The manager is closed.", code="closed")


@dataclass(frozen=True)
class CancelledRequest:
    """A request whose caller no longer waits, and that the worker has not answered yet."""

    request: Command
    timeout_s: float
    deadline: float  # time.monotonic()


@dataclass
class WorkerProcess:
    """A running inference worker: its pipes, and what is known of its memory. `InferenceClient` decides who uses it."""

    process: Process
    stream: BufferedByteReceiveStream
    log_start: int  # offset in the log file where this worker's output begins
    resident: MemoryState = field(default_factory=MemoryState)  # by its last answer
    cancelled: dict[int, CancelledRequest] = field(default_factory=dict)  # by request id

    @classmethod
    async def start(cls, config: WorkerConfig, log_path: Path) -> WorkerProcess:
        """Start a worker. It answers its first request once torch is imported, which takes seconds.

        Raises:
            InferenceError: It cannot be started.
        """
        try:
            # Shielded, because a cancellation here would leave a process without an owner:
            with open_log(log_path) as log, anyio.CancelScope(shield=True):
                process = await anyio.open_process(
                    [*WORKER, config.model_dump_json()],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    cwd=log_path.parent,
                    env=child_environment(),
                )
                assert process.stdout is not None  # noqa: S101 -- it was requested as a pipe
                return cls(process, BufferedByteReceiveStream(process.stdout), log.tell())
        except OSError as error:
            raise InferenceError(
                f"The inference process cannot be started: {error.strerror or error} ({error.filename or WORKER[0]}).",
                code="host_start",
                suggestions=["Check that CODEBASE_GARDENER_DATA_DIR is writable and that enough memory is free"],
            ) from error
        raise AssertionError("a shielded scope swallows no exception")

    @property
    def exited(self) -> bool:
        return self.process.returncode is not None

    async def send(self, message: Request | Cancel) -> None:
        """Send a message. If the worker is dead, nothing happens: the missing answer shows it."""
        assert self.process.stdin is not None  # noqa: S101 -- it was requested as a pipe
        with suppress(anyio.BrokenResourceError, anyio.ClosedResourceError):
            await self.process.stdin.send(message.model_dump_json().encode() + b"\n")

    async def receive(self) -> Progress | Response | ErrorResponse | None:
        """Return the worker's next message, or None if it has exited. A worker whose line is too long is killed."""
        try:
            line = await receive_line(self.stream, MAX_LINE)
        except LineTooLongError:
            await self.kill()
            return None
        return None if line is None else FROM_WORKER.validate_json(line)

    def abandon(self, number: int, request: Command) -> None:
        """Note that the caller of a request no longer waits for its answer."""
        loads = isinstance(request, Load) or (isinstance(request, Generate) and request.without_adapter is not None)
        timeout_s = CANCELLED_LOAD_TIMEOUT_S if loads else CANCEL_TIMEOUT_S
        self.cancelled[number] = CancelledRequest(request, timeout_s, time.monotonic() + timeout_s)

    def record(self, reply: Response | ErrorResponse) -> None:
        """Note the answer to a cancelled request."""
        self.resident = reply.resident
        self.cancelled.pop(reply.id, None)

    async def drain(self) -> None:
        """Read the answers to cancelled requests until all have arrived or the worker exits."""
        while self.cancelled and (reply := await self.receive()) is not None:
            if not isinstance(reply, Progress):
                self.record(reply)

    async def exit_code(self) -> int:
        """Return the exit code of a worker that has closed its output; one that does not exit in time is killed."""
        with anyio.move_on_after(EXIT_TIMEOUT_S):
            return await self.process.wait()
        return await self.kill()

    async def kill(self) -> int:
        """Kill the worker and return its exit code."""
        with suppress(ProcessLookupError):
            self.process.kill()
        return await self.process.wait()

    async def aclose(self) -> None:
        """Kill the worker if it still runs, and close its pipes."""
        with anyio.CancelScope(shield=True):
            with suppress(ProcessLookupError):
                self.process.kill()
            await self.process.aclose()
