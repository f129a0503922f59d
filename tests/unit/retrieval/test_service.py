"""Where the code of an adapter is, and when it is not used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from peft_core.adapters.manifest import Manifest, write_manifest
from peft_core.errors import InvalidArgument
from peft_core.paths import DataPaths
from peft_core.retrieval.service import RetrievalService, earlier_examples
from peft_core.schemas.staleness import Staleness
from tests.factories import make_manifest

NAME = "20260101-000000-abcdef"
PARENT = "20260101-000000-000001"


def trained(paths: DataPaths, name: str = NAME, *, sha256: str = "one", **run: Any) -> Path:
    """Write the manifest of an adapter, and the dataset of its job."""
    adapter, dataset = paths.adapter("web", name), paths.job(name).dataset
    for directory in (adapter, dataset):
        directory.mkdir(parents=True)
    manifest = make_manifest(name).model_dump()
    manifest["data"]["summary"]["sha256"] = sha256
    manifest["run"] |= run
    write_manifest(adapter, Manifest.model_validate(manifest))
    (dataset / "manifest.json").write_text(json.dumps({"dataset": {"summary": {"sha256": "one"}}}))
    (dataset / "train.jsonl").write_text("")
    return adapter


@pytest.fixture
def paths(tmp_path: Path) -> DataPaths:
    return DataPaths(tmp_path.resolve() / "data")


def service(paths: DataPaths, staleness: Staleness | None = None) -> RetrievalService:
    async def staleness_of(_: str) -> Staleness | None:
        return staleness

    return RetrievalService(paths, staleness_of)


async def refusal(asked: RetrievalService, adapter: Path) -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        await asked.source_of(adapter)
    assert caught.value.suggestions
    return caught.value


async def test_code_is_that_of_the_job_and_of_those_that_it_continues(paths: DataPaths) -> None:
    trained(paths, PARENT)
    adapter = trained(paths, continued_from=PARENT)
    source = await service(paths).source_of(adapter)
    assert source.examples == tuple(paths.job(name).dataset / "train.jsonl" for name in (NAME, PARENT))
    assert source.note == ""


async def test_a_training_searches_the_code_that_its_adapter_will_search(paths: DataPaths) -> None:
    grandparent = "20260101-000000-000000"
    trained(paths, grandparent)
    trained(paths, PARENT, continued_from=grandparent)
    earlier = earlier_examples(paths, paths.adapters("web"), PARENT)
    source = await service(paths).source_of(trained(paths, continued_from=PARENT))
    assert source.examples == (paths.job(NAME).dataset / "train.jsonl", *earlier)
    assert len(earlier) == 2
    assert earlier_examples(paths, paths.adapters("web"), None) == []


async def test_an_adapter_that_claims_to_continue_itself_has_its_code_once(paths: DataPaths) -> None:
    trained(paths, PARENT, continued_from=NAME)
    source = await service(paths).source_of(trained(paths, continued_from=PARENT))
    assert len(source.examples) == 2


async def test_code_of_an_earlier_training_that_is_gone_is_counted(paths: DataPaths) -> None:
    source = await service(paths).source_of(trained(paths, continued_from=PARENT))
    assert source.note == "The code of 1 earlier training that it continues was deleted."


async def test_a_few_changes_are_said_and_not_refused(paths: DataPaths) -> None:
    changed = Staleness(text="3 of 40 files have changed.", files=40, files_changed=3, units_changed_percent=4)
    assert (await service(paths, changed).source_of(trained(paths))).note == "3 of 40 files have changed."


async def test_code_that_has_mostly_changed_is_refused(paths: DataPaths) -> None:
    changed = Staleness(text="30 of 40 files have changed.", files=40, files_changed=30, units_changed_percent=70)
    error = await refusal(service(paths, changed), trained(paths))
    assert error.code == "stale_retrieval_index"
    assert "30 of 40 files have changed" in str(error)
    assert "refresh_project" in error.suggestions[0]


async def test_code_of_another_version_is_refused(paths: DataPaths) -> None:
    error = await refusal(service(paths), trained(paths, sha256="two"))
    assert error.code == "other_retrieval_index"


async def test_deleted_code_is_missed(paths: DataPaths) -> None:
    adapter = trained(paths)
    (paths.job(NAME).dataset / "train.jsonl").unlink()
    error = await refusal(service(paths), adapter)
    assert error.code == "no_retrieval_index"
    assert "web" in error.suggestions[0]


async def test_an_adapter_from_elsewhere_has_no_code_here(paths: DataPaths, tmp_path: Path) -> None:
    assert (await refusal(service(paths), tmp_path / "foreign")).code == "no_retrieval_index"
