"""Places for credentials and private data are refused as training data, by whatever path; allowed roots limit the rest."""

from __future__ import annotations

import json
import os
import pwd
import time
from pathlib import Path
from pwd import struct_passwd
from typing import Any

import pytest

from peft_core.base_models.resolve import resolve
from peft_core.config import Settings
from peft_core.errors import InvalidArgument, PeftMcpError
from peft_core.export.output import require_output
from peft_core.jobs.store import Store
from peft_core.manager import PEFTManager
from peft_core.paths import DataPaths
from peft_core.schemas.events import JobCancelled
from peft_core.schemas.results import Status
from peft_core.system import allowed_paths
from peft_core.system.allowed_paths import require_data_path
from tests.attacks.test_repositories import CODE
from tests.factories import make_job
from tests.model_files import write_adapter, write_model

PRIVATE = [
    ".ssh", ".ssh/keys/old", ".gnupg", ".aws", ".config/gh", ".config/gcloud", ".kube", ".docker", ".password-store",
    ".local/share/keyrings", ".mozilla/firefox/x.default", ".config/google-chrome/Default", ".config/chromium",
    ".thunderbird", "Library/Keychains", "Library/Application Support/Google/Chrome", "backup/alice/.ssh", ".SSH",
    ".claude/projects/-home-ada-web", ".codex/sessions", ".gemini/tmp",
]  # fmt: skip


def filled(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in "abcd":
        (directory / f"{name}.py").write_text(CODE.replace("total", f"total_{name}"))
    (directory / "x.jsonl").write_text("".join(json.dumps({"text": f"{CODE} {n}"}) + "\n" for n in range(20)))
    return directory


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home" / "ada"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    return home


@pytest.fixture
def manager(tmp_path: Path) -> PEFTManager:
    return PEFTManager(Settings(data_dir=tmp_path / "data"))


@pytest.mark.parametrize("place", [".ssh", "notes"])
def test_suggestions_for_a_missing_base_name_only_bases(home: Path, place: str) -> None:
    (home / place).mkdir()
    for name in ("id_ed25519_work", "id_ed25519.gguf"):
        (home / place / name).touch()
    write_model(home / place / "id_ed25519_model")
    (home / place / "id_ed2551_diary").mkdir()
    with pytest.raises(InvalidArgument) as caught:
        resolve(f"~/{place}/id_ed25519", Settings())
    message = str(caught.value)
    assert "id_ed25519_work" not in message
    assert "diary" not in message
    assert ("id_ed25519.gguf" in message) is (place == "notes")


async def refused(manager: PEFTManager, training_data: str, code: str = "sensitive_place") -> InvalidArgument:
    with pytest.raises(InvalidArgument) as caught:
        await manager.train_adapter("web", training_data, {"max_steps": 1})
    assert caught.value.code == code, str(caught.value)
    assert caught.value.suggestions
    assert not manager.settings.paths.database.exists()  # nothing was queued
    return caught.value


@pytest.mark.parametrize("place", PRIVATE)
async def test_a_private_place_is_refused_by_name_through_a_link_and_as_a_file(
    home: Path, tmp_path: Path, manager: PEFTManager, place: str
) -> None:
    private = filled(home / place)
    (tmp_path / "innocent").symlink_to(private)
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "src").symlink_to(tmp_path / "innocent")
    for name in (
        private,
        f"~/{place}",
        tmp_path / "innocent",
        tmp_path / "project" / "src",
        f"{private}/../{private.name}",
    ):
        await refused(manager, str(name))
    await refused(manager, str(private / "x.jsonl"))
    await refused(manager, str(tmp_path / "innocent" / "x.jsonl"))


async def test_evaluation_data_in_a_private_place_is_refused(home: Path, manager: PEFTManager, tmp_path: Path) -> None:
    model, adapter = write_model(tmp_path / "model"), write_adapter(tmp_path / "adapter")
    with pytest.raises(InvalidArgument) as caught:
        await manager.evaluate_adapter(str(adapter), str(filled(home / ".aws")), str(model), accept_unproven_base=True)
    assert (caught.value.code, caught.value.details["field"]) == ("sensitive_place", "evaluation_data")


