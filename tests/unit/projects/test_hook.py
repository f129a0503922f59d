"""The post-commit hook, with real git: what is added to which file, and that the hook's own lines still run."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from peft_core.errors import InvalidArgument
from peft_core.projects import hook
from peft_core.projects.hook import HookChange, plan_hook, plan_removal, schedule_lines

IDENTITY = {
    "GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b",
    "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull,
}  # fmt: skip
SETTINGS = {"CODEBASE_GARDENER_DATA_DIR": "/data of mine", "OTHER": "x"}


def git(root: Path, *arguments: str) -> str:
    ended = subprocess.run(
        ["git", "-C", str(root), *arguments], env={**os.environ, **IDENTITY}, capture_output=True, text=True, check=True
    )
    return ended.stdout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "web"
    root.mkdir()
    git(root, "init", "-q")
    return root


@pytest.fixture
def called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that receives the arguments and the data directory of each call by the hook."""
    script, calls = tmp_path / "peft mcp", tmp_path / "calls"
    os.mkfifo(calls)
    script.write_text(f'#!/bin/sh\necho "$CODEBASE_GARDENER_DATA_DIR: $*" > "{calls}"\n')
    script.chmod(0o755)
    monkeypatch.setattr(hook, "_program", lambda: [str(script)])
    return calls


def install(root: Path, project_id: str = "web") -> HookChange:
    change = plan_hook(str(root), project_id, SETTINGS)
    change.apply()
    return change


def existing(root: Path, text: str, mode: int = 0o755) -> Path:
    path = root / ".git" / "hooks" / "post-commit"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_commit_calls_the_command_with_the_data_directory_of_the_installation(repository: Path, called: Path) -> None:
    change = install(repository)
    assert change.path == repository / ".git" / "hooks" / "post-commit"
    assert not change.is_shared
    git(repository, "commit", "-q", "--allow-empty", "-m", "first")
    assert called.read_text() == "/data of mine: refresh web --if-due\n"


def test_lines_that_were_there_run_as_before_even_if_they_end_the_hook(repository: Path, called: Path) -> None:
    path = existing(repository, '#!/usr/bin/env bash\nset -euo pipefail\necho "mine $?" > mine\nexit 0\n')
    install(repository)
    git(repository, "commit", "-q", "--allow-empty", "-m", "first")
    assert called.read_text() == "/data of mine: refresh web --if-due\n"
    assert (repository / "mine").read_text() == "mine 0\n"
    assert path.read_text().splitlines()[0] == "#!/usr/bin/env bash"
    assert stat.S_IMODE(path.stat().st_mode) == 0o755


def test_a_second_installation_changes_nothing_and_another_project_is_added(repository: Path) -> None:
    install(repository)
    assert plan_hook(str(repository), "web", SETTINGS).is_nothing
    both = install(repository, "web-docs")
    assert both.after is not None
    assert (both.after.count(b"refresh web --if-due"), both.after.count(b"refresh web-docs --if-due")) == (1, 1)
    moved = plan_hook(str(repository), "web", {"CODEBASE_GARDENER_DATA_DIR": "/elsewhere"})
    assert moved.after is not None
    assert (moved.after.count(b"/elsewhere"), moved.after.count(b"/data of mine")) == (1, 1)


@pytest.mark.parametrize("text", ["#!/bin/sh\necho mine\n", "echo mine", "#!/bin/sh", "", "#!/bin/sh\n\n\n"])
def test_a_removal_leaves_what_was_there_before(repository: Path, text: str) -> None:
    path = existing(repository, text)
    install(repository)
    install(repository, "other")
    for project_id in ("web", "other"):
        plan_removal(str(repository), project_id).apply()
    remaining = path.read_text() if path.exists() else ""
    assert remaining.strip() == text.strip() or (not path.exists() and text.strip() == "#!/bin/sh")
    assert plan_removal(str(repository), "web").is_nothing


def test_a_hook_of_ours_alone_is_deleted_with_its_lines(repository: Path) -> None:
    path = install(repository).path
    plan_removal(str(repository), "web").apply()
    assert not path.exists()


