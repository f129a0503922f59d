"""Planning a training: the compute plan, the records of a queued job, and requests that cannot be run here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from peft_core.config import Settings
from peft_core.data import table
from peft_core.errors import DataError, InvalidArgument, PeftMcpError, StorageError
from peft_core.planning import planner, target
from peft_core.planning.cost_model import CostedPlan, Speed
from peft_core.planning.planner import choose_plan, plan, write_source
from peft_core.planning.target import this_machine
from peft_core.schemas.dataset import SourceKind
from peft_core.schemas.task import ComputePlan
from peft_core.schemas.training import TrainingConfig
from tests.factories import make_base, make_job

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
    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(planner, "write_records", fails)
    monkeypatch.setattr(table, "export_records", fails)
    for data in (RECORDS, "chunks.lance"):
        with pytest.raises((StorageError, KeyboardInterrupt)):
            write(tmp_path, data)
        assert list(tmp_path.iterdir()) == []


def test_a_record_that_json_cannot_represent_is_rejected_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Record 2 cannot be used") as caught:
        write(tmp_path, [{"text": "x"}, {"text": {1, 2}}])
    assert caught.value.code == "broken_record"
    assert list(tmp_path.iterdir()) == []


def test_sources_and_selection_reach_the_dataset_of_the_job(tmp_path: Path) -> None:
    for source in ("app", "lib"):
        for n in range(10):
            path = tmp_path / source / "src" / f"{n}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"def {source}_{n}_{m}(x):\n    return x * {m} + {n}\n\n\n" for m in range(9)))
    settings = Settings(data_dir=tmp_path / "data")
    config = TrainingConfig(
        more_sources=[str(tmp_path / "lib")], include=["src/"], exclude=["9.py"], allow_little_data=True
    )
    request = plan(str(tmp_path / "app"), config, settings, lambda _base, _device: None)
    dataset = request.dataset
    assert [(source.path, source.name) for source in dataset.sources] == [
        (tmp_path / "app", "app"),
        (tmp_path / "lib", "lib"),
    ]
    assert (dataset.include, dataset.exclude, request.found.files) == (("src/",), ("9.py",), 18)
    narrow = settings.model_copy(update={"allowed_roots": (tmp_path / "app",)})
    for refused in (
        lambda: plan(str(tmp_path / "app"), config, narrow, lambda _base, _device: None),
        lambda: planner.require_sources(request, narrow),
    ):
        with pytest.raises(InvalidArgument, match=r"config\.more_sources") as caught:
            refused()
        assert caught.value.code == "outside_allowed_roots"


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
    monkeypatch.setattr(target.sys, "platform", system)
    monkeypatch.setattr(target, "why_no_cuda", lambda: why_no_cuda)
    with pytest.raises(InvalidArgument, match=expected) as caught:
        plan("/no/such/place", TrainingConfig(device=device), Settings(), lambda *_: None)
    assert caught.value.details["field"] == "config.device"


FASTEST, SLOWER = ComputePlan(weights="bfloat16"), ComputePlan(weights="file", recompute_layers=True)
COSTED = [
    CostedPlan(FASTEST, 2_000_000_000, Speed(100.0, "a guess")),
    CostedPlan(SLOWER, 900_000_001, Speed(50.0, "a guess")),
]


def chosen(limit_mb: int | None, setting_mb: int | None, data_dir: Path) -> CostedPlan:
    config = TrainingConfig(rank=16, max_length=4096, max_memory_mb=limit_mb)
    return choose_plan(
        COSTED, config, make_base(), this_machine("cpu"), Settings(data_dir=data_dir, max_memory_mb=setting_mb)
    )


@pytest.mark.parametrize(
    ("limit_mb", "setting_mb", "plan", "reason"),
    [
        (2000, None, FASTEST, ""),
        (1999, 5000, SLOWER, "gradient checkpointing is on, to keep within config.max_memory_mb = 1999 MB"),
        (5000, 901, SLOWER, "to keep within CODEBASE_GARDENER_MAX_MEMORY_MB = 901 MB"),
    ],
)
def test_the_fastest_plan_within_the_tighter_memory_limit_is_chosen(
    limit_mb: int, setting_mb: int | None, plan: ComputePlan, reason: str, tmp_path: Path
) -> None:
    choice = chosen(limit_mb, setting_mb, tmp_path)
    assert choice.plan == plan
    assert choice.reason.endswith(reason)


def test_a_training_above_a_memory_limit_is_rejected_with_the_limit_that_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"max_memory_mb = 900 .* at least 901 MB") as caught:
        chosen(900, None, tmp_path)
    assert caught.value.suggestions == ("Lower max_length, or raise the limit to 901",)


def test_a_training_that_no_lower_setting_makes_fit_needs_a_smaller_base(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        chosen(256, None, tmp_path)
    assert "use a smaller base_model" in caught.value.suggestions[0]


def test_too_little_available_memory_gives_a_warning_and_the_leanest_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "available_memory_bytes", lambda: 500_000_000)
    choice = chosen(None, None, tmp_path)
    assert choice.plan == SLOWER
    assert "more than the memory available now, 500 MB" in choice.reason
    assert choice.reason.endswith("Close other programs before it starts")