@pytest.mark.parametrize(
    "parent",
    [
        ".config", ".local", ".local/share", ".cache", ".cache/huggingface", ".cargo", "Library", "snap", ".var",
        "Library/Application Support",
    ],
)  # fmt: skip
async def test_a_directory_that_contains_a_private_place_is_refused(
    home: Path, manager: PEFTManager, parent: str
) -> None:
    filled(home / parent)
    await refused(manager, str(home / parent))


@pytest.mark.parametrize("place", [".cache/project", ".local/share/project", "Library/project", ".config/nvim"])
async def test_a_directory_next_to_a_private_place_is_allowed(home: Path, manager: PEFTManager, place: str) -> None:
    require_data_path(filled(home / place), data_dir=manager.settings.data_dir, allowed_roots=None)


async def test_another_users_home_is_refused_and_a_service_directory_is_not(
    home: Path, manager: PEFTManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    nobody, homes, sites = pwd.getpwuid(0), allowed_paths._HOME_PARENTS[0], Path("/sites")
    users = [struct_passwd((*nobody[:5], str(directory), nobody[6])) for directory in (homes / "bob", sites, "/")]
    monkeypatch.setattr(pwd, "getpwall", lambda: users)
    await refused(manager, str(homes / "bob"))
    for place in (homes / "bob" / "project", homes / "project", sites, Path("/srv/project")):
        require_data_path(place, data_dir=manager.settings.data_dir, allowed_roots=None)


async def test_missing_and_existing_files_in_a_private_place_get_the_same_error(
    home: Path, manager: PEFTManager
) -> None:
    filled(home / ".ssh")
    (home / ".ssh" / "id_ed25519_of_ada").touch()
    existing = await refused(manager, str(home / ".ssh" / "id_ed25519_of_ada"))
    missing = await refused(manager, str(home / ".ssh" / "id_ed25519_of_adx"))
    assert str(existing).replace("ada", "") == str(missing).replace("ada", "").replace("adx", "")


@pytest.mark.parametrize(
    "place",
    [
        "/etc", "/proc/self", "/sys/class", "/dev", "/boot", "/var/log", "/var/lib", "/run/secrets", "/", "~", "~/..",
        "/var", "/run", "/private", "/private/var", "/Library", "/root",
    ],
)  # fmt: skip
async def test_system_directories_and_whole_homes_are_refused(home: Path, manager: PEFTManager, place: str) -> None:
    filled(home)
    await refused(manager, place)


async def test_the_data_directory_its_contents_and_its_parents_are_refused(
    manager: PEFTManager, tmp_path: Path
) -> None:
    await refused(manager, str(filled(manager.settings.data_dir / "jobs" / "1" / "dataset")), "sensitive_place")
    await refused(manager, str(filled(tmp_path)))


async def test_private_files_inside_a_repository_are_left_out(home: Path, manager: PEFTManager) -> None:
    from peft_core.data.walk import walk  # noqa: PLC0415 -- used here only

    project = filled(home / "project")
    for name in (".ssh", ".aws", ".env.d"):
        filled(project / name)
    for name in ("id_rsa", "server.pem", ".env", "credentials.json", ".netrc", "secrets.yaml"):
        (project / name).write_text("x")
    assert {file.name for file in walk(project).files} == {"a.py", "b.py", "c.py", "d.py"}


async def test_inline_records_are_not_checked_for_a_path(manager: PEFTManager) -> None:
    with pytest.raises(PeftMcpError, match="examples"):
        await manager.train_adapter("web", [{"text": "x"}])


# -- allowed roots -----------------------------------------------------------------------------------------------------


@pytest.fixture
def roots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    (tmp_path / "code").mkdir()
    (tmp_path / "models").mkdir()
    monkeypatch.setenv(
        "CODEBASE_GARDENER_ALLOWED_ROOTS", os.pathsep.join(map(str, (tmp_path / "code", tmp_path / "models")))
    )
    return Settings(data_dir=tmp_path / "data")


async def test_allowed_roots_refuse_every_path_outside(roots: Settings, tmp_path: Path) -> None:
    manager = PEFTManager(roots)
    outside = filled(tmp_path / "outside")
    (tmp_path / "code" / "link").symlink_to(outside)
    for path in (
        outside,
        outside / "x.jsonl",
        outside / "missing",
        tmp_path / "code" / "link",
        tmp_path / "code/../outside",
    ):
        await refused(manager, str(path), "outside_allowed_roots")
    model, adapter = write_model(outside / "model"), write_adapter(outside / "adapter")
    calls: list[Any] = [
        lambda: manager.train_adapter("web", str(filled(tmp_path / "code")), {"base_model": str(model)}),
        lambda: manager.train_adapter("web", str(filled(tmp_path / "code")), {"base_model": "/no/such.gguf"}),
        lambda: manager.verify_adapter_compatibility(str(adapter), "bundled"),
        lambda: manager.load_adapter(str(adapter), "bundled"),
        lambda: manager.get_adapter_info(str(adapter)),
        lambda: manager.get_adapter_info(str(outside / "missing")),
    ]
    for call in calls:
        with pytest.raises(InvalidArgument) as caught:
            await call()
        assert caught.value.code == "outside_allowed_roots"
        assert str(tmp_path / "models") in caught.value.message


async def test_allowed_roots_permit_paths_inside(roots: Settings, tmp_path: Path) -> None:
    manager = PEFTManager(roots)
    model, adapter = write_model(tmp_path / "models" / "m"), write_adapter(tmp_path / "models" / "a")
    assert (await manager.verify_adapter_compatibility(str(adapter), str(model))).verdict == "shape_only"
    own = write_adapter(roots.paths.adapter("web", "adapter-01"))
    assert (await manager.get_adapter_info(str(own))).rank == 4  # trained here
    (tmp_path / "code" / "a.py").write_text("x = 1\n")
    with pytest.raises(PeftMcpError) as caught:  # the directory was read
        await manager.train_adapter("web", str(tmp_path / "code"), {"base_model": str(model)})
    assert caught.value.code == "too_few_examples"


@pytest.mark.parametrize("removed", ["code", "models"])
async def test_a_removed_root_prevents_resuming_a_job_that_needs_it(
    roots: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: str
) -> None:
    model = write_model(tmp_path / "models" / "m")
    request = make_job().request.model_copy(
        update={"source": filled(tmp_path / "code" / "web"), "base": resolve(str(model), roots)}
    )
    store = Store(roots.paths.database, time.time)
    store.create()
    store.insert(make_job("job", request=request))
    store.append("job", JobCancelled())
    remaining = "models" if removed == "code" else "code"
    monkeypatch.setenv("CODEBASE_GARDENER_ALLOWED_ROOTS", str(tmp_path / remaining))
    with pytest.raises(InvalidArgument) as caught:
        await PEFTManager(Settings(data_dir=roots.data_dir)).resume_training("job")
    assert caught.value.code == "outside_allowed_roots"
    assert str(tmp_path / remaining) in caught.value.message
    assert store.get("job").status is Status.CANCELLED


def test_roots_must_be_absolute_and_an_empty_value_means_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().allowed_roots is None
    monkeypatch.setenv("CODEBASE_GARDENER_ALLOWED_ROOTS", "  ")
    assert Settings().allowed_roots is None
    monkeypatch.setenv("CODEBASE_GARDENER_ALLOWED_ROOTS", "relative")
    with pytest.raises(ValueError, match="must be an absolute path"):
        Settings()


# -- where exports may be written ------------------------------------------------------------------------------------


def output(path: Path, data: Path, roots: tuple[Path, ...] | None = None) -> Path:
    return require_output(str(path), DataPaths(data), roots)


@pytest.mark.parametrize("place", [*PRIVATE, ".huggingface", ".config/sops/new"])
def test_nothing_is_written_into_a_private_place_also_through_a_link(home: Path, tmp_path: Path, place: str) -> None:
    (home / place).mkdir(parents=True)
    (tmp_path / "link").symlink_to(home / place)
    for path in (home / place / "export", tmp_path / "link" / "export", home / "x" / ".." / place / "export"):
        with pytest.raises(InvalidArgument) as refused:
            output(path, tmp_path / "data")
        assert refused.value.code == "sensitive_place"


@pytest.mark.parametrize("place", ["/etc/x", "/usr/lib/x", "/proc/x", "/bin/x", "/var/lib/x", "/boot/x", "/lib/x"])
def test_nothing_is_written_among_the_files_of_the_system(home: Path, tmp_path: Path, place: str) -> None:
    with pytest.raises(InvalidArgument, match="belongs to the operating system"):
        output(Path(place), tmp_path / "data")


def test_a_home_directory_is_not_the_directory_of_an_export(home: Path, tmp_path: Path) -> None:
    for path in (home, home.parent):
        with pytest.raises(InvalidArgument, match="home directory"):
            output(path, tmp_path / "data")


@pytest.mark.parametrize(
    "place", ["x", "jobs/x", "projects/web/lora/x", "projects/web/exports", "base_models/x", "projects"]
)
def test_of_the_data_directory_only_the_exports_are_written(tmp_path: Path, place: str) -> None:
    with pytest.raises(InvalidArgument, match="data directory of peft-mcp itself"):
        output(tmp_path / "data" / place, tmp_path / "data")
    assert output(tmp_path / "data" / "projects" / "web" / "exports" / "mine", tmp_path / "data").name == "mine"


@pytest.mark.parametrize(
    "place", ["jobs/x.lance/records.jsonl", "peft.db", "projects/web", "vector_stores", "x.lances"]
)
def test_of_the_data_directory_only_tables_are_read(tmp_path: Path, place: str) -> None:
    data_dir = tmp_path / "data"
    with pytest.raises(InvalidArgument, match="data directory of peft-mcp itself"):
        require_data_path(data_dir / place, data_dir=data_dir, allowed_roots=None)
    require_data_path(data_dir / "vector_stores" / "project_a.lance", data_dir=data_dir, allowed_roots=None)


def test_allowed_roots_limit_exports_too(tmp_path: Path) -> None:
    roots = (tmp_path / "allowed",)
    assert output(tmp_path / "allowed" / "export", tmp_path / "data", roots) == tmp_path / "allowed" / "export"
    with pytest.raises(InvalidArgument) as refused:
        output(tmp_path / "elsewhere", tmp_path / "data", roots)
    assert refused.value.code == "outside_allowed_roots"
    assert output(tmp_path / "data" / "projects" / "web" / "exports" / "mine", tmp_path / "data", roots)


async def test_a_path_that_has_no_form_in_json_is_refused_before_anything_is_written(
    manager: PEFTManager, tmp_path: Path
) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        code, base, adapter = filled(odd / "code"), write_model(odd / "base"), write_adapter(odd / "adapter")
    except OSError:
        pytest.skip("this file system has names in UTF-8 only")
    (tmp_path / "link").symlink_to(odd / "adapter")
    good = filled(tmp_path / "code")
    config = {"base_model": str(write_model(tmp_path / "base")), "allow_little_data": True}
    for ask in (
        lambda: manager.train_adapter("web", str(code), config),
        lambda: manager.train_adapter("web", str(good), {**config, "base_model": str(base)}),
        lambda: manager.train_adapter("web", str(good), {**config, "continue_from": str(adapter)}),
        lambda: manager.verify_adapter_compatibility(str(adapter)),
        lambda: manager.verify_adapter_compatibility(str(tmp_path / "link")),
        lambda: manager.inspect_training_data(str(code), config),
        lambda: manager.propose_study_plan("web", str(code)),
    ):
        with pytest.raises(InvalidArgument, match="is not UTF-8") as caught:
            await ask()
        assert caught.value.code == "not_utf8"
    assert not manager.settings.data_dir.exists()
