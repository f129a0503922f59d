import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from peft_core.errors import DataError
from peft_core.modeling import memory as process
from peft_core.modeling.memory import (
    madvise_pageout,
    memory_bytes,
    peak_memory_bytes,
    return_freed_memory,
    seconds_alive,
    set_malloc_keep,
    set_malloc_trim,
    trim_if_above,
)
from peft_core.schemas.events import EVENT, CheckpointSaved, JobStarted
from peft_core.system.cancellation import Cancelled, StopFlag
from peft_core.system.child_process import json_line_writer
from peft_core.system.failures import error_info
from peft_core.worker.__main__ import TRAINING


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    yield reader, writer
    for fd in (reader, writer):
        with contextlib.suppress(OSError):  # the test closed it
            os.close(fd)


def test_events_are_one_line_each(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    emit = json_line_writer(writer, StopFlag().request)
    events = [JobStarted(), CheckpointSaved(step=3)]
    for event in events:
        emit(event)
    lines = os.read(reader, 10_000).splitlines()
    assert [EVENT.validate_json(line) for line in lines] == events


def test_a_reader_that_has_gone_is_a_request_to_stop(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    stop = StopFlag()
    emit = json_line_writer(writer, stop.request)
    os.close(reader)
    emit(JobStarted())
    with pytest.raises(Cancelled):
        stop.check()


def test_nobody_asked_nothing_stops() -> None:
    StopFlag().check()


def test_an_error_of_ours_is_told_as_it_is() -> None:
    problem = error_info(DataError("Too few.", code="too_few", suggestions=["Give more."]), TRAINING)
    assert (problem.code, problem.message, problem.suggestions) == ("too_few", "Too few.", ("Give more.",))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("std::bad_alloc"),
        Exception("Oniguruma error: fail to initialize at line 42 column 3"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_memory_is_recognised_as_the_cause(error: Exception) -> None:
    problem = error_info(error, TRAINING)
    assert problem.code == "out_of_memory"
    assert any("max_length" in suggestion for suggestion in problem.suggestions)


def test_anything_else_is_told_by_type_and_text() -> None:
    problem = error_info(ZeroDivisionError("division\nby zero"), TRAINING)
    assert problem.code == "training_crashed"
    assert "ZeroDivisionError: division by zero" in problem.message


def test_the_process_knows_its_memory_and_time() -> None:
    set_malloc_keep()
    return_freed_memory()
    assert peak_memory_bytes() > 100_000_000  # torch is loaded
    assert 0 < seconds_alive() < 24 * 3600


@pytest.mark.skipif(sys.platform != "linux", reason="macOS takes no such advice")
def test_what_was_read_from_a_mapped_file_can_be_let_go_of_and_read_again(tmp_path: Path) -> None:
    size = 32 << 20
    file = tmp_path / "weights"
    file.write_bytes(bytes([1]) * size)
    mapped = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)

    def in_memory() -> int:
        return sum(part.rss for part in psutil.Process().memory_maps() if part.path == str(file))

    assert mapped.sum() == size
    assert in_memory() == size
    madvise_pageout(mapped.data_ptr() + 1, size - 1)  # no whole pages at its ends
    assert in_memory() < size // 2
    assert mapped.sum() == size


def test_freed_memory_is_returned_above_what_may_be_kept_and_not_below(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = list[int]()
    monkeypatch.setattr(process, "return_freed_memory", lambda: returned.append(process._kept_up_to_bytes))
    for kept in (memory_bytes() + (1 << 30), 1 << 20):
        set_malloc_keep(up_to_bytes=kept)
        trim_if_above()
    set_malloc_keep(up_to_bytes=memory_bytes() + (1 << 30))
    set_malloc_trim()
    trim_if_above()
    set_malloc_keep()
    assert returned == [1 << 20, 0]


_HALF_FREED = """
import torch
from peft_core.modeling.memory import keep_freed_memory, memory_bytes, spare_memory
{mode}()
tensors = [torch.ones(150_000) for _ in range(100)]  # 60 MB
whole = memory_bytes()
del tensors[::2]
print(whole - memory_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc's heap")
@pytest.mark.parametrize(("mode", "goes_back"), [("set_malloc_trim", True), ("set_malloc_keep", False)])
def test_what_is_freed_between_what_stays_goes_back_at_once_where_memory_is_spared(mode: str, goes_back: bool) -> None:
    script = _HALF_FREED.format(mode=mode)
    freed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert (int(freed) > 25_000_000) == goes_back
