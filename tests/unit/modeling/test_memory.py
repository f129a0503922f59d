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


def test_each_event_is_written_as_one_line(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    emit = json_line_writer(writer, StopFlag().request)
    events = [JobStarted(), CheckpointSaved(step=3)]
    for event in events:
        emit(event)
    lines = os.read(reader, 10_000).splitlines()
    assert [EVENT.validate_json(line) for line in lines] == events


def test_a_closed_event_pipe_requests_a_stop(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    stop = StopFlag()
    emit = json_line_writer(writer, stop.request)
    os.close(reader)
    emit(JobStarted())
    with pytest.raises(Cancelled):
        stop.check()


def test_check_passes_without_a_request_to_stop() -> None:
    StopFlag().check()


def test_error_info_keeps_the_fields_of_our_own_errors() -> None:
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
def test_out_of_memory_errors_of_all_libraries_are_recognised(error: Exception) -> None:
    problem = error_info(error, TRAINING)
    assert problem.code == "out_of_memory"
    assert any("max_length" in suggestion for suggestion in problem.suggestions)


def test_error_info_names_type_and_text_of_other_errors() -> None:
    problem = error_info(ZeroDivisionError("division\nby zero"), TRAINING)
    assert problem.code == "training_crashed"
    assert "ZeroDivisionError: division by zero" in problem.message


def test_peak_memory_and_age_of_the_process_are_plausible() -> None:
    set_malloc_keep()
    return_freed_memory()
    assert peak_memory_bytes() > 100_000_000  # torch is loaded
    assert 0 < seconds_alive() < 24 * 3600


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no MADV_PAGEOUT")
def test_madvise_pageout_drops_mapped_pages_which_can_be_read_again(tmp_path: Path) -> None:
    size = 32 << 20
    file = tmp_path / "weights"
    file.write_bytes(bytes([1]) * size)
    mapped = torch.from_file(str(file), shared=False, size=size, dtype=torch.uint8)

    def in_memory() -> int:
        return sum(part.rss for part in psutil.Process().memory_maps() if part.path == str(file))

    assert mapped.sum() == size
    assert in_memory() == size
    madvise_pageout(mapped.data_ptr() + 1, size - 1)  # its ends are not page-aligned
    assert in_memory() < size // 2
    assert mapped.sum() == size


def test_trim_if_above_returns_memory_only_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    returned = list[int]()
    monkeypatch.setattr(process, "return_freed_memory", lambda: returned.append(process._keep_up_to_bytes))
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
from peft_core.modeling.memory import memory_bytes, set_malloc_keep, set_malloc_trim
{mode}()
tensors = [torch.ones(150_000) for _ in range(100)]  # 60 MB
before = memory_bytes()
del tensors[::2]
print(before - memory_bytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="tests glibc")
@pytest.mark.parametrize(("mode", "goes_back"), [("set_malloc_trim", True), ("set_malloc_keep", False)])
def test_only_the_trim_policy_returns_blocks_freed_between_live_ones(mode: str, goes_back: bool) -> None:
    script = _HALF_FREED.format(mode=mode)
    freed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert (int(freed) > 25_000_000) == goes_back
