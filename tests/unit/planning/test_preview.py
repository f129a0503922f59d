"""The preview of a dataset, without a training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest

from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.manager import PEFTManager
from peft_core.planning.preview import PreviewRequest, preview
from tests.factories import make_base, make_dataset_spec
from tests.model_files import write_model
from tests.unit.data.test_prepare import repository


def request_of(source: Path, data_dir: Path, **further: Any) -> PreviewRequest:
    return PreviewRequest(
        dataset=make_dataset_spec(source, max_length=256), base=make_base(), data_dir=data_dir, **further
    )


def test_a_temporary_directory_inside_the_repository_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = repository(tmp_path / "code")
    (root / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(root / "tmp"))
    assert preview(request_of(root, tmp_path / "data")).dataset.train_examples
    assert list((root / "tmp").iterdir()) == []


def test_a_preview_of_a_forbidden_path_is_rejected(tmp_path: Path) -> None:
    inside = repository(tmp_path / "data" / "projects" / "other")
    with pytest.raises(InvalidArgument, match="the data directory of peft-mcp"):
        preview(request_of(inside, tmp_path / "data"))
    with pytest.raises(InvalidArgument, match="allowed_roots"):
        preview(request_of(repository(tmp_path / "code"), tmp_path / "data", allowed_roots=(tmp_path / "other",)))


async def test_records_beside_code_are_counted_as_records(tmp_path: Path) -> None:
    code = repository(tmp_path / "code")
    records = tmp_path / "records.jsonl"
    records.write_text("".join(f'{{"text": "Number {n} is {n * n}, squared."}}\n' for n in range(60)))
    base = write_model(tmp_path / "base")
    async with PEFTManager(Settings(data_dir=tmp_path / "data")) as manager:
        report = await manager.inspect_training_data(
            str(records), {"base_model": str(base), "max_steps": 3, "more_sources": [str(code)]}
        )
    assert (report.records, report.code_files) == (60, len(list(code.rglob("*.py"))))
