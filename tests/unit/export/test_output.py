"""An export appears complete or not at all, and replaces nothing but an earlier export."""

from __future__ import annotations

from pathlib import Path

import pytest

from peft_core.errors import InvalidArgument, StorageError
from peft_core.export.output import default_output, require_free, require_output, staged
from peft_core.paths import DataPaths


def write(directory: Path, token: str = "a", *, overwrite: bool = False, content: str = "new") -> None:  # noqa: S107
    with staged(directory, token, overwrite=overwrite) as staging:
        (staging / "file").write_text(content)
        (staging / "export.json").write_text("{}")


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


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    write(tmp_path / "export")
    assert names(tmp_path / "export") == ["export.json", "file"]


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path) -> None:
    (tmp_path / ".export.exporting-dead").mkdir()
    (tmp_path / ".export.exporting-dead" / "file").write_text("half")
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
