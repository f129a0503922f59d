"""Tests of what is read of directories as people have them: which files, from which of several sources, and what is counted."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from peft_core.data.dataset import PreparedDataset, read_examples
from peft_core.data.notebook import Notebook, parse_notebook
from peft_core.data.prepare import prepare
from peft_core.data.read_text import decode
from peft_core.data.selection import Selection
from peft_core.data.sources import unique_names
from peft_core.data.summarise import summarise_source
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.data.walk import walk
from peft_core.errors import DataError, InvalidArgument
from peft_core.schemas.dataset import DatasetSpec, Example, SourceSummary, describe_by_extension
from peft_core.schemas.training import TrainingConfig
from tests.factories import make_dataset_spec

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:{digit}\nsize {size}\n"
COMMON = ["learning", "from", "code", "takes", "many", "different", "names", "and", "values"]


def python(name: str, functions: int = 8) -> str:
    return "\n\n".join(
        f"def {name}_{COMMON[n % len(COMMON)]}_{n}(total, {name}):\n    for {name}_{n} in range({n} + total):\n"
        f"        total += {name}_{n} * {n} - len('{name}{COMMON[-n % len(COMMON)]}')\n    return total\n"
        for n in range(functions)
    )


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def modules(root: Path, count: int = 8, suffix: str = "py") -> Path:
    return write(root, {f"src/module_{number}.{suffix}": python(f"work{number}") for number in range(count)})


def git(root: Path, *arguments: str) -> str:
    options = (
        "-c",
        "user.name=a",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "protocol.file.allow=always",
    )
    return subprocess.run(["git", *options, "-C", root, *arguments], check=True, capture_output=True, text=True).stdout


def commit(root: Path) -> Path:
    git(root, "init")
    git(root, "add", "--all")
    git(root, "commit", "-m", "one")
    return root


def names(root: Path, selection: Selection | None = None) -> set[str]:
    return {file.name for file in walk(root, selection).files}


def build(source: Path, directory: Path, **changes: Any) -> tuple[PreparedDataset, list[Example]]:
    spec: DatasetSpec = make_dataset_spec(source, **changes)
    dataset = prepare(spec, directory=directory, token_counter=EstimatedTokenCounter(), report=lambda _: None)
    return dataset, read_examples(directory / "train.jsonl") + read_examples(directory / "held_out.jsonl")


def notebook(*cells: str, **metadata: Any) -> str:
    code = [{"cell_type": "code", "metadata": {}, "outputs": [{"text": "an output"}], "source": cell} for cell in cells]
    prose = {"cell_type": "markdown", "metadata": {}, "source": "# Some prose"}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": metadata, "cells": [prose, *code]})


# Whole directories as people have them: what the summary and the data set say.


def lfs_pointers(root: Path) -> None:
    modules(root)
    for number in range(20):
        pointer = POINTER.format(digit=f"{number:064d}", size=number + 1_000)
        write(root, {f"sql/{number}.sql": pointer, f"web/{number}.js": pointer})


def notebooks(root: Path) -> None:
    for number in range(12):
        cells = ["%matplotlib inline\n!pip install numpy\nimport numpy", *python(f"cell{number}").split("\n\n\n")]
        write(root, {f"{number}.ipynb": notebook(*cells, kernelspec={"name": "python3", "language": "python"})})
    write(root, {"README.md": "# Notebooks\n\nSome prose.\n"})


def unknown_language(root: Path) -> None:
    write(root, {f"contracts/{n}.zork": python(f"contract{n}") for n in range(30)})
    write(
        root,
        {
            f"test/{n}.js": "".join(f"it('{n}{m}', () => {{ expect(call{m}({n})) }});\n" for m in range(9))
            for n in range(10)
        },
    )
    write(root, {"package.json": "{}"})


def scripts_without_extension(root: Path) -> None:
    write(root, {f"bin/tool{n}": "#!/usr/bin/env -S python3 -u\n" + python(f"tool{n}") for n in range(8)})


@pytest.mark.parametrize(
    ("make", "languages", "left_out", "learned"),
    [
        pytest.param(
            lfs_pointers, {"python": 8}, {"lfs_pointer": {".js": 20, ".sql": 20}}, {".py"}, id="10-lfs-pointers"
        ),
        pytest.param(
            notebooks, {"notebook": 12, "markdown": 1}, {"no_code": {".md": 1}}, {".ipynb"}, id="11-notebooks"
        ),
        pytest.param(
            unknown_language,
            {"zork": 30, "javascript": 10},
            {"no_code": {".json": 1}},
            {".zork", ".js"},
            id="13-unknown-languages",
        ),
        pytest.param(scripts_without_extension, {"python": 8}, {}, {""}, id="scripts-without-extension"),
    ],
)
def test_a_directory_as_people_have_it_loses_nothing_in_silence(
    tmp_path: Path,
    make: Callable[[Path], None],
    languages: dict[str, int],
    left_out: dict[str, dict[str, int]],
    learned: set[str],
) -> None:
    root = tmp_path / "r"
    make(root)
    summary = summarise_source(str(root))
    assert summary.languages == languages
    dataset, examples = build(root, tmp_path / "out", max_length=512)
    assert dataset.summary.left_out_by_extension == left_out
    assert {Path(example.path).suffix for example in examples} == learned
    assert not any("git-lfs" in example.text or "an output" in example.text for example in examples)


def test_lfs_pointers_are_named_with_the_command_that_fetches_them(tmp_path: Path) -> None:
    lfs_pointers(tmp_path)
    summary = summarise_source(str(tmp_path))
    assert summary.left_out == {"lfs_pointer": 40}
    assert "git lfs pull" in summary.advice[0]
    for path in tmp_path.glob("src/*.py"):
        path.unlink()
    with pytest.raises(DataError, match=r"40 Git LFS|git lfs pull") as caught:
        summarise_source(str(tmp_path))
    assert "git lfs pull" in caught.value.suggestions[0]
    assert not any("further up" in suggestion for suggestion in caught.value.suggestions)


def test_12_submodules_are_named_and_can_be_trained_on_together(tmp_path: Path) -> None:
    parts = [
        commit(write(tmp_path / f"part{n}", {f"src/module_{k}.py": python(f"part{n}work{k}") for k in range(8)}))
        for n in range(3)
    ]
    root = commit(write(tmp_path / "root", {"README.md": "# Parts\n"}))
    for part in parts:
        git(root, "submodule", "add", str(part), f"libs/{part.name}")
    with pytest.raises(DataError) as caught:
        summarise_source(str(root))
    assert caught.value.details["left_out"]["submodule"] == 3
    assert "libs/part0, libs/part1, libs/part2" in caught.value.suggestions[0]
    assert "config.more_sources" in caught.value.suggestions[0]
    assert not any("further up" in suggestion for suggestion in caught.value.suggestions)
    libs = [str(root / "libs" / part.name) for part in parts]
    summary = summarise_source(libs[0], also=libs[1:])
    assert (summary.files, summary.languages) == (24, {"python": 24})
    git(root, "submodule", "deinit", "--force", "libs/part0")
    with pytest.raises(DataError, match=r"git submodule update --init"):
        summarise_source(libs[0])


# Notebooks.


def code_of(text: str) -> dict[str, str]:
    found = parse_notebook(text)
    assert isinstance(found, Notebook)
    return {part.language.name: "".join(part.lines) for part in found.parts}


@pytest.mark.parametrize(
    ("metadata", "language"),
    [
        ({}, "python"),
        ({"kernelspec": {"name": "ir"}}, "r"),
        ({"kernelspec": {"name": "julia-1.10", "language": "julia"}}, "julia"),
        ({"language_info": {"name": "scala"}}, "scala"),
        ({"kernelspec": {"name": ".net-csharp", "language": "C#"}}, "csharp"),
        ({"kernelspec": {"name": "xcpp17", "language": "C++17"}}, "cpp"),
        ({"kernelspec": {"name": "conda-env-mine-py"}}, "python"),
        ({"kernelspec": 3, "language_info": []}, "python"),
    ],
)
def test_the_code_of_a_notebook_is_in_the_language_of_its_kernel(metadata: dict[str, Any], language: str) -> None:
    assert list(code_of(notebook("x = 1\n", **metadata))) == [language]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("%matplotlib inline\nx = 1", {"python": "x = 1\n"}),
        ("!pip install \\\n  numpy\nx = 1", {"python": "x = 1\n"}),
        ("if x:\n    !ls\nelse:\n    y = 1", {"python": "if x:\n    pass\nelse:\n    y = 1\n"}),
        ("%time y = f(x)", {"python": "y = f(x)\n"}),
        ("a, b = %time f(x)", {"python": "a, b = f(x)\n"}),
        ("print('took %time s')", {"python": "print('took %time s')\n"}),
        ("files = !ls\ndf.head?\nx != 1", {"python": "x != 1\n"}),
        ("%%time\ny = f(x)", {"python": "y = f(x)\n"}),
        ("%%bash\nls -l", {"shell": "ls -l\n"}),
        ("%%script ruby\nputs 1", {"ruby": "puts 1\n"}),
        ("%%writefile a.go\npackage a", {"go": "package a\n"}),
        ("%sql\nselect 1", {"sql": "select 1\n"}),
        ("text = '''\n%s: %d\n'''", {"python": "text = '''\n%s: %d\n'''\n"}),
        ("total = (a\n  % b)", {"python": "total = (a\n  % b)\n"}),
    ],
)
def test_commands_of_a_notebook_are_left_out_and_other_languages_are_kept(cell: str, expected: dict[str, str]) -> None:
    assert code_of(notebook(cell)) == expected


@pytest.mark.parametrize(
    ("language", "commands", "code"),
    [
        ("julia", "?sin\n;ls\n]add Plots\n", "if !isempty(x)\n    y = !x\n    !y && z\nend\n"),
        ("C#", "#!time\n", "var ok = a\n    %bar && !list.Any();\n!ok.Equals(b);\n"),
        ("scala", "%profile\n", "val ok = !done\n  !ok\n"),
    ],
)
def test_an_operator_that_is_a_command_in_python_is_code_elsewhere(language: str, commands: str, code: str) -> None:
    found = code_of(notebook(f"{commands}{code}", kernelspec={"language": language}))
    assert list(found.values()) == [code]


def test_commands_and_cells_of_unknown_languages_are_counted() -> None:
    found = parse_notebook(notebook("%matplotlib inline\nx = 1", "%%quantum_thing\nH 0\nCNOT 0 1", "%%bash\nls"))
    assert isinstance(found, Notebook)
    assert found.left_out == {"notebook_command": 5}


def test_old_and_polyglot_notebooks_are_read() -> None:
    cells = [{"cell_type": "code", "language": "python", "input": ["x = 1\n", "y = 2"], "outputs": []}]
    assert code_of(json.dumps({"nbformat": 3, "worksheets": [{"cells": cells}]})) == {"python": "x = 1\ny = 2\n"}
    polyglot = {"cell_type": "code", "source": "let x = 1", "metadata": {"polyglot_notebook": {"kernelName": "fsharp"}}}
    assert code_of(json.dumps({"nbformat": 4, "cells": [polyglot]})) == {"fsharp": "let x = 1\n"}


def test_lines_of_a_notebook_are_numbered_through_its_code_cells(tmp_path: Path) -> None:
    cells = ["%matplotlib inline\nimport numpy", *(python(f"cell{n}", 1) for n in range(12))]
    write(
        tmp_path / "r", {"a.ipynb": notebook(*cells), "b.ipynb": notebook(*(python(f"other{n}", 1) for n in range(9)))}
    )
    _, examples = build(tmp_path / "r", tmp_path / "out", max_length=128)
    lines = "\n".join(cell.strip("\n") for cell in cells).split("\n")
    for example in examples:
        if example.path == "a.ipynb":
            first = example.segments[-1].text.split("\n")[0]
            assert lines[example.start_line - 1] == first


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "{}", '{"cells": 3}', '{"cells": [3]}', '{"cells": [{"cell_type": "code", "source": [3]}]}',
     "[" * 100_000, '{"worksheets": 3}', '{"worksheets": [{}]}'],
)  # fmt: skip
def test_a_broken_notebook_is_refused_by_its_reason(text: str) -> None:
    assert parse_notebook(text) == "broken_notebook"


NOTEBOOK_KEYS = ["cells", "worksheets", "cell_type", "source", "input", "metadata", "kernelspec", "language", "name"]


def test_a_notebook_of_too_many_or_too_large_cells_is_too_large() -> None:
    assert parse_notebook(notebook(*["x = 1"] * 20_000)) == "too_large"
    assert parse_notebook(notebook(*["x = 1\n" * 100_000] * 2)) == "too_large"
    bomb = json.dumps({"cells": [], "outputs": "LISTS"}).replace('"LISTS"', f"[{','.join(['[]'] * 1_000_000)}]")
    assert parse_notebook(bomb) == "too_large", "lists of a few bytes take much more in memory"


@given(
    st.recursive(
        st.none()
        | st.integers()
        | st.text(max_size=20)
        | st.sampled_from(["code", "%%bash", "%time x", "!ls", "\ud800"]),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "cells",
                        "worksheets",
                        "cell_type",
                        "source",
                        "input",
                        "metadata",
                        "kernelspec",
                        "language",
                        "name",
                    ]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=30,
    )
)
def test_any_json_is_a_notebook_or_is_refused(value: Any) -> None:
    found = parse_notebook(json.dumps(value))
    if isinstance(found, Notebook):
        assert all(len(part.lines) == len(part.numbers) for part in found.parts)
        "".join(line for part in found.parts for line in part.lines).encode()


def test_the_tokens_of_a_notebook_are_those_of_its_code_not_of_its_outputs(tmp_path: Path) -> None:
    size = 0
    for name in ("a", "b"):
        code = [python(f"{name}{n}", 2) for n in range(20)]
        size += sum(map(len, code))
        text = json.loads(notebook(*code))
        text["cells"][1]["outputs"] = [{"data": {"image/png": "A" * 500_000}}]
        write(tmp_path, {f"{name}.ipynb": json.dumps(text)})
    assert summarise_source(str(tmp_path)).estimated_tokens == pytest.approx(size / 3.3, rel=0.1)


def test_a_secret_in_a_notebook_is_blanked(tmp_path: Path) -> None:
    key = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
    cells = [python(f"cell{n}") for n in range(4)]
    for name in "abc":
        write(
            tmp_path / "r",
            {f"{name}.ipynb": notebook(f"TOKEN = '{key}'\nuse(TOKEN)", *(c.replace("cell", name) for c in cells))},
        )
    dataset, examples = build(tmp_path / "r", tmp_path / "out", max_length=512)
    assert dataset.summary.secrets_removed == 3
    assert not any(key in example.text for example in examples)


def test_the_code_of_r_markdown_is_read(tmp_path: Path) -> None:
    for n in range(8):
        chunks = "".join(
            f"Prose.\n\n```{{r part{n}{m}, echo=FALSE}}\nx{n}{m} <- read({n}, {m})\n```\n\n" for m in range(3)
        )
        write(tmp_path / "r", {f"{n}.Rmd": f"# Title\n\n{chunks}"})
    _, examples = build(tmp_path / "r", tmp_path / "out")
    assert any("x00 <- read(0, 0)" in example.text for example in examples)
    assert not any("Prose" in example.text for example in examples)


# Encodings.

ENGLISH = "def f(x):\n    # größer\n    return x + 1\n"


@pytest.mark.parametrize(
    "encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-16", "utf-32", "utf-8-sig"]
)
def test_text_in_utf_16_and_utf_32_is_read_with_and_without_a_mark(encoding: str) -> None:
    assert decode(ENGLISH.encode(encoding)) == ENGLISH


@pytest.mark.parametrize(
    "content", [b"\0" * 64, bytes(range(256)), b"x = 1\n\0y = 2\n", b"\x00\x01" * 40, b"\x7fELF\x02\x01" + b"\0" * 40]
)
def test_bytes_with_zeros_that_are_no_text_stay_binary(content: bytes) -> None:
    assert decode(content) == "binary"


@given(
    st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126), min_size=2),
    st.sampled_from(["utf-16-le", "utf-32-be"]),
)
def test_ascii_in_wide_encodings_is_read_as_it_was_written(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)) == text


def test_a_few_western_bytes_in_a_text_in_utf_8_do_not_garble_the_rest_of_it() -> None:
    text = "# Grüße, 日本\ndef total(prices):\n    return sum(prices)\n"
    assert decode(text.encode() + "# José\n".encode("latin-1")) == f"{text}# José\n"


# Git.


def test_files_outside_of_a_sparse_checkout_are_named_as_such(tmp_path: Path) -> None:
    root = commit(modules(write(tmp_path, {"docs/a.py": python("a"), "docs/b.json": "{}"})))
    git(root, "sparse-checkout", "set", "src")
    summary = summarise_source(str(root))
    assert summary.left_out_by_extension["not_checked_out"] == {".json": 1, ".py": 1}
    assert "git sparse-checkout disable" in summary.advice[0]


def test_links_that_were_written_as_files_and_annexed_files_are_placeholders(tmp_path: Path) -> None:
    root = modules(tmp_path)
    (root / "link.py").symlink_to("src/module_0.py")
    (root / "annexed.py").symlink_to(".git/annex/objects/xx/yy/SHA256E-s9--00.py")
    commit(root)
    (root / "link.py").unlink()
    write(root, {"link.py": "src/module_0.py", "unlocked.py": f"/annex/objects/SHA256E-s99--{'0' * 64}.py\n"})
    assert walk(root).left_out == {"placeholder": 3}


def test_a_clone_without_its_files_is_refused_with_the_command_that_gets_them(tmp_path: Path) -> None:
    commit(modules(tmp_path / "r"))
    git(tmp_path, "clone", "--no-checkout", "r", "clone")
    with pytest.raises(DataError, match="git checkout HEAD"):
        summarise_source(str(tmp_path / "clone"))


def test_a_file_in_a_merge_conflict_is_not_learned(tmp_path: Path) -> None:
    root = commit(modules(tmp_path))
    git(root, "branch", "--move", "main")
    git(root, "branch", "other")
    for branch, text in (("other", "x = 1\n"), ("main", "y = 1\n")):
        git(root, "checkout", branch)
        write(root, {"src/module_0.py": text})
        git(root, "commit", "--all", "--message", text)
    with pytest.raises(subprocess.CalledProcessError):
        git(root, "merge", "other")
    tree = walk(root)
    assert tree.left_out == {"unmerged": 1}
    assert "src/module_0.py" not in {file.name for file in tree.files}


def test_a_repository_inside_another_is_named(tmp_path: Path) -> None:
    root = commit(modules(tmp_path))
    commit(modules(root / "inner"))
    tree = walk(root)
    assert tree.left_out == {"nested_repository": 1}
    assert "inner/" in tree.exclusions.advice[0]


def test_without_git_a_submodule_is_left_out_as_with_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = commit(modules(tmp_path))
    commit(modules(root / "inner"))
    with_git = names(root)
    monkeypatch.setenv("PATH", "")
    assert names(root) == with_git


def test_a_bare_repository_is_refused_with_what_to_do(tmp_path: Path) -> None:
    root = commit(modules(tmp_path / "r"))
    git(tmp_path, "clone", "--bare", "r", "bare")
    for directory in (tmp_path / "bare", root / ".git"):
        with pytest.raises(DataError, match="git clone") as caught:
            summarise_source(str(directory))
        assert caught.value.code == "git_directory"


# What is source text.


@pytest.mark.parametrize(
    ("text", "is_code"),
    [
        ("contract A {\n  uint x;\n  function f() public {\n    x = 1;\n  }\n}\n", True),
        ("module top(input clk);\n  always @(posedge clk) q <= d;\nendmodule\n", True),
        ("let rec f x =\n  match x with\n  | [] -> 0\n  | h :: t -> f t\n", True),
        ("Dear reader,\n\nthis is a letter about nothing, and it is long.\nIt has several lines.\nThey end.\n", False),
        ("1 2 3 4\n5 6 7 8\n9 10 11 12\n13 14 15 16\n", False),
        ("name: value\nother: [1, 2]\nthird: text\nfourth: 3\n", False),
        ("[section]\nkey = value\nother = 3\nlast = x\n", False),
        ('{"a": 1,\n "b": [1, 2],\n "c": {"d": 2}}\n', False),
        ("<?xml version='1.0'?>\n<a>\n<b>call(x);</b>\n</a>\n", False),
        ("2024-01-01 12:00:00 started(x) {\n2024-01-01 12:00:01 x = 1;\n2024-01-01 12:00:02 }\n", False),
    ],
)
def test_a_file_with_an_unknown_extension_is_read_if_it_looks_like_code(
    tmp_path: Path, text: str, is_code: bool
) -> None:
    write(tmp_path, {"a.zork": text})
    assert names(tmp_path) == ({"a.zork"} if is_code else set())


@pytest.mark.parametrize(
    ("name", "is_read"),
    [("config.h.in", True), ("settings.yaml.tmpl", False), ("Dockerfile.release", True), ("go.mod", False),
     ("libfoo.so.1", False),
     (".bashrc", True),
     (".gitignore", False), ("data.geojson", False), ("LICENSE", False), ("notes.txt", False)],
)  # fmt: skip
def test_a_name_tells_whether_a_file_is_source(tmp_path: Path, name: str, is_read: bool) -> None:
    write(tmp_path, {name: "int f(int x) {\n  return x;\n}\n"})
    assert names(tmp_path) == ({name} if is_read else set())


def test_what_is_left_out_is_described_by_extension_the_largest_group_first() -> None:
    counts = {"binary": {".png": 12}, "no_code": {".json": 30, ".yml": 2}}
    assert describe_by_extension(counts) == "30 .json, 2 .yml (no code); 12 .png (binary)"


# config.include and config.exclude.

EVERYTHING = {
    "src/a.py": python("a"), "src/b.py": python("b"), "tests/c.py": python("c"), "vendor/ours/d.py": python("d"),
    "vendor/theirs/e.py": python("e"), "gen/f_pb2.py": python("f"), "deploy/g.yaml": "a: 1\n", ".env": "A=1\n",
}  # fmt: skip


@pytest.mark.parametrize("by_git", [True, False], ids=["git", "no git"])
@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), {"src/a.py", "src/b.py", "tests/c.py"}),
        (("src/",), (), {"src/a.py", "src/b.py"}),
        (("*",), (), {"src/a.py", "src/b.py", "tests/c.py"}),
        (("*", "vendor/ours/"), (), {"src/a.py", "src/b.py", "tests/c.py", "vendor/ours/d.py"}),
        (("vendor/",), ("vendor/theirs/",), {"vendor/ours/d.py"}),
        (("*_pb2.py",), (), {"gen/f_pb2.py"}),
        (("*.py",), ("tests/", "b.py"), {"src/a.py"}),
        (("*.yaml", ".env"), (), {"deploy/g.yaml"}),
    ],
)
def test_include_and_exclude_select_files(
    tmp_path: Path, include: tuple[str, ...], exclude: tuple[str, ...], expected: set[str], *, by_git: bool
) -> None:
    write(tmp_path, EVERYTHING)
    if by_git:
        git(tmp_path, "init")
    selection = Selection(include, exclude)
    assert names(tmp_path, selection) == expected
    assert selection.unmatched == ()


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    modules(tmp_path)
    for selection in (Selection(include=("scr/",)), Selection(exclude=("legacy/",))):
        with pytest.raises(
            InvalidArgument, match=r"config\.(in|ex)clude = '(scr|legacy)/' cannot be used: it matches no file"
        ):
            summarise_source(str(tmp_path), selection=selection)


@pytest.mark.parametrize("pattern", ["", "!src", "#a", "../x", "./x", "a\\b", "*a*b*c*d*e", "a\nb", "x" * 300])
def test_a_pattern_that_is_not_understood_is_refused(pattern: str) -> None:
    with pytest.raises(ValidationError):
        TrainingConfig(include=[pattern])


def test_hand_written_code_in_a_vendored_directory_is_named(tmp_path: Path) -> None:
    modules(tmp_path)
    write(tmp_path, {"app/vendor/invoice.py": python("v"), "ui_main.h": "int x;\n"})
    commit(tmp_path)
    advice = " ".join(summarise_source(str(tmp_path)).advice)
    assert "app/vendor/invoice.py" in advice
    assert "ui_main.h" in advice
    assert "config.include" in advice


def test_the_selection_reaches_the_dataset(tmp_path: Path) -> None:
    root = modules(tmp_path / "r")
    write(root, {"legacy/old.py": python("old")})
    dataset, examples = build(root, tmp_path / "out", exclude=("legacy/",))
    assert dataset.summary.left_out_by_extension == {"excluded": {".py": 1}}
    assert not any(example.path.startswith("legacy") for example in examples)


# Several sources.


def several(summary: SourceSummary, **changes: Any) -> dict[str, Any]:
    return {"source_name": summary.name, "more_sources": summary.more_sources, **changes}


def test_several_repositories_and_records_become_one_dataset(tmp_path: Path) -> None:
    first, second = commit(modules(tmp_path / "one" / "app")), modules(tmp_path / "two" / "app")
    write(second, {f"lib/other_{n}.py": python(f"other{n}") for n in range(5)})
    lines = [json.dumps({"prompt": f"What is {n}?", "completion": f"The number {n} of this list."}) for n in range(20)]
    write(tmp_path, {"talk.jsonl": "\n".join(lines)})
    summary = summarise_source(str(first), also=[str(second), str(tmp_path / "talk.jsonl")])
    assert (summary.files, summary.examples, summary.name) == (8 + 13, 20, "one/app")
    assert [source.name for source in summary.more_sources] == ["two/app", "talk.jsonl"]
    dataset, examples = build(first, tmp_path / "out", **several(summary))
    starts = {example.path.rpartition("/src")[0] or example.path.partition("/l")[0] for example in examples}
    assert {"one/app", "two/app", "talk.jsonl"} <= starts | {example.path.partition("/")[0] for example in examples}
    assert dataset.summary.left_out["duplicate"] == 8 * 8, "files of both repositories are trained on once"
    assert [(each.name, each.commit) for each in dataset.repositories] == [
        ("one/app", git(first, "rev-parse", "HEAD").strip())
    ]
    held_out = {example.path for example in read_examples(tmp_path / "out" / "held_out.jsonl")}
    assert held_out.isdisjoint({example.path for example in read_examples(tmp_path / "out" / "train.jsonl")})


def test_a_few_records_are_enough_beside_a_repository_and_not_by_themselves(tmp_path: Path) -> None:
    code = modules(tmp_path / "app")
    write(tmp_path, {"a.jsonl": json.dumps({"prompt": "What is it?", "completion": "An app."})})
    write(tmp_path, {"b.jsonl": json.dumps({"prompt": "For whom?", "completion": "For people."})})
    summary = summarise_source(str(code), also=[str(tmp_path / "a.jsonl")])
    assert summary.examples == 1
    _, examples = build(code, tmp_path / "out", **several(summary))
    assert {"a.jsonl"} & {example.path.partition("/")[0] for example in examples}
    with pytest.raises(DataError, match=r"a\.jsonl gives 1 distinct example"):
        summarise_source(str(tmp_path / "a.jsonl"), also=[str(tmp_path / "b.jsonl")])


def test_the_files_changed_last_in_any_of_several_repositories_are_held_out(tmp_path: Path) -> None:
    first, second = commit(modules(tmp_path / "old", 6)), modules(tmp_path / "new", 0)
    write(second, {f"lib/other_{n}.py": python(f"other{n}") for n in range(2)})
    git(second, "init")
    git(second, "add", ".")
    git(second, "commit", "-m", "two", "--date", "2099-01-01T00:00:00")
    later = {**os.environ, "GIT_COMMITTER_DATE": "2099-01-01T00:00:00"}
    amend = ("git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", second, "commit", "--amend", "--no-edit")
    subprocess.run(amend, check=True, capture_output=True, env=later)
    summary = summarise_source(str(first), also=[str(second)])
    build(first, tmp_path / "out", **several(summary, held_out_by="time"))
    held_out = {example.path for example in read_examples(tmp_path / "out" / "held_out.jsonl")}
    assert held_out <= {"new/lib/other_0.py", "new/lib/other_1.py"}


def test_a_directory_inside_another_source_is_read_once(tmp_path: Path) -> None:
    root = modules(tmp_path / "r")
    write(root, {f"inner/{n}.py": python(f"inner{n}") for n in range(4)})
    summary = summarise_source(str(root), also=[str(root / "inner")])
    assert summary.files == 12


@pytest.mark.parametrize(
    ("also", "message"),
    [("missing", "no such file"), ("", "given twice"), ("../r", "given twice"), ("src/module_0.py", "must be")],
)
def test_a_source_that_cannot_be_added_is_refused_by_its_field(tmp_path: Path, also: str, message: str) -> None:
    root = modules(tmp_path / "r")
    with pytest.raises(InvalidArgument, match=rf"config\.more_sources.*{message}"):
        summarise_source(str(root), also=[os.path.normpath(root / also)])


def test_settings_for_directories_are_refused_with_records() -> None:
    records = [{"text": f"text {n}"} for n in range(20)]
    with pytest.raises(InvalidArgument, match=r"config\.include"):
        summarise_source(records, selection=Selection(include=("src/",)))
    with pytest.raises(InvalidArgument, match=r"config\.more_sources"):
        summarise_source(records, also=["/somewhere"])


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(tuple), min_size=2, max_size=6, unique=True)
)
def test_names_of_sources_are_unique(paths: list[tuple[str, ...]]) -> None:
    found = unique_names([Path("/", *parts) for parts in paths])
    assert len(set(found)) == len(paths)
    assert all("/".join(parts).endswith(name) for parts, name in zip(paths, found, strict=True))
