"""What is kept is listed with its size, what it is, and what would be lost with it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from peft_core.jobs.store import Store
from peft_core.paths import DataPaths
from peft_core.storage.items import find_items
from tests.factories import make_job, make_request
from tests.unit.storage.conftest import DONE, F16, KEY, STOPPED, Usage, item, publish, write


def test_everything_is_listed_with_its_size_largest_first(kept: DataPaths, usage: Usage) -> None:
    listed = usage()
    sizes = {entry.name: entry.bytes for entry in listed.items}
    config = (kept.base_models / KEY / "config.json").stat().st_size
    adapter = sum(file.stat().st_size for file in kept.adapter("web", DONE).iterdir())
    assert sizes == {
        f"base_models/{KEY}": 50_000 + config,
        f"base_models/{KEY}.f16.gguf": len(F16),
        f"jobs/{STOPPED}": 9000,
        f"jobs/{DONE}": 7000,
        f"exports/web/{DONE}/gguf-lora": 4010,
        f"adapters/web/{DONE}": adapter,
        "logs": 500,
        "database": sizes["database"],
    }
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    every_file = [path for path in kept.root.rglob("*") if path.is_file() and not path.is_symlink()]
    assert listed.total_bytes == sum(path.stat().st_size for path in every_file if "current" not in path.parts)
    assert abs(listed.free_bytes - shutil.disk_usage(kept.root).free) < 1 << 30
    assert not any(kept.root.rglob("*.in_use"))  # listing writes nothing


def test_the_summary_names_the_directory_the_total_and_the_largest_items(kept: DataPaths, usage: Usage) -> None:
    summary = usage().summary
    assert summary.startswith(f"{kept.root} holds ")
    assert "are free on its disk" in summary
    assert f"Largest: base_models/{KEY} (51 kB), " in summary


def test_each_item_says_what_it_is_and_what_is_lost(kept: DataPaths, usage: Usage) -> None:
    listed = usage()
    assert item(listed, f"base_models/{KEY}").description.startswith("SmolLM2-135M-Instruct, converted from GGUF")
    assert item(listed, f"base_models/{KEY}.f16.gguf").description == "SmolLM2-135M-Instruct, in F16 for llama.cpp."
    (kept.base_models / KEY / "config.json").unlink()
    assert item(usage(), f"base_models/{KEY}.f16.gguf").description == "tiny, in F16 for llama.cpp."
    assert "converted again at the next use" in item(listed, f"base_models/{KEY}").lost
    adapter = item(listed, f"adapters/web/{DONE}")
    assert "current adapter of project web" in adapter.description
    assert "gone for good" in adapter.lost
    assert item(listed, f"jobs/{DONE}").description == "Training of project web, completed (2026-01-01)."
    assert "adapter that it published and its results are kept" in item(listed, f"jobs/{DONE}").lost
    assert (
        item(listed, f"jobs/{STOPPED}").lost
        == "Its checkpoint is lost: resume_training then begins again at step 0, not 4."
    )
    assert all(entry.can_free == (entry.name != "database") for entry in listed.items)
    assert "CODEBASE_GARDENER_KEEP_RUNS" in item(listed, "database").reason


def test_a_job_with_its_own_records_says_that_it_cannot_be_resumed_without_them(
    kept: DataPaths, store: Store, usage: Usage
) -> None:
    records = write(kept.job("mine").records, 100)
    store.insert(make_job("mine", request=make_request(source=records, source_kind="records")))
    store.request_cancel("mine")
    assert "cannot be resumed any more" in item(usage(), "jobs/mine").lost


def test_only_what_is_made_again_is_suggested(kept: DataPaths, usage: Usage) -> None:
    step = usage().next_step
    assert step is not None
    assert (step.tool, step.arguments) == (
        "disk_usage",
        {"free": [f"base_models/{KEY}", f"base_models/{KEY}.f16.gguf"]},
    )
    after = usage(*step.arguments["free"])
    assert after.next_step is None
    assert after.next == "`lost` says what would be lost with each item."


def test_an_empty_or_missing_data_directory_is_no_error(paths: DataPaths, usage: Usage) -> None:
    assert usage().total_bytes == 0
    assert usage().items == []
    assert not paths.root.exists()
    paths.root.mkdir()
    assert usage().total_bytes == 0


def test_a_file_with_several_names_counts_once(kept: DataPaths, usage: Usage) -> None:
    before = usage().total_bytes
    os.link(kept.base_models / KEY / "model.safetensors", kept.job(DONE).root / "linked")
    os.link(kept.base_models / KEY / "model.safetensors", kept.base_models / KEY / "again")
    assert usage().total_bytes == before
    freed = usage(f"base_models/{KEY}").freed[0].bytes
    assert freed < 1000, "its weights still have a name in the job"
    (job,) = usage(f"jobs/{DONE}").freed
    assert job.bytes == 57_000


def test_many_items_are_listed_up_to_a_limit_and_can_all_be_freed(paths: DataPaths, usage: Usage) -> None:
    for number in range(60):
        write(paths.base_models / f"base-{number:02}" / "model.safetensors", 100 + number)
    listed = usage()
    assert (len(listed.items), listed.omitted_items) == (40, 20)
    assert listed.total_bytes == sum(100 + number for number in range(60))
    assert usage("base_models/base-00").freed[0].bytes == 100


def test_the_database_is_counted_with_its_log_of_changes(kept: DataPaths, usage: Usage) -> None:
    write(Path(f"{kept.database}-wal"), 12_345)
    with_log = item(usage(), "database").bytes
    assert with_log == kept.database.stat().st_size + 12_345


def test_unknown_files_are_counted_and_never_freed(kept: DataPaths, usage: Usage) -> None:
    write(kept.root / "projects" / "web" / "index" / "vectors.bin", 600_000)
    write(kept.root / "notes.txt", 5)
    other = item(usage(), "other")
    assert (other.bytes, other.can_free) == (600_005, False)


@pytest.mark.parametrize("place", ["jobs", "base_models", "projects", "projects/web", "projects/web/lora", "logs"])
def test_a_symbolic_link_in_place_of_a_directory_is_not_followed(
    kept: DataPaths, usage: Usage, tmp_path: Path, place: str
) -> None:
    outside = tmp_path / "outside"
    (kept.root / place).rename(outside)
    (kept.root / place).symlink_to(outside)
    before = {path: path.lstat().st_size for path in outside.rglob("*")}
    listed = usage()
    freeable = [entry.name for entry in listed.items if entry.can_free]
    prefix = {"projects": "adapters", "projects/web": "adapters", "projects/web/lora": "adapters"}.get(place, place)
    assert not any(name.startswith(prefix) for name in freeable)
    usage(*freeable)
    assert {path: path.lstat().st_size for path in outside.rglob("*")} == before


def test_every_name_is_listed_so_that_it_can_be_named_again(paths: DataPaths, usage: Usage) -> None:
    odd = [b"a b", b"100%", b"%41", b"line\nbreak", b"\xff\xfe", "\u202egnp".encode(), b"-rf", b"*", "日本".encode()]
    for name in odd:
        Path(os.fsdecode(os.fsencode(paths.base_models) + b"/" + name)).mkdir(parents=True)
    write(paths.base_models / "*" / "model.safetensors", 10)
    names = [entry.name for entry in usage().items]
    assert len(set(names)) == len(odd)
    assert all(name.isprintable() for name in names)
    for count, name in enumerate(names, start=1):
        assert [freed.name for freed in usage(name).freed] == [name]
        assert len(list(paths.base_models.iterdir())) == len(odd) - count


def test_an_adapter_of_a_project_is_described_when_its_manifest_is_damaged(kept: DataPaths, usage: Usage) -> None:
    adapter = publish(kept, "api", "b-02")
    (adapter / "adapter_manifest.json").chmod(0o644)
    (adapter / "adapter_manifest.json").write_text("[" * 10_000)
    assert "without a readable manifest" in item(usage(), "adapters/api/b-02").description
    (kept.base_models / KEY / "config.json").write_text("[" * 100_000)
    assert "A base model of about 0M parameters" in item(usage(), f"base_models/{KEY}").description


def test_what_cannot_be_read_is_listed_and_kept(kept: DataPaths, usage: Usage, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = kept.job(DONE).dataset
    scan = os.scandir

    def refuse(path: str) -> os._ScandirIterator[str]:  # the superuser, as which tests may run, can read everything
        if path == str(closed):
            raise PermissionError
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    job = item(usage(), f"jobs/{DONE}")
    assert not job.can_free
    assert "cannot be read" in job.reason


def test_items_are_found_in_a_directory_that_changes_meanwhile(
    kept: DataPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, scan = kept.job(DONE).dataset, os.scandir

    def vanish(path: str) -> os._ScandirIterator[str]:
        if path == str(dataset):
            dataset.rename(kept.root.parent / "elsewhere")
        return scan(path)

    monkeypatch.setattr(os, "scandir", vanish)
    job = next(found for found in find_items(kept) if found.name == f"jobs/{DONE}")
    assert (job.bytes, job.complete) == (0, True)
