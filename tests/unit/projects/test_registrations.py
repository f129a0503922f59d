"""`project.json`: what is kept, and that a damaged or hostile file is refused with what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.errors import StorageError
from peft_core.paths import DataPaths
from peft_core.projects.registrations import LOCK_TIMEOUT_S, MAX_BYTES, Registrations
from peft_core.schemas.project import Registration, RetrainThreshold
from peft_core.schemas.training import TrainingConfig
from peft_core.system.lock import FileLock

REGISTRATION = Registration(
    project_id="web",
    source="/code/web",
    first_commits=("a" * 40,),
    config=TrainingConfig(base_model="bundled", max_steps=20, include=["src/"]),
    retrain_when=RetrainThreshold(units=10),
    registered_at="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
def paths(tmp_path: Path) -> DataPaths:
    return DataPaths(tmp_path)


def write(paths: DataPaths, content: bytes | str, project_id: str = "web") -> Path:
    path = paths.registration(project_id)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_registration_is_read_as_it_was_written(paths: DataPaths) -> None:
    registrations = Registrations(paths)
    assert registrations.read("web") is None
    registrations.change("web", lambda before: REGISTRATION if before is None else before)
    assert registrations.read("web") == REGISTRATION
    assert registrations.all() == [REGISTRATION]


def test_only_settings_that_were_given_are_kept_so_that_later_defaults_apply(paths: DataPaths) -> None:
    registrations = Registrations(paths)
    registrations.change("web", lambda _: REGISTRATION)
    document = json.loads(paths.registration("web").read_text())
    assert document["config"] == {"base_model": "bundled", "max_steps": 20, "include": ["src/"]}
    assert document["schema_version"] == 1
    read = registrations.read("web")
    assert read is not None
    assert read.config.model_fields_set == {"base_model", "max_steps", "include"}


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "is not JSON"),
        ("[" * 5000, "has more than 10000 names and values|is not JSON"),
        ("[]", "its content"),
        (b"\xff\xfe", "is not JSON"),
        ('{"project_id": "web", "owner": "me"}', "owner"),
        ('{"project_id": "other"}', "it is that of project 'other'"),
        ('{"project_id": "web", "source": "../x"}', "must be an absolute path"),
        ('{"project_id": "web", "config": {"rank": 0}}', "config.rank"),
        ('{"project_id": "web", "retrain_when": {"units": 0}}', "retrain_when"),
        ('{"project_id": "web", "first_commits": ["--help"]}', "first_commits"),
        (b" " * (MAX_BYTES + 1), "must be at most"),
        ("[" + "[]," * 20_000 + "[]]", "names and values"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_and_replaced_by_the_next_training(
    paths: DataPaths, content: bytes | str, problem: str
) -> None:
    write(paths, content)
    registrations = Registrations(paths)
    with pytest.raises(StorageError, match=problem) as caught:
        registrations.read("web")
    assert caught.value.code == "unreadable_project"
    assert "train_adapter" in str(caught.value)
    assert len(caught.value.message) < 400 + len(str(paths.root))
    assert registrations.all() == []
    registrations.change("web", lambda before: REGISTRATION if before is None else before)
    assert registrations.read("web") == REGISTRATION


@given(
    st.binary(max_size=200) | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(json.dumps)
)
def test_no_content_of_the_file_leads_to_another_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes | str
) -> None:
    paths = DataPaths(tmp_path_factory.mktemp("data"))
    write(paths, content)
    with pytest.raises(StorageError):
        Registrations(paths).read("web")


def test_a_registration_of_a_newer_version_is_neither_read_nor_overwritten(paths: DataPaths) -> None:
    path = write(paths, '{"schema_version": 2, "project_id": "web", "of the future": 1}')
    registrations = Registrations(paths)
    for call in (lambda: registrations.read("web"), lambda: registrations.change("web", lambda _: REGISTRATION)):
        with pytest.raises(StorageError, match="newer peft-mcp") as caught:
            call()
        assert caught.value.code == "newer_project"
    assert "of the future" in path.read_text()


def test_a_link_is_not_followed(paths: DataPaths, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps({"project_id": "web"}))
    path = paths.registration("web")
    path.parent.mkdir(parents=True)
    path.symlink_to(outside)
    registrations = Registrations(paths)
    with pytest.raises(StorageError, match="symbolic link"):
        registrations.read("web")
    registrations.change("web", lambda _: REGISTRATION)
    assert json.loads(outside.read_text()) == {"project_id": "web"}


def test_a_change_waits_for_that_of_another_process_and_gives_up_in_time(
    paths: DataPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LOCK_TIMEOUT_S >= 1
    monkeypatch.setattr("peft_core.projects.registrations.LOCK_TIMEOUT_S", 0.1)
    paths.registration("web").parent.mkdir(parents=True)
    with FileLock(paths.registration("web").with_name(".project.lock")) as lock:
        assert lock.acquire()
        with pytest.raises(StorageError, match="locked the registration of 'web'") as caught:
            Registrations(paths).change("web", lambda _: REGISTRATION)
    assert caught.value.code == "project_busy"


def test_two_processes_that_change_a_registration_lose_nothing(paths: DataPaths) -> None:
    """Each of two processes adds its patterns one by one to those that it finds."""
    script = (
        "import sys; from pathlib import Path; from peft_core.paths import DataPaths\n"
        "from peft_core.projects.registrations import Registrations\n"
        "from peft_core.schemas.project import Registration\n"
        "from peft_core.schemas.training import TrainingConfig\n"
        "def add(name):\n"
        "    def change(before):\n"
        "        before = before or Registration(project_id='web')\n"
        "        config = TrainingConfig(include=[*before.config.include, name])\n"
        "        return before.model_copy(update={'config': config})\n"
        "    return change\n"
        "for n in range(10): Registrations(DataPaths(Path(sys.argv[1]))).change('web', add(f'{sys.argv[2]}{n}'))\n"
    )
    command = [sys.executable, "-c", script, str(paths.root)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    processes = [subprocess.Popen([*command, name], env=environment) for name in "ab"]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    found = Registrations(paths).read("web")
    assert found is not None
    assert sorted(found.config.include) == sorted(f"{name}{n}" for name in "ab" for n in range(10))