@pytest.mark.parametrize(
    ("text", "mode", "problem"),
    [
        ("#!/usr/bin/env python3\nprint()\n", 0o755, "not a shell script"),
        ("#!/bin/sh\necho off\n", 0o644, "not executable"),
        ("#!/bin/sh\n# >>> peft-mcp web >>>\necho changed\necho by hand\n", 0o755, "changed by hand"),
    ],
)
def test_a_hook_that_cannot_be_extended_is_left_alone_and_the_line_is_given(
    repository: Path, text: str, mode: int, problem: str
) -> None:
    path = existing(repository, text, mode)
    with pytest.raises(InvalidArgument, match=problem) as caught:
        plan_hook(str(repository), "web", SETTINGS)
    assert "refresh web --if-due" in str(caught.value)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == (text, mode)


def test_a_linked_hook_of_another_tool_is_not_replaced(repository: Path, tmp_path: Path) -> None:
    target = tmp_path / "managed"
    target.write_text("#!/bin/sh\n")
    path = repository / ".git" / "hooks" / "post-commit"
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target)
    with pytest.raises(InvalidArgument, match="symbolic link"):
        plan_hook(str(repository), "web", SETTINGS)
    assert path.is_symlink()


def test_the_directory_that_core_hookspath_names_is_used(repository: Path, called: Path) -> None:
    """Also for a source that is a directory inside the repository."""
    git(repository, "config", "core.hooksPath", ".githooks")
    source = repository / "src"
    source.mkdir()
    change = install(source)
    assert change.path == repository / ".githooks" / "post-commit"
    git(repository, "commit", "-q", "--allow-empty", "-m", "first")
    assert called.read_text().endswith("refresh web --if-due\n")


def test_a_hook_outside_of_the_repository_is_said_to_be_shared(repository: Path, tmp_path: Path) -> None:
    git(repository, "config", "core.hooksPath", str(tmp_path / "hooks-of-all"))
    change = plan_hook(str(repository), "web", SETTINGS)
    assert change.path == tmp_path / "hooks-of-all" / "post-commit"
    assert change.is_shared


def test_a_linked_work_tree_uses_the_hooks_of_its_repository(repository: Path, tmp_path: Path) -> None:
    git(repository, "commit", "-q", "--allow-empty", "-m", "first")
    git(repository, "worktree", "add", "-q", str(tmp_path / "linked"))
    change = plan_hook(str(tmp_path / "linked"), "web", SETTINGS)
    assert change.path == repository / ".git" / "hooks" / "post-commit"
    assert not change.is_shared


@pytest.mark.parametrize("place", ["plain", "missing", "file.jsonl", "bare"])
def test_a_source_without_a_work_tree_is_refused_with_the_other_ways(tmp_path: Path, place: str) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "file.jsonl").touch()
    git(tmp_path, "init", "-q", "--bare", "bare")
    with pytest.raises(InvalidArgument, match=r"git repository.*cron or launchd"):
        plan_hook(str(tmp_path / place), "web", SETTINGS)


def test_a_relative_data_directory_stays_the_same_in_the_directory_of_the_hook(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    after = plan_hook(str(repository), "web", {"CODEBASE_GARDENER_DATA_DIR": "data"}).after
    assert after is not None
    assert f"CODEBASE_GARDENER_DATA_DIR={tmp_path}/data ".encode() in after
    assert "CODEBASE_GARDENER_DATA_DIR='~/data'" in schedule_lines({"CODEBASE_GARDENER_DATA_DIR": "~/data"})


def test_a_percent_sign_is_no_line_break_for_cron() -> None:
    cron = schedule_lines({"CODEBASE_GARDENER_DATA_DIR": "/a%20b"}).splitlines()[1]
    assert r"CODEBASE_GARDENER_DATA_DIR=/a\%20b" in cron


def test_the_lines_for_cron_and_launchd_have_the_data_directory_and_the_command() -> None:
    lines = schedule_lines({"CODEBASE_GARDENER_DATA_DIR": "/a & b"})
    assert "CODEBASE_GARDENER_DATA_DIR='/a & b'" in lines
    assert "<string>/a &amp; b</string>" in lines
    assert lines.count("refresh") >= 2
    assert "17 * * * *" in lines
