"""Planning a training: the records of a queued job, and requests that cannot be run here."""

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


def test_records_are_written_to_the_job_directory(tmp_path: Path) -> None:
    assert write(tmp_path).read_text().splitlines()[3] == '{"content": "x = 3", "language": "python"}'


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_job_whose_records_cannot_be_written_leaves_nothing_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(planning, "write_records", fails)
    monkeypatch.setattr(lance_table, "export_records", fails)
    for data in (RECORDS, "chunks.lance"):
        with pytest.raises((StorageError, KeyboardInterrupt)):
            write(tmp_path, data)
        assert list(tmp_path.iterdir()) == []


def test_a_record_that_json_cannot_represent_is_rejected_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Record 2 cannot be used") as caught:
        write(tmp_path, [{"text": "x"}, {"text": {1, 2}}])
    assert caught.value.code == "broken_record"
    assert list(tmp_path.iterdir()) == []


def test_an_existing_job_directory_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "others.txt").write_text("mine")
    with pytest.raises(PeftMcpError):
        write(tmp_path)
    assert (tmp_path / "job" / "others.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("device", "system", "why_no_cuda", "expected"),
    [
        ("cuda", "linux", "no driver", "no driver; allowed here: auto, cpu"),
        ("cuda", "darwin", "no CUDA on macOS", "no CUDA on macOS; allowed here: auto, mps, cpu"),
        ("mps", "linux", None, "on Apple silicon only; allowed here: auto, cuda, cpu"),
        ("mps", "linux", "no driver", "on Apple silicon only; allowed here: auto, cpu"),
    ],
)
def test_an_unavailable_device_is_rejected_before_any_data_is_read(
    monkeypatch: pytest.MonkeyPatch, device: Any, system: str, why_no_cuda: str | None, expected: str
) -> None:
    monkeypatch.setattr(planning.sys, "platform", system)
    monkeypatch.setattr(planning, "why_no_cuda", lambda: why_no_cuda)
    with pytest.raises(InvalidArgument, match=expected) as caught:
        plan("/no/such/place", TrainingConfig(device=device), Settings(), lambda *_: None)
    assert caught.value.details["field"] == "config.device"
