"""A stdio server with a minimal client that reads and writes raw JSON-RPC."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HELLO = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "raw", "version": "0"}}


class Server:
    """`python -m server`; several threads may call it at the same time."""

    def __init__(self, data_dir: Path, *, cwd: Path, **environment: str) -> None:
        variables = {**os.environ, "CODEBASE_GARDENER_DATA_DIR": str(data_dir), **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=variables,
            cwd=cwd,
            start_new_session=True,
        )
        self._answers: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._next = 0
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def hello(self) -> None:
        self.request("initialize", HELLO)
        self._write({"jsonrpc": "2.0", "method": "notifications/initialized", "params": {}})

    def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Return the result of one tool call; {} if the server ended first."""
        return self.request("tools/call", {"name": tool, "arguments": arguments})

    def request(self, method: str, params: dict[str, Any], timeout_s: float = 120.0) -> dict[str, Any]:
        number = self.send(method, params)
        with self._changed:
            assert self._changed.wait_for(lambda: self._ended or number in self._answers, timeout_s), (
                f"no answer: {method}"
            )
            answer = self._answers.pop(number, {})
        return dict(answer.get("result") or answer.get("error") or {})

    def send(self, method: str, params: dict[str, Any]) -> int:
        with self._changed:
            self._next += 1
            number = self._next
            self._write({"jsonrpc": "2.0", "id": number, "method": method, "params": params})
        return number

    def _write(self, message: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the server has ended; the waiting threads will notice
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message = json.loads(line)
            if "id" in message and "method" not in message:
                with self._changed:
                    self._answers[message["id"]] = message
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """Kill the server, whatever its state."""
        self.process.kill()
        self.process.wait()
        self._reader.join()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()

    def hang_up(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()


@contextmanager
def server(data_dir: Path, *, cwd: Path, **environment: str) -> Iterator[Server]:
    started = Server(data_dir, cwd=cwd, **environment)
    try:
        started.hello()
        yield started
    finally:
        started.close()
