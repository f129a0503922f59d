"""The inference host: requests (JSON lines) on standard input, answers on standard output; see inference/protocol.py.

It ends when its standard input does, because then the server is gone, and after a while without requests.
"""

from __future__ import annotations

import gc
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog
from pydantic import BaseModel, ValidationError

from peft_core.inference.protocol import (
    IDLE_EXIT,
    TO_HOST,
    Cancel,
    ErrorResponse,
    HostConfig,
    Progress,
    Request,
    Response,
)
from peft_core.modeling.environment import prepare_environment
from peft_core.schemas.results import ErrorInfo
from peft_core.system import logs
from peft_core.system.child_process import line_writer, redirect_stdout
from peft_core.system.failures import TaskKind, problem_of

if TYPE_CHECKING:  # it imports torch
    from peft_core.inference.worker.handlers import RequestHandler


EX_SOFTWARE = 70

PROGRESS_S = 0.25  # between two notes of progress
EMPTY_IDLE_S = 60.0  # without anything in memory it is not kept for long
WORK = TaskKind(
    name="inference",
    log="logs/inference.log in the data directory",
    against_memory=("Call unload_adapter, or use a smaller base model, or close other programs.",),
)

log = structlog.get_logger(__name__)


ABANDONED = ErrorInfo(code="cancelled", message="The request was cancelled.")


class RequestCancelled(Exception):
    """Nobody waits for the answer any more."""


class RequestQueue:
    """Requests in order of arrival, and those among them that were cancelled meanwhile."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._cancelled: set[int] = set()

    def follow(self) -> None:
        """Read standard input until it ends, and the process with it: what is in memory serves nobody then."""
        try:
            for line in sys.stdin.buffer:
                try:
                    said = TO_HOST.validate_json(line)
                except ValidationError:
                    log.exception("unusable request")
                    continue
                if isinstance(said, Cancel):
                    self._cancelled.add(said.id)
                else:
                    self._waiting.put(said)
        except BaseException:  # a thread that ended in silence would leave a process that nobody can reach
            log.exception("reader failed")
            os._exit(EX_SOFTWARE)
        os._exit(0)

    def next(self, timeout_s: float) -> Request | None:
        try:
            return self._waiting.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def check(self, ask: Request) -> None:
        """Raise `Abandoned` when this request was cancelled."""
        if ask.id in self._cancelled:
            raise RequestCancelled


def main() -> int:
    os.umask(0o077)
    # 1. The wire, before anything slow: a server that goes away meanwhile is noticed.
    write = line_writer(redirect_stdout(), closed=lambda: os._exit(0))
    config = HostConfig.model_validate_json(sys.argv[1])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at a terminal reaches the server too, which ends this
    logs.configure(config.log_level)
    inbox = RequestQueue()
    threading.Thread(target=inbox.follow, name="inbox", daemon=True).start()

    # 2. Torch and its company.
    prepare_environment()
    from peft_core.inference.worker.handlers import RequestHandler  # noqa: PLC0415 -- seconds: hence here
    from peft_core.modeling.device import choose, describe, use_cores  # noqa: PLC0415 -- seconds: hence here

    use_cores()
    gc.freeze()  # hundreds of thousands of objects of the libraries: not to be looked through at every unload
    desk = RequestHandler(config, choose(config.device, describe()))

    # 3. Requests.
    while True:
        idle_s = min(config.idle_s, EMPTY_IDLE_S) if desk.holds_nothing else config.idle_s
        ask = inbox.next(idle_s)
        if ask is None:
            log.info("idle", seconds=idle_s)
            return IDLE_EXIT
        problem = _work(desk, ask, inbox, write)
        if problem is not None:
            write(ErrorResponse(id=ask.id, problem=problem, resident=desk.resident))


def _work(
    desk: RequestHandler,
    ask: Request,
    inbox: RequestQueue,
    write: Callable[[BaseModel], None],
) -> ErrorInfo | None:
    """Answer one request; what went wrong, if something did.

    A function of its own, so that the frame goes that held the exception: with its traceback it would keep the model in
    memory, whatever is unloaded later.
    """
    from peft_core.modeling.adapter_model import BaseCorrupted  # noqa: PLC0415 -- torch, which `main` has imported

    try:
        inbox.check(ask)
        answer = desk.answer(ask.request, _reporter(ask, inbox, write))
        write(Response(id=ask.id, answer=answer.model_dump(mode="json"), resident=desk.resident))
    except RequestCancelled:
        log.info("abandoned", request=ask.request.kind)
        return ABANDONED
    except BaseCorrupted:
        log.exception("damaged", request=ask.request.kind)
        sys.stderr.flush()
        os._exit(EX_SOFTWARE)  # wrong answers would be worse than none: the client tells, and starts a fresh process
    except Exception as error:  # the process's edge: whatever it is, it becomes an answer
        log.exception("failed", request=ask.request.kind)
        return problem_of(error, WORK)
    return None


def _reporter(
    ask: Request,
    inbox: RequestQueue,
    write: Callable[[BaseModel], None],
) -> Callable[[float, float | None, str], None]:
    said_at = float("-inf")

    def report(done: float, total: float | None, message: str) -> None:
        nonlocal said_at
        inbox.check(ask)
        if (now := time.monotonic()) - said_at >= PROGRESS_S or not done:  # each stage once, tokens now and then
            said_at = now
            write(Progress(id=ask.id, done=done, total=total, message=message))

    return report


if __name__ == "__main__":
    try:
        code = main()
    except BaseException:  # noqa: BLE001 -- the process's edge: its last words are what the client tells
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own way out fails over the standard input that another thread reads
