"""An export appears complete or not at all, and replaces nothing but an earlier export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_core.errors import InvalidArgument, StorageError
from peft_core.export import output
from peft_core.export.output import default_output, require_free, require_output, staged
from peft_core.export.service import _failure
from peft_core.paths import DataPaths


def manifest(*names: str) -> str:
    files = [{"path": name, "bytes": 3, "sha256": "0"} for name in names]
    return json.dumps({"to": "merged", "format": "f16", "adapter_id": "a", "files": files, "created_at": "today"})


def write(directory: Path, token: str = "a", *, overwrite: bool = False, content: str = "new") -> None:  # noqa: S107
    with staged(directory, token, overwrite=overwrite) as staging:
        (staging / "file").write_text(content)
        (staging / "export.json").write_text(manifest("file"))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_an_export_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "new" / "export"
    with staged(target, "a", overwrite=False) as staging:
        (staging / "file").write_text("half")
        assert not target.exists()
        assert staging.name.startswith(".")
    assert (target / "file").read_text() == "half"
    assert names(target.parent) == ["export"]


def test_a_failed_export_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "export", "a", overwrite=False) as staging:
            (staging / "file").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert names(tmp_path) == []


def test_a_failed_export_leaves_the_earlier_one(tmp_path: Path) -> None:
    write(tmp_path / "export", content="old")
    with pytest.raises(RuntimeError), staged(tmp_path / "export", "b", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "export" / "file").read_text() == "old"


def test_an_earlier_export_is_replaced_only_if_asked_for(tmp_path: Path) -> None:
    write(tmp_path / "export", content="old")
    with pytest.raises(InvalidArgument, match="overwrite=true"):
        write(tmp_path / "export")
    write(tmp_path / "export", overwrite=True)
    assert (tmp_path / "export" / "file").read_text() == "new"
    assert names(tmp_path) == ["export"]


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_is_no_export_is_never_replaced(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("mine", "file", "link", "dangling"):
        with pytest.raises(InvalidArgument, match="never overwritten"):
            require_free(tmp_path / name, overwrite=overwrite)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("text", ["{}", "", "[]", '{"name": "mine", "files": []}', "[" * 100_000])
def test_a_file_called_export_json_does_not_make_an_export(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "export.json").write_text(text)
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(InvalidArgument, match="something that is no export is already there") as refused:
        write(tmp_path / "mine", overwrite=True)
    assert refused.value.code == "export_exists"
    assert names(tmp_path) == ["mine"]
    assert names(tmp_path / "mine") == ["export.json", "thesis.txt"]


def test_files_that_a_user_added_to_an_export_are_not_lost(tmp_path: Path) -> None:
    write(tmp_path / "export", content="old")
    (tmp_path / "export" / "checkpoints").mkdir()
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / "export" / name).write_text("mine")
    with pytest.raises(InvalidArgument, match=r"with a\.txt, b\.txt, c\.txt and 2 more beside it") as refused:
        write(tmp_path / "export", overwrite=True)
    assert refused.value.code == "export_exists"
    assert len(names(tmp_path / "export")) == 7
    assert names(tmp_path) == ["export"]


def test_a_file_that_a_user_adds_while_the_export_is_replaced_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "export", content="old")
    publish = output._publish

    def add_first(staging: Path, directory: Path, replaced: Path) -> None:
        (directory / "thesis.txt").write_text("years")
        publish(staging, directory, replaced)

    monkeypatch.setattr(output, "_publish", add_first)
    write(tmp_path / "export", overwrite=True)
    assert (tmp_path / "export" / "file").read_text() == "new"
    assert names(tmp_path / ".export.replaced") == ["thesis.txt"]


def test_a_manifest_names_no_file_outside_its_directory(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "export.json").write_text(manifest("../thesis.txt", str(tmp_path / "thesis.txt")))
    write(tmp_path / "export", overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize("is_there", [True, False])
@pytest.mark.parametrize("content", ["thesis.txt", "export.json"])
def test_a_directory_with_the_name_of_a_replaced_export_is_left_alone(
    tmp_path: Path, is_there: bool, content: str
) -> None:
    if is_there:
        write(tmp_path / "export", content="old")
    (tmp_path / ".export.replaced").mkdir()
    (tmp_path / ".export.replaced" / content).write_text("years")
    with pytest.raises(InvalidArgument, match="holds something else, which is left alone") as refused:
        write(tmp_path / "export", overwrite=True)
    assert refused.value.code == "export_exists"
    assert (tmp_path / ".export.replaced" / content).read_text() == "years"
    assert names(tmp_path) == [".export.replaced", *["export"] * is_there]


def test_what_is_only_named_like_a_half_written_export_is_left_alone(tmp_path: Path) -> None:
    for name in (".e[x].exporting-notes", ".ex.exporting-deadbeef", ".e[x].exporting-deadbeef"):
        (tmp_path / name).mkdir()
    write(tmp_path / "e[x]")
    assert names(tmp_path) == [".e[x].exporting-notes", ".ex.exporting-deadbeef", "e[x]"]


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    write(tmp_path / "export")
    assert names(tmp_path / "export") == ["export.json", "file"]


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".export.exporting-deadbeef").mkdir()
    (tmp_path / ".export.exporting-deadbeef" / "file").write_text("half")
    write(tmp_path / "export")
    assert names(tmp_path) == ["export"]


def test_an_earlier_export_returns_if_the_one_that_replaced_it_was_killed_between_two_renames(tmp_path: Path) -> None:
    write(tmp_path / "export", content="old")
    (tmp_path / "export").rename(tmp_path / ".export.replaced")
    with pytest.raises(InvalidArgument, match="already there"):
        write(tmp_path / "export")
    assert (tmp_path / "export" / "file").read_text() == "old"


def test_something_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def write_while_another_program_writes() -> None:
        with staged(tmp_path / "export", "a", overwrite=False):
            (tmp_path / "export").mkdir()
            (tmp_path / "export" / "other").write_text("x")

    with pytest.raises(InvalidArgument, match="already there"):
        write_while_another_program_writes()
    assert names(tmp_path) == ["export"]


def test_an_export_that_died_is_complete_or_absent_and_says_which(tmp_path: Path) -> None:
    assert "Nothing was written." in _failure(None, -9, "", tmp_path / "export").message
    write(tmp_path / "export")
    message = _failure(None, -9, "", tmp_path / "export").message
    assert "Nothing was written" not in message
    assert f"the one in {tmp_path / 'export'} is complete, and is this one or an earlier one." in message


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot be written") as refused:
        write(tmp_path / "file" / "export")
    assert refused.value.code == "output_unwritable"


@pytest.mark.parametrize("path", ["relative/export", "", "/", "/x/\0y", "~no-such-user/x"])
def test_a_path_that_is_not_absolute_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidArgument, match="must be the absolute path of a directory"):
        require_output(path, DataPaths(tmp_path), None)


def test_a_file_name_is_refused_with_the_directory_to_give(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="must be a directory") as refused:
        require_output(str(tmp_path / "a.gguf"), DataPaths(tmp_path / "data"), None)
    assert refused.value.suggestions == (f"Give {tmp_path / 'a'}",)


def test_the_default_is_in_the_project_or_among_the_others(tmp_path: Path) -> None:
    paths = DataPaths(tmp_path)
    own = paths.adapter("web", "adapter-01")
    assert default_output(paths, own, "merged", "f16") == paths.exports("web") / "adapter-01" / "merged-f16"
    assert default_output(paths, own, "hub", "as trained") == paths.exports("web") / "adapter-01" / "hub"
    foreign = default_output(paths, tmp_path / "somewhere" / "adapter", "vllm", "f32")
    other = default_output(paths, tmp_path / "elsewhere" / "adapter", "vllm", "f32")
    assert foreign.parent.parent == other.parent.parent == paths.exports("other")
    assert foreign.parent.name.startswith("adapter-")
    assert foreign != other


def test_a_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgument, match="file is not a directory"):
        require_free(tmp_path / "file" / "x" / "y", overwrite=True)
    require_free(tmp_path / "new" / "x", overwrite=False)
