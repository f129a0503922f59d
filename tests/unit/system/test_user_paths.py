"""Paths as people and clients write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.system.user_paths import absolute_path, path_advice, user_path


@pytest.mark.parametrize(
    "form",
    [
        "{}", " {} ", "{}\n", '"{}"', "'{}'", "`{}`", " '{}' ", "file://{}", "file://localhost{}", "FILE://{}", "'file://{}'",
    ],
)  # fmt: skip
def test_quotes_white_space_and_uris_are_removed(form: str, tmp_path: Path) -> None:
    assert user_path(form.format(tmp_path)) == tmp_path


def test_a_uri_is_decoded(tmp_path: Path) -> None:
    assert user_path(f"file://{tmp_path}/my%20code") == tmp_path / "my code"


@pytest.mark.parametrize("name", ["code ", "'code'", '"', "file:", "a%20b"])
def test_a_name_that_exists_is_taken_literally(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    assert user_path(f"{tmp_path}/{name}") == tmp_path / name


@pytest.mark.parametrize("form", ["~/code", "$HOME/code", "${HOME}/code"])
def test_the_home_directory_is_found(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/Users/me")
    assert user_path(form) == Path("/Users/me/code")


def test_other_variables_are_no_part_of_the_home_directory() -> None:
    assert user_path("$HOMEPATH/code") == Path("$HOMEPATH/code")


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (r"C:\Users\me\repo", "/mnt/c/Users/me/repo"),
        ("D:/code/repo", "/mnt/d/code/repo"),
        ("file:///C:/Users/me/my%20repo", "/mnt/c/Users/me/my repo"),
        (r"\\wsl$\Ubuntu\srv\me\repo", "give /srv/me/repo"),
        (r"\\wsl.localhost\Debian\srv\repo", "give /srv/repo"),
        ("https://github.com/a/b.git", "`git clone https://github.com/a/b.git`"),
        ("git@github.com:a/b.git", "`git clone git@github.com:a/b.git`"),
        ("github.com/a/b", "git clone"),
        ("https://example.org/data.jsonl", "download it"),
        ("tatsu-lab/alpaca", "`hf download --repo-type dataset tatsu-lab/alpaca`"),
        ("$CODE/repo", "instead of $CODE"),
        ("%USERPROFILE%\\repo", "instead of %USERPROFILE%"),
        ("src", "absolute path"),
    ],
)
def test_what_is_no_path_here_is_answered_with_what_to_do(given: str, advice: str) -> None:
    assert advice in str(path_advice(given))


@pytest.mark.parametrize("given", ["/code/web", "~/code", "./code", "$HOME/code"])
def test_an_ordinary_path_needs_no_advice(given: str) -> None:
    assert path_advice(given) is None


def test_an_absolute_path_leads_there_without_the_directories_that_it_only_passes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("here", "code", "far/away"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/away")
    monkeypatch.chdir(tmp_path / "here")
    assert absolute_path(Path("../code")) == tmp_path / "code"
    assert absolute_path(tmp_path / "link" / ".." / "away") == tmp_path / "far" / "away"
    assert absolute_path(tmp_path / "link") == tmp_path / "link"  # its target may change
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert absolute_path(tmp_path / "code" / ".." / "loop").name == "loop"  # reading it says what is wrong
