"""Where the staleness of an adapter is shown: the answers of the manager, and their sentences."""

import json
from pathlib import Path

import pytest
from mcp.types import TextContent

from peft_core import PEFTManager, Settings
from peft_core.adapters.manifest import CONFIG, WEIGHTS, write_manifest
from peft_core.adapters.registry import Registry
from peft_core.data.prepare import prepare
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.jobs.store import Store
from peft_core.schemas.results import LoadedAdapter, MemoryState
from peft_core.schemas.staleness import Staleness
from server.format_results import format_adapter_info, format_adapters, format_loaded
from tests.factories import make_dataset_spec, make_job, make_manifest, make_request
from tests.unit.staleness.test_staleness import commit, committed, edit


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path / "data")


def trained(settings: Settings, adapter_id: str, project: str, root: Path) -> Path:
    """Publish an adapter as a training on this repository would, with its job."""
    draft = settings.data_dir / "drafts" / adapter_id
    prepare(make_dataset_spec(root), directory=draft, token_counter=EstimatedTokenCounter(), report=lambda _: None)
    (draft / CONFIG).write_text(json.dumps({"r": 8, "lora_alpha": 8, "target_modules": ["q_proj"]}))
    (draft / WEIGHTS).write_bytes(b"weights")
    write_manifest(draft, make_manifest(adapter_id, project))
    registry = Registry(settings.paths)
    path = registry.publish(draft, project, adapter_id)
    registry.set_current(project, adapter_id)
    store = Store(settings.paths.database, lambda: 0.0)
    store.create()
    store.insert(make_job(adapter_id, project, request=make_request(source=root)))
    return path


def sentence(result: object) -> str:
    content = getattr(result, "content", [])
    assert isinstance(content[0], TextContent)
    return content[0].text


async def test_a_list_compares_the_current_adapters_with_their_code(settings: Settings, tmp_path: Path) -> None:
    web, api = committed(tmp_path / "web"), committed(tmp_path / "api")
    trained(settings, "a-01", "web", web)
    trained(settings, "a-02", "web", web)
    trained(settings, "a-03", "api", api)
    edit(web, 0, "value", "amount")
    commit(web, "Rename")
    async with PEFTManager(settings) as manager:
        listed = await manager.list_adapters(compare_for_s=60)
    found = {adapter.adapter_id: adapter.staleness for adapter in listed.adapters}
    assert found["a-01"] is None  # an earlier one
    assert found["a-02"] is not None
    assert found["a-03"] is not None
    assert (found["a-02"].commits_behind, found["a-02"].units_changed_percent, found["a-02"].retrain) == (1, 10.0, True)
    assert (found["a-03"].commits_behind, found["a-03"].files_changed, found["a-03"].retrain) == (0, 0, False)
    assert listed.not_compared == 0
    text = sentence(format_adapters(listed))
    assert "web/a-02 (current, not evaluated, " in text
    assert "1 commit behind, 10 % of the units changed, retrain it)" in text
    assert "up to date)" in text


async def test_what_a_list_has_no_time_for_is_counted(settings: Settings, tmp_path: Path) -> None:
    trained(settings, "a-01", "web", committed(tmp_path / "web"))
    async with PEFTManager(settings) as manager:
        listed = await manager.list_adapters(compare_for_s=0)
    assert [adapter.staleness for adapter in listed.adapters] == [None]
    assert "1 of them was not compared with its code in time; get_adapter_info does it." in sentence(
        format_adapters(listed)
    )


async def test_the_details_of_an_adapter_say_how_far_its_code_has_moved_on(settings: Settings, tmp_path: Path) -> None:
    root = committed(tmp_path / "web")
    path = trained(settings, "a-01", "web", root)
    edit(root, 3, "def work_3_0", "def renamed")
    commit(root, "Rename")
    async with PEFTManager(settings) as manager:
        info = await manager.get_adapter_info("web", compare_for_s=60)
    assert info.staleness is not None
    assert info.staleness.source == str(root)
    result = format_adapter_info(info)
    assert sentence(result).startswith(
        f"{path}: rank 8, 0.0 MB. 1 commit behind: 1 of 10 files changed, 1 % of the units. Retraining is worthwhile"
    )
    assert result.structured_content is not None
    assert result.structured_content["staleness"]["commits_behind"] == 1


def test_a_loaded_adapter_is_introduced_with_its_staleness() -> None:
    loaded = LoadedAdapter(
        status="loaded",
        adapter_path="/a",
        base_model="base",
        resident=MemoryState(),
        elapsed_s=1.0,
        memory_bytes=1_000_000,
        staleness=Staleness(text="14 commits behind: 31 of 212 files changed, 9 % of the units."),
    )
    assert "in use. 14 commits behind: 31 of 212 files changed, 9 % of the units." in sentence(format_loaded(loaded))
