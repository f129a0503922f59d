"""What a training shows in Codebase Gardener's registry, and what is read from it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from peft_core.errors import InvalidArgument, StorageError
from peft_core.gardener.registry import ProjectRegistry
from peft_core.paths import DataPaths
from peft_core.schemas.results import Status
from tests.unit.gardener.conftest import API, WEB, adapter


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def web(path: Path) -> dict[str, Any]:
    return load(path)["projects"][WEB]


@pytest.mark.parametrize(
    ("status", "word"),
    [
        (Status.QUEUED, "training"),
        (Status.IN_PROGRESS, "training"),
        (Status.FAILED, "failed"),
        (Status.INTERRUPTED, "failed"),
        (Status.CANCELLED, "not_started"),
    ],
)
def test_a_training_shows_in_the_words_of_codebase_gardener(
    paths: DataPaths, registry_file: Path, status: Status, word: str
) -> None:
    ProjectRegistry(paths).show(WEB, Status.IN_PROGRESS)
    ProjectRegistry(paths).show(WEB, status)
    assert web(registry_file)["training_status"] == word
    assert web(registry_file)["lora_adapter_path"].endswith("lora_adapter.bin")


def test_a_completed_training_shows_with_its_adapter_and_the_time_in_local_form(
    paths: DataPaths, registry_file: Path
) -> None:
    directory = adapter(paths, WEB, "a-01")
    before = datetime.now()  # noqa: DTZ005 -- Codebase Gardener writes local time
    ProjectRegistry(paths).show(WEB, Status.COMPLETED)
    shown = web(registry_file)
    assert (shown["training_status"], shown["lora_adapter_path"]) == ("completed", str(directory))
    assert before <= datetime.fromisoformat(shown["last_updated"]) <= datetime.now()  # noqa: DTZ005 -- the same
    assert " " in shown["last_updated"]


def test_a_cancelled_training_leaves_an_earlier_adapter_in_use(paths: DataPaths, registry_file: Path) -> None:
    directory = adapter(paths, WEB, "a-01")
    ProjectRegistry(paths).show(WEB, Status.IN_PROGRESS)
    ProjectRegistry(paths).show(WEB, Status.CANCELLED)
    assert (web(registry_file)["training_status"], web(registry_file)["lora_adapter_path"]) == (
        "completed",
        str(directory),
    )


def test_a_deleted_adapter_is_not_named_any_more(paths: DataPaths, registry_file: Path) -> None:
    directory = adapter(paths, WEB, "a-01")
    ProjectRegistry(paths).show(WEB, Status.COMPLETED)
    directory.rmdir()
    paths.current(WEB).unlink()
    ProjectRegistry(paths).show(WEB, Status.COMPLETED)
    assert (web(registry_file)["training_status"], web(registry_file)["lora_adapter_path"]) == ("not_started", None)


def test_everything_else_in_the_file_stays_as_it_is(paths: DataPaths, registry_file: Path) -> None:
    registry_file.chmod(0o640)
    before = load(registry_file)
    ProjectRegistry(paths).show(WEB, Status.IN_PROGRESS)
    after = load(registry_file)
    assert json.dumps(after["projects"][API]) == json.dumps(before["projects"][API])
    assert list(after) == list(before)
    assert list(after["projects"][WEB]) == list(before["projects"][WEB])
    assert {name for name, value in after["projects"][WEB].items() if before["projects"][WEB][name] != value} == {
        "training_status",
        "last_updated",
    }
    assert registry_file.stat().st_mode & 0o777 == 0o640
    assert "größer" in registry_file.read_text(encoding="utf-8")


def test_a_status_that_is_shown_already_is_not_written_again(paths: DataPaths, registry_file: Path) -> None:
    ProjectRegistry(paths).show(WEB, Status.QUEUED)
    before = registry_file.stat().st_ino
    ProjectRegistry(paths).show(WEB, Status.IN_PROGRESS)
    assert registry_file.stat().st_ino == before


def test_without_a_registry_nothing_is_created(paths: DataPaths) -> None:
    registry = ProjectRegistry(paths)
    registry.show(WEB, Status.QUEUED)
    registry.activate(WEB)
    assert (registry.projects(), list(paths.root.iterdir())) == ([], [])


def test_a_project_that_is_not_there_is_not_added(paths: DataPaths, registry_file: Path) -> None:
    before = registry_file.read_bytes()
    ProjectRegistry(paths).show("other", Status.COMPLETED)
    assert registry_file.read_bytes() == before


def test_a_project_is_found_by_its_id_and_refused_by_its_name(paths: DataPaths, registry_file: Path) -> None:
    registry = ProjectRegistry(paths)
    assert registry.data_of(WEB, None) == "/code/web"
    with pytest.raises(InvalidArgument, match=f"is the name of a project .* must be its id: '{WEB}'"):
        registry.find("Web")
    assert registry.find("other") is None
    with pytest.raises(InvalidArgument, match="Codebase Gardener has no project with the id 'other'"):
        registry.data_of("other", None)


def test_a_relative_source_path_is_refused(paths: DataPaths, registry_file: Path) -> None:
    registry_file.write_text(registry_file.read_text(encoding="utf-8").replace("/code/web", "code/web"))
    with pytest.raises(InvalidArgument, match="'code/web'; it must be an absolute path"):
        ProjectRegistry(paths).data_of(WEB, None)


@pytest.mark.parametrize("impossible", ["/" + "x" * 5000, "/code/\0"])
def test_impossible_paths_are_left_to_the_check_of_the_data(
    paths: DataPaths, registry_file: Path, impossible: str
) -> None:
    content = load(registry_file)
    content["projects"][WEB] |= {"source_path": impossible, "vector_store_path": impossible}
    registry_file.write_text(json.dumps(content))
    assert ProjectRegistry(paths).data_of(WEB, None) == impossible
    assert ProjectRegistry(paths).data_of(WEB, impossible) == impossible


def test_entries_that_are_no_projects_are_left_alone(paths: DataPaths, registry_file: Path) -> None:
    content = load(registry_file)
    content["projects"] |= {"odd": ["no", "project"], API: {"name": None, "source_path": 7}}
    registry_file.write_text(json.dumps(content))
    registry = ProjectRegistry(paths)
    assert [(project.project_id, project.name) for project in registry.projects()] == [(WEB, "web"), (API, "")]
    registry.show(WEB, Status.QUEUED)
    assert load(registry_file)["projects"]["odd"] == ["no", "project"]


def test_the_active_project_is_set_in_both_files(paths: DataPaths, registry_file: Path) -> None:
    state = {"active_project": None, "last_updated": None, "projects": {}, "version": "1.0"}
    paths.gardener_active.write_text(json.dumps(state))
    ProjectRegistry(paths).activate(API)
    assert load(registry_file)["active_project"] == API
    active = load(paths.gardener_active)
    assert (active["active_project"], list(active)) == (API, list(state))
    assert datetime.fromisoformat(active["last_updated"])


UNUSABLE = {
    "it is not JSON": b"{",
    "must be a JSON object": b"[]",
    "it is not JSON (": b"\xff\xfe\xfd",
    "its version is '2.0'; this peft-mcp reads version 1": b'{"version": "2.0", "projects": {}}',
    "its version is {}": b'{"version": {}}',
    "must be at most 16000000": b" " * 16_000_001,
    "names and values": b"[" * 1_000_001,
    "it is not JSON (maximum recursion": b"[" * 100_000,
}


@pytest.mark.parametrize("problem", UNUSABLE)
def test_a_registry_that_cannot_be_used_is_one_clear_error_and_never_changed(
    paths: DataPaths, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    paths.gardener_registry.write_bytes(UNUSABLE[problem])
    registry = ProjectRegistry(paths)
    with pytest.raises(StorageError) as caught:
        registry.data_of(WEB, None)
    assert caught.value.code == "gardener_file"
    assert problem in caught.value.message
    assert len(str(caught.value)) < 400
    registry.show(WEB, Status.COMPLETED)
    assert "is not shown in Codebase Gardener" in caplog.text
    assert paths.gardener_registry.read_bytes() == UNUSABLE[problem]


def test_a_registry_that_is_a_link_is_neither_read_nor_replaced(paths: DataPaths, registry_file: Path) -> None:
    elsewhere = registry_file.rename(paths.root / "elsewhere.json")
    registry_file.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    with pytest.raises(StorageError, match="is a symbolic link"):
        ProjectRegistry(paths).projects()
    ProjectRegistry(paths).show(WEB, Status.QUEUED)
    assert registry_file.is_symlink()
    assert elsewhere.read_bytes() == before


WRITER = """
import json, sys
from pathlib import Path
from peft_core.gardener.registry import ProjectRegistry
from peft_core.paths import DataPaths
from peft_core.schemas.results import Status

