"""What is written down when a job is queued, and that nothing is where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_core.config import Settings
from peft_core.data import lance_table
from peft_core.errors import DataError, InvalidArgument, PeftMcpError, StorageError
from peft_core.planning import planner as planning
from peft_core.planning.planner import plan, write_source
from peft_core.schemas.dataset import SourceKind
from peft_core.schemas.training import TrainingConfig
from tests.factories import make_job

RECORDS = [{"content": f"x = {n}", "language": "python", "metadata": {"at": object()}} for n in range(10)]


def write(directory: Path, data: Any = RECORDS) -> Path:
    request = make_job().request.model_copy(update={"source_kind": SourceKind.RECORDS})
    return write_source(request, data, directory / "job" / "records.jsonl").source


def test_records_are_written_beside_their_job(tmp_path: Path) -> None:
    assert write(tmp_path).read_text().splitlines()[3] == '{"content": "x = 3", "language": "python"}'


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_a_job_that_could_not_be_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(planning, "write_records", fails)
    monkeypatch.setattr(lance_table, "export_records", fails)
    for data in (RECORDS, "chunks.lance"):
        with pytest.raises((StorageError, KeyboardInterrupt)):
            write(tmp_path, data)
        assert list(tmp_path.iterdir()) == []


def test_what_json_cannot_hold_is_a_broken_record_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Record 2 cannot be used") as caught:
        write(tmp_path, [{"text": "x"}, {"text": {1, 2}}])
    assert caught.value.code == "broken_record"
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_there_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "others.txt").write_text("mine")
    with pytest.raises(PeftMcpError):
        write(tmp_path)
    assert (tmp_path / "job" / "others.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("device", "system", "why_no_cuda", "told"),
    [
        ("cuda", "linux", "no driver", "no driver; allowed here: auto, cpu"),
        ("cuda", "darwin", "no CUDA on macOS", "no CUDA on macOS; allowed here: auto, mps, cpu"),
        ("mps", "linux", None, "on Apple silicon only; allowed here: auto, cuda, cpu"),
        ("mps", "linux", "no driver", "on Apple silicon only; allowed here: auto, cpu"),
    ],
)
def test_a_device_that_cannot_be_there_is_refused_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
    device: Any,
    system: str,
    why_no_cuda: str | None,
    told: str,
) -> None:
    monkeypatch.setattr(planning.sys, "platform", system)
    monkeypatch.setattr(planning, "why_no_cuda", lambda: why_no_cuda)
    with pytest.raises(InvalidArgument, match=told) as caught:
        plan("/no/such/place", TrainingConfig(device=device), Settings(), lambda *_: None)
    assert caught.value.details["field"] == "config.device"
