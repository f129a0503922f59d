from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from peft_core.errors import DataError, StorageError
from peft_core.schemas.frozen import FrozenModel
from peft_core.system import child_process
from peft_core.system.child_process import (
    LAUNCHER,
    PARENT_VARIABLE,
    LineTooLongError,
    child_environment,
    describe_exit,
    json_line_writer,
    log_tail,
    open_log,
    parent_pid,
    receive_line,
    run_json_child,
)
from peft_core.system.failures import TaskKind, error_info

TASK = TaskKind(name="test", crash_code="test_crashed", log="the log", memory_advice=("Buy memory",))


class Message(FrozenModel):
    text: str


def test_a_child_environment_names_the_parent_and_keeps_the_child_offline() -> None:
    environment = child_environment()
    assert environment[PARENT_VARIABLE] == str(os.getpid())
    assert child_environment(launched=True)[PARENT_VARIABLE] == LAUNCHER
    assert (environment["HF_HUB_OFFLINE"], environment["PYTHONSAFEPATH"]) == ("1", "1")


@pytest.mark.parametrize(("value", "expected"), [("", None), ("17", 17), (LAUNCHER, os.getppid())])
def test_the_parent_to_end_with_is_read_from_the_environment(
    value: str, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PARENT_VARIABLE, value)
    assert parent_pid() == expected


def test_a_log_above_the_limit_is_rotated_when_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "logs" / "a.log"
    for text in (b"first", b"second", b"third"):
        monkeypatch.setattr(child_process, "MAX_LOG_BYTES", 10)
        with open_log(path) as log:
            log.write(text)
    assert (path.read_bytes(), path.with_suffix(".old.log").read_bytes()) == (b"third", b"firstsecond")


def test_a_log_tail_is_the_last_lines_made_printable(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_bytes(b"old run\none\ntwo\n  three \x1b[31m\n\n")
    assert log_tail(path) == "one | two | three \N{REPLACEMENT CHARACTER}[31m"
    assert log_tail(path, lines=1).startswith("three")
    assert log_tail(path, start=10_000) == ""
    assert log_tail(tmp_path / "missing") == ""


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (3, "ended with exit code 3"),
        (-signal.SIGSEGV, "was killed by SIGSEGV (signal 11)"),
        (-signal.SIGKILL, "was killed by SIGKILL (signal 9), perhaps because memory ran out"),
        (-40, "was killed by signal 40"),
    ],
)
def test_an_exit_code_is_described_in_words(code: int, expected: str) -> None:
    assert describe_exit(code) == expected


async def test_lines_are_received_until_the_other_end_is_closed() -> None:
    send, receive = anyio.create_memory_object_stream[bytes](10)
    stream = BufferedByteReceiveStream(receive)
    for piece in (b"one\ntw", b"o\n", b"unfinished"):
        await send.send(piece)
    send.close()
    assert [await receive_line(stream, 100) for _ in range(3)] == [b"one", b"two", None]
    receive.close()


async def test_a_line_above_the_limit_is_an_error() -> None:
    send, receive = anyio.create_memory_object_stream[bytes](10)
    await send.send(b"x" * 50)
    with pytest.raises(LineTooLongError):
        await receive_line(BufferedByteReceiveStream(receive), 10)
    send.close()
    receive.close()


def test_a_writer_writes_one_json_line_per_message_and_reports_a_closed_reader() -> None:
    closed: list[bool] = []
    reader, writer = os.pipe()
    write = json_line_writer(writer, on_closed=lambda: closed.append(True))
    write(Message(text="a\nb"))
    assert os.read(reader, 100) == b'{"text":"a\\nb"}\n'
    os.close(reader)
    write(Message(text="c"))
    os.close(writer)
    assert closed == [True]


CHILD = """
import sys
from peft_core.errors import StorageError
from peft_core.system.child_process import answer_request
from tests.unit.system.test_child_process import TASK, Message

def answer(request):
    print("noise of a library")
    match request.text:
        case "full":
            raise StorageError("The disk is full.", code="disk_full", suggestions=["Free some"])
        case "bug":
            raise KeyError("x")
        case "dies":
            sys.exit(3)
        case "hangs":
            import time; time.sleep(60)
    return Message(text=request.text.upper())

sys.exit(answer_request(Message, answer, TASK))
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "json_child.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[3]}")
    return "json_child"


def ask(child: str, text: str, timeout_s: float = 60.0) -> str:
    answer = run_json_child(
        child, Message(text=text), Message, timeout_s=timeout_s, action="Asking", on_timeout=("Ask less",)
    )
    return answer.text


def test_a_json_child_answers_although_it_prints(child: str) -> None:
    assert ask(child, "hello") == "HELLO"


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("full", "disk_full", "The disk is full."),
        ("bug", "test_crashed", "The test ended with an unexpected error: KeyError: 'x'"),
        ("dies", "inspection_failed", "Asking failed: "),
    ],
)
def test_errors_of_a_json_child_reach_its_parent(child: str, text: str, code: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        ask(child, text)
    assert (caught.value.code, caught.value.message.startswith(message)) == (code, True)


@pytest.mark.parametrize(("text", "logged"), [("bug", "KeyError: 'x'"), ("full", "")])
def test_the_traceback_of_a_crashed_json_child_is_logged(
    child: str, text: str, logged: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(DataError):
        ask(child, text)
    assert caplog.text.strip().endswith(logged)
    assert ("Traceback" in caplog.text) == bool(logged)


def test_a_json_child_is_stopped_when_it_takes_too_long(child: str) -> None:
    with pytest.raises(DataError, match="Asking took longer than 1 s") as caught:
        ask(child, "hangs", timeout_s=1.0)
    assert (caught.value.code, caught.value.suggestions) == ("inspection_timeout", ("Ask less",))


def test_a_child_exits_when_its_parent_dies(tmp_path: Path) -> None:
    script = (
        "import os, subprocess, sys\n"
        "from peft_core.system.child_process import child_environment\n"
        "watch = 'import os, time; from peft_core.system import child_process as c; '\n"
        "watch += 'c.watch_parent(c.parent_pid(), lambda: os._exit(1)); print(os.getpid(), flush=True); time.sleep(60)'\n"
        "subprocess.Popen([sys.executable, '-c', watch], env=child_environment())\n"
        "sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as parent:
        assert parent.stdout is not None
        assert int(parent.stdout.readline()) > 0
        parent.kill()
        assert parent.stdout.read() == b""  # its child has closed the pipe, too


def test_an_error_of_ours_is_reported_as_it_is_even_inside_a_group() -> None:
    error = StorageError("The disk is full.", code="disk_full", suggestions=["Free some"])
    info = error_info(ExceptionGroup("unhandled", [error]), TASK)
    assert (info.code, info.message, info.suggestions) == ("disk_full", "The disk is full.", ("Free some",))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"), "out_of_memory"),
        (ValueError("out of memory"), "test_crashed"),
    ],
)
def test_only_refused_allocations_are_reported_as_out_of_memory(error: Exception, code: str) -> None:
    assert error_info(error, TASK).code == code
