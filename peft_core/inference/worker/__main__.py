"""The inference worker: reads requests from standard input and writes answers to standard output; see inference/protocol.py.

    python -m peft_core.inference.worker WORKER_CONFIG_AS_JSON

It exits when its standard input ends, because then the server is gone, and after some time without a request.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog
from pydantic import ValidationError

from peft_core.inference.protocol import (
    IDLE_EXIT,
    TO_WORKER,
    Cancel,
    ErrorResponse,
    Progress,
    Request,
    Response,
    WorkerConfig,
)
from peft_core.modeling.environment import importing_torch
from peft_core.schemas.results import ErrorInfo
from peft_core.system import logs
from peft_core.system.activity import active
from peft_core.system.child_process import JsonLineWriter, json_line_writer, make_files_private, redirect_stdout
from peft_core.system.failures import TaskKind, error_info

if TYPE_CHECKING:  # it imports torch
    from peft_core.inference.worker.handlers import RequestHandler

EX_SOFTWARE = 70  # sysexits.h: an internal error
PROGRESS_INTERVAL_S = 0.25  # between two progress messages
EMPTY_IDLE_S = 60.0  # without a request, for a worker with nothing in memory
INFERENCE = TaskKind(
    name="inference",
    crash_code="inference_crashed",
    log="logs/inference.log in the data directory",
    memory_advice=("Call unload_adapter, or use a smaller base model, or close other programs.",),
)
CANCELLED = ErrorInfo(code="cancelled", message="The request was cancelled.")

log = structlog.get_logger(__name__)


class RequestCancelled(Exception):
    """The caller no longer waits for the answer."""


class RequestQueue:
    """Requests in order of arrival. A thread reads them, so that a request can be cancelled while another is worked on."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._cancelled: set[int] = set()

    def read_stdin(self) -> None:
        """Read messages until standard input ends, and then end the process: nothing can use its memory any more."""
        try:
            for line in sys.stdin.buffer:
                try:
                    message = TO_WORKER.validate_json(line)
                except ValidationError:
                    log.exception("unusable request")
                    continue
                if isinstance(message, Cancel):
                    self._cancelled.add(message.id)
                else:
                    self._waiting.put(message)
        except BaseException:  # if this thread ended silently, the process could not be reached any more
            log.exception("reader failed")
            os._exit(EX_SOFTWARE)
        os._exit(0)

    def next(self, timeout_s: float) -> Request | None:
        """Return the next request, or None if none arrives in time."""
        try:
            return self._waiting.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def check(self, request: Request) -> None:
        """Raise RequestCancelled if this request was cancelled."""
        if request.id in self._cancelled:
            raise RequestCancelled


def main() -> int:
    """Answer requests until the worker has been idle for too long; return the exit code."""
    make_files_private()
    # 1. The protocol, before anything slow, so that the end of the server is noticed from now on.
    write = json_line_writer(redirect_stdout(), on_closed=lambda: os._exit(0))
    config = WorkerConfig.model_validate_json(sys.argv[1])
    # Ctrl-C at a terminal also reaches the server, which ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logs.configure(config.log_level)
    requests = RequestQueue()
    threading.Thread(target=requests.read_stdin, name="stdin-reader", daemon=True).start()

    # 2. torch, which takes seconds to import.
    # kill-point: inference worker, load_adapter: the process is starting
    with importing_torch():
        import torch  # noqa: PLC0415

        from peft_core.devices.records import distrusted  # noqa: PLC0415
        from peft_core.inference.worker.handlers import RequestHandler  # noqa: PLC0415
        from peft_core.modeling.device import choose, describe, use_cores, without  # noqa: PLC0415

    use_cores()
    machine = without(describe(), config.device, distrusted(config.data_dir, torch.__version__))
    handler = RequestHandler(config, choose(config.device, machine))

    # 3. Requests.
    while True:
        idle_s = min(config.idle_s, EMPTY_IDLE_S) if handler.holds_nothing else config.idle_s
        request = requests.next(idle_s)
        if request is None:
            log.info("idle", seconds=idle_s)
            return IDLE_EXIT
        with active(config.activity_file):
            problem = _answer(handler, request, requests, write)
        if problem is not None:
            write(ErrorResponse(id=request.id, problem=problem, resident=handler.resident))


def _answer(
    handler: RequestHandler, request: Request, requests: RequestQueue, write: JsonLineWriter
) -> ErrorInfo | None:
    """Answer a request; return the error if that fails.

    The caller writes the error after this frame is gone: an exception's traceback would keep the model in memory, even after it
    is unloaded.
    """
    from peft_core.modeling.adapter_model import BaseCorrupted  # noqa: PLC0415 -- torch, which `main` has imported

    try:
        requests.check(request)
        answer = handler.answer(request.request, _progress_callback(request, requests, write))
        write(Response(id=request.id, answer=answer.model_dump(mode="json"), resident=handler.resident))
    except RequestCancelled:
        log.info("cancelled", request=request.request.kind)
        return CANCELLED
    except BaseCorrupted:
        log.exception("base model corrupted", request=request.request.kind)
        sys.stderr.flush()
        os._exit(EX_SOFTWARE)  # further answers could be wrong: the client reports the exit, and starts a new process
    except Exception as error:  # the edge of the process: the client reports the error
        log.exception("failed", request=request.request.kind)
        return error_info(error, INFERENCE)
    return None


def _progress_callback(request: Request, requests: RequestQueue, write: JsonLineWriter) -> Callable[..., None]:
    """Return a function that writes progress messages, and raises RequestCancelled once the request is cancelled."""
    written_at = float("-inf")

    def report(done: float, total: float | None, message: str, text: Callable[[], str] | None = None) -> None:
        nonlocal written_at
        requests.check(request)
        if (now := time.monotonic()) - written_at >= PROGRESS_INTERVAL_S or not done:  # always at the start of a stage
            written_at = now
            so_far = None if text is None else text()
            write(Progress(id=request.id, done=done, total=total, message=message, text=so_far))

    return report


if __name__ == "__main__":
    try:
        code = main()
    except BaseException:  # noqa: BLE001 -- the edge of the process: the client reports the last line of the log
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stderr.flush()
    os._exit(code)  # a normal exit would fail, because another thread is reading standard input