paths, project = DataPaths(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
for number in range(40):
    status, word = [(Status.QUEUED, "training"), (Status.FAILED, "failed")][number % 2]
    ProjectRegistry(paths).show(project, status)
    shown = json.loads(paths.gardener_registry.read_text())["projects"][project]["training_status"]
    assert shown == word, f"{number}: {shown}"
"""


def test_two_processes_that_write_at_the_same_time_lose_nothing(paths: DataPaths, registry_file: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(paths.root)]
    writers = [
        subprocess.Popen([*command, project], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for project in (WEB, API)
    ]
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.communicate("go\n")
    assert [writer.returncode for writer in writers] == [0, 0]
    assert [project["training_status"] for project in load(registry_file)["projects"].values()] == ["failed", "failed"]


KILLED = """
import os, signal, sys
from pathlib import Path
from peft_core.gardener.registry import ProjectRegistry
from peft_core.paths import DataPaths
from peft_core.schemas.results import Status

os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
ProjectRegistry(DataPaths(Path(sys.argv[1]))).show(sys.argv[2], Status.QUEUED)
"""


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file_and_no_lock(
    paths: DataPaths, registry_file: Path
) -> None:
    before = registry_file.read_bytes()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(paths.root), WEB], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert registry_file.read_bytes() == before
    ProjectRegistry(paths).show(WEB, Status.QUEUED)
    assert web(registry_file)["training_status"] == "training"
    assert sorted(path.name for path in paths.root.iterdir()) == [".registry.lock", "registry.json"]
