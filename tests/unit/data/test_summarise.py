"""Tests of the summary of a data source: what is accepted, what is excluded, and what errors say."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.data.classification import classify
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.grammars import GRAMMARS
from peft_core.data.prepare import prepare
from peft_core.data.read_text import read_text
from peft_core.data.records import RecordFormat, parse, read_copy, read_file, write_records
from peft_core.data.summarise import summarise_source
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.data.walk import walk
from peft_core.errors import DataError, InvalidArgument, PeftMcpError
from tests.factories import make_dataset_spec


def code(name: str, functions: int = 6) -> str:
    body = "    for index in range(10):\n        total = total + index * {n}\n    return total\n\n\n"
    return "".join(f"def {name}_{n}(total):\n" + body.format(n=n) for n in range(functions))


def repository(root: Path, files: int = 4) -> Path:
    for number in range(files):
        path = root / "src" / f"module_{number}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code(f"work_{number}", 40))
    return root


def git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, "-C", root, *arguments], check=True, capture_output=True)


def summarise(training_data: Any) -> Any:
    return summarise_source(training_data)


def names(root: Path) -> set[str]:
    return {file.name for file in walk(root).files}


def test_a_repository_is_summarised_without_reading_all_of_it(tmp_path: Path):
    summary = summarise(str(repository(tmp_path)))
    assert (summary.kind, summary.files, summary.languages, summary.examples) == ("repository", 4, {"python": 4}, None)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.py"))
    assert summary.estimated_tokens == pytest.approx(size / 3.3, rel=0.01)


def test_a_home_directory_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    repository(tmp_path / "project")
    assert summarise("~/project").path == tmp_path / "project"


@pytest.mark.slow
def test_twenty_thousand_files_take_less_than_two_seconds(tmp_path: Path):
    for directory in range(100):
        (tmp_path / f"d{directory}").mkdir()
        for number in range(200):
            (tmp_path / f"d{directory}" / f"f{number}.py").write_text(f"x = {number}\n")
    (tmp_path / "d0" / "f0.py").write_text(code("a", 40))
    (tmp_path / "d0" / "f1.py").write_text(code("b", 40))
    started = time.process_time()
    assert summarise(str(tmp_path)).files == 20_000
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "given_path", ["", "   ", "nowhere/at/all", "a\0b", "x" * 5_000, "~no_such_user_here/x", "[{}]"]
)
def test_a_path_that_does_not_exist_is_refused_with_its_name(given_path: str):
    with pytest.raises(InvalidArgument) as caught:
        summarise(given_path)
    assert caught.value.details["field"] == "training_data"


def test_a_mistyped_name_gets_a_suggestion(tmp_path: Path):
    repository(tmp_path / "billing")
    with pytest.raises(InvalidArgument, match=r"Did you mean .*billing\?"):
        summarise(str(tmp_path / "biling"))


def test_a_file_of_another_type_is_refused_with_the_allowed_types(tmp_path: Path):
    path = tmp_path / "data.xlsx"
    path.write_text("a,b")
    with pytest.raises(
        InvalidArgument, match=r"\.jsonl, \.ndjson, \.json, \.csv, \.tsv, each also with \.gz; \.parquet"
    ):
        summarise(str(path))


def test_a_pipe_is_refused_without_blocking(tmp_path: Path):
    os.mkfifo(tmp_path / "data.jsonl")
    with pytest.raises(InvalidArgument, match="neither a directory nor a regular file"):
        summarise(str(tmp_path / "data.jsonl"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_directory_that_may_not_be_read_is_refused(tmp_path: Path):
    tmp_path.chmod(0)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        summarise(str(tmp_path))
    tmp_path.chmod(0o700)


def test_the_error_for_a_directory_without_code_lists_what_was_excluded(tmp_path: Path):
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(DataError, match="1 no_code") as caught:
        summarise(str(tmp_path))
    assert caught.value.code == "no_code"


@pytest.mark.parametrize("files", [{"a.py": code("a", 60)}, {"a.py": "x = 1\n", "b.py": "y = 2\n"}])
def test_too_little_code_is_refused_with_figures(tmp_path: Path, files: dict[str, str]):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match="at least 8 examples in 2") as caught:
        summarise(str(tmp_path))
    assert caught.value.code == "too_few_examples"


def test_links_pipes_and_giant_files_are_counted_but_never_opened(tmp_path: Path):
    repository(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "linked.py").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe.py")
    with (tmp_path / "giant.py").open("wb") as stream:
        stream.truncate(100_000_000)
    (tmp_path / "empty.py").touch()
    left_out = summarise(str(tmp_path)).left_out
    assert left_out == {"symlink": 2, "special": 1, "too_large": 1, "empty": 1}


def test_unprintable_file_names_do_no_harm(tmp_path: Path):
    repository(tmp_path)
    (tmp_path / "a\nb.py").write_text(code("a"))
    (tmp_path / os.fsdecode(b"\xff\xfe.py")).write_text(code("b"))
    assert summarise(str(tmp_path)).files == 6
    git(tmp_path, "init")
    assert summarise(str(tmp_path)).files == 6


def test_without_git_the_gitignore_files_apply_and_the_deepest_takes_precedence(tmp_path: Path):
    repository(tmp_path)
    (tmp_path / ".gitignore").write_text("\ufefflocal_*.py\n*.gen.py\n/made/\n", encoding="utf-8")
    (tmp_path / "src" / ".gitignore").write_text("!local_keep.py\n/only_here.py\n")
    for name in ("made/a.py", "src/local_keep.py", "src/local_drop.py", "src/only_here.py", "only_here.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(code("a"))
    assert names(tmp_path) == {f"src/module_{n}.py" for n in range(4)} | {"src/local_keep.py", "only_here.py"}
    git(tmp_path, "init")
    assert walk(tmp_path).by_git
    assert names(tmp_path) == {f"src/module_{n}.py" for n in range(4)} | {"src/local_keep.py", "only_here.py"}


def test_a_directory_inside_a_repository_is_listed_by_git_too(tmp_path: Path):
    repository(tmp_path)
    git(tmp_path, "init")
    assert names(tmp_path / "src") == {f"module_{n}.py" for n in range(4)}
    (tmp_path / ".gitignore").write_text("src/\n")
    assert not walk(tmp_path / "src").by_git, (
        "git does not list an ignored directory, which the caller requested nevertheless"
    )
    assert len(names(tmp_path / "src")) == 4


def test_tracked_files_that_are_missing_are_counted(tmp_path: Path):
    repository(tmp_path)
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    (tmp_path / "src" / "module_0.py").unlink()
    assert walk(tmp_path).left_out == {"changed": 1}


def test_a_repository_cannot_make_git_run_its_programs(tmp_path: Path):
    from peft_core.data import git as git_module  # noqa: PLC0415 - `git` is a function of this module

    repository(tmp_path / "r")
    root = tmp_path / "r"
    git(root, "init")
    git(root, "add", ".")
    git(root, "commit", "-m", "one")
    trap = tmp_path / "trap"
    for key in ("core.fsmonitor", "filter.evil.clean", "filter.evil.process", "core.sshCommand", "diff.external"):
        git(root, "config", key, f"touch {trap}; cat")
    (root / ".gitattributes").write_text("*.py filter=evil\n")
    (root / "src" / "module_0.py").write_text("changed = True\n")
    walk(root)
    commit, dirty = git_module.head_state(root)
    assert commit is not None
    assert len(commit) == 40
    assert dirty is True
    assert not trap.exists()


def test_vendored_and_hidden_files_are_excluded(tmp_path: Path):
    repository(tmp_path)
    for name in ("node_modules/a.js", "vendor/b.go", ".hidden/c.py", "env2/pyvenv.cfg", "env2/lib.py", "build/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert walk(tmp_path).left_out == {"vendored": 4, "hidden": 1}
    assert len(names(tmp_path)) == 4


@pytest.mark.parametrize(
    ("name", "reason"),
    [(".env", "sensitive"), (".env.local", "sensitive"), ("id_rsa", "sensitive"), ("id_ed25519.pub", "sensitive"),
     ("server.pem", "sensitive"), ("tls.key", "sensitive"), (".netrc", "sensitive"), (".npmrc", "sensitive"),
     ("credentials.json", "sensitive"), ("secrets.yaml", "sensitive"), ("poetry.lock", "lock_file"),
     ("package-lock.json", "lock_file"), ("a.min.js", "minified"), ("a_pb2.py", "generated"), ("a.g.dart", "generated"),
     ("a.pb.go", "generated"), ("a.png", "binary"), ("a.json", "no_code"), ("README", "no_code")],
)  # fmt: skip
def test_a_file_can_be_excluded_by_its_name_alone(name: str, reason: str):
    assert classify(name) == ExclusionReason(reason)


@pytest.mark.parametrize(
    "name", ["secrets.py", "credentials.go", "keys.rs", "Makefile", "Dockerfile", "a.PY", "tokens.h"]
)
def test_code_about_secrets_is_not_excluded(name: str):
    assert not isinstance(classify(name), ExclusionReason)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"x = 1\r\ny = 2\r", "x = 1\ny = 2\n"),
        (b"\xef\xbb\xbfx = 1\n", "x = 1\n"),
        ("x = 'é'\n".encode("utf-16"), "x = 'é'\n"),
        (
            "# Générer la liste des éléments à côté\nx = 1\n".encode("latin-1"),
            "# Générer la liste des éléments à côté\nx = 1\n",
        ),
        (b"\x00\x01\x02", ExclusionReason.BINARY),
        (bytes(range(128, 256)) * 4 + b"\x81\x8d\x8f", ExclusionReason.NOT_TEXT),
        (b" \n\t\n", ExclusionReason.EMPTY),
        (b"x = '" + b"a" * 6_000 + b"'\n", ExclusionReason.MINIFIED),
        (b"# Code generated by protoc. DO NOT EDIT.\nx = 1\n", ExclusionReason.GENERATED),
    ],
)
def test_a_file_becomes_text_or_a_reason(tmp_path: Path, content: bytes, expected: str):
    path = tmp_path / "a.py"
    path.write_bytes(content)
    assert read_text(path) == expected


def test_a_file_swapped_for_a_link_or_a_pipe_is_not_followed(tmp_path: Path):
    (tmp_path / "link.py").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "pipe.py")
    assert read_text(tmp_path / "link.py") is ExclusionReason.SYMLINK
    assert read_text(tmp_path / "pipe.py") is ExclusionReason.SPECIAL
    assert read_text(tmp_path / "gone.py") is ExclusionReason.CHANGED


RECORDS: dict[str, Callable[[int], dict[str, Any]]] = {
    "text": lambda n: {"text": f"def f{n}(): return {n}"},
    "completion": lambda n: {"prompt": f"double {n}", "completion": str(2 * n)},
    "output": lambda n: {"input": f"double {n}", "output": str(2 * n)},
    "messages": lambda n: {
        "messages": [{"role": "user", "content": f"double {n}"}, {"role": "assistant", "content": str(2 * n)}],
    },
    "chunk": lambda n: {
        "id": str(n), "content": f"def f{n}(): pass", "language": "python", "chunk_type": "function",
        "file_path": f"src/f{n}.py", "start_line": 1, "end_line": 2, "start_byte": 0, "end_byte": 20, "metadata": {},
        "dependencies": ["os"], "complexity_score": 1.5,
    },
}  # fmt: skip


@pytest.mark.parametrize("form", RECORDS)
def test_each_record_format_is_accepted_inline_and_from_a_file(tmp_path: Path, form: str):
    records = [RECORDS[form](n) for n in range(10)]
    inline = summarise(records)
    assert (inline.kind, inline.path, inline.examples, inline.files) == ("records", None, 10, 10)
    assert inline.needs_chat_template is (form == "messages")
    path = tmp_path / "data.jsonl"
    write_records(records, path)
    from_file = summarise(str(path))
    assert (from_file.kind, from_file.path, from_file.examples) == ("jsonl", path, 10)
    assert from_file.estimated_tokens == inline.estimated_tokens


@pytest.mark.parametrize(
    ("fields", "kind", "line"),
    [
        ({"start_line": 12.0, "end_line": 14.0}, "block", 12),
        ({"start_line": float("nan"), "end_line": None}, "block", 0),
        ({"chunk_type": "enum", "start_line": 3}, "block", 3),
        ({"chunk_type": None}, "block", 0),
        ({"chunk_type": "method"}, "method", 0),
    ],
)
def test_chunks_as_written_by_tables_and_other_tools_are_accepted(fields: dict[str, Any], kind: str, line: int):
    record = parse({"content": "x = 1", "language": "python", **fields}, "record 1")
    assert (record.kind, record.start_line) == (kind, line)


def test_unused_fields_of_a_record_may_hold_anything(tmp_path: Path):
    records = [{**RECORDS["chunk"](n), "metadata": {"at": datetime.now(UTC)}, "vector": b"\0"} for n in range(10)]
    turns = [
        {"messages": [{"role": "assistant", "content": f"a {n}", "timestamp": datetime.now(UTC)}], "tags": {1, 2}}
        for n in range(10)
    ]
    for name, given_records in (("chunks", records), ("turns", turns)):
        assert summarise(given_records).examples == 10
        write_records(given_records, tmp_path / name)
        assert len(list(read_copy(tmp_path / name))) == 10


def test_a_byte_order_mark_and_blank_lines_are_tolerated(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(RECORDS["text"](n)) for n in range(9)]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
    assert summarise(str(path)).examples == 9


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "  "}, "'text' is blank"),
        ({"text": 3}, "'text' is a number; it must be text"),
        ({"text": "\ud800"}, "surrogate"),
        ({"input_ids": [1, 2], "labels": [1, 2]}, "'input_ids' and 'labels' must be texts; token ids have a meaning"),
        ({"input_ids": "a", "labels": "b", "output": "c"}, "match none of the known formats"),
        ({"sequence": "a", "target": "b"}, r"keys \(sequence, target\) match none of the known formats"),
        ({}, "none of the known formats"),
        ({"text": "a", "prompt": "b", "completion": "c"}, "match 2 formats"),
        ({"prompt": "a", "completion": ""}, "'completion' is blank"),
        ({"messages": []}, "at least one message"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'robot'; it must be one of system, developer, user"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message has the role 'assistant'"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "'content' of message 1 of 'messages' is missing or blank",
        ),
        ({"content": "x", "language": "python", "chunk_type": 3}, "'chunk_type' is a number; it must be text"),
        ({"content": "x", "language": "python", "start_line": 1.5}, "'start_line' is 1.5; it must be a whole number"),
        ({"content": "x", "language": "python", "start_line": float("inf")}, "'start_line' is inf"),
        ({"content": "x", "language": "python", "start_line": 5, "end_line": 2}, r"'start_line' \(5\) is greater than"),
        ({"content": "x", "language": "python", "start_byte": -1}, "at least 0"),
        ({"content": "x", "language": "python", "complexity_score": -0.5}, "'complexity_score'"),
        ({"content": "x", "language": "python", "complexity_score": float("nan")}, "'complexity_score'"),
        ({"content": "x", "language": "python", "dependencies": "os"}, "it must be a list"),
        ({"content": "x", "language": "python", "file_path": 3}, "'file_path' is a number"),
        ({"content": "x", "language": "python", "file_path": "x" * 5000}, "'file_path' has 5000 characters"),
        ([1], "it is a list"),
        (None, "it is null"),
    ],
)
def test_a_broken_record_is_named_with_the_rule_it_breaks(tmp_path: Path, record: Any, expected: str):
    records = [RECORDS["text"](n) for n in range(16)]
    with pytest.raises(DataError, match=f"Record 17 cannot be used: .*{expected}") as caught:
        summarise([*records, record])
    assert caught.value.code == "broken_record"
    assert caught.value.suggestions
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(each) for each in [*records, record]))
    with pytest.raises(DataError, match=f"Line 17 of .*data.jsonl cannot be used: .*{expected}"):
        summarise(str(path))


@pytest.mark.parametrize(
    ("line", "expected"),
    [(b'{"text": ', "not valid JSON"), (b'{"text": "\xff"}', "not UTF-8"), (b"[" * 100_000, "nested too deeply"),
     (b'{"text": "a", "text": "b"}', "'text' is given twice in one object"), (b"9" * 5_000, "not valid JSON")],
)  # fmt: skip
def test_the_error_for_a_line_that_is_not_json_says_what_is_wrong(tmp_path: Path, line: bytes, expected: str):
    path = tmp_path / "data.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(DataError, match=f"Line 1 of .*{expected}"):
        summarise(str(path))


def test_the_error_for_mixed_formats_names_the_first_deviating_record(tmp_path: Path):
    records = [*(RECORDS["text"](n) for n in range(9)), RECORDS["completion"](1)]
    with pytest.raises(
        DataError, match=r'record 10 has the format \{"prompt".*record 1 has the format \{"text"'
    ) as caught:
        summarise(records)
    assert caught.value.code == "mixed_formats"


@pytest.mark.parametrize("records", [[], [RECORDS["text"](1)] * 50, [RECORDS["text"](n) for n in range(7)]])
def test_too_few_different_records_are_refused(records: list[dict[str, Any]]):
    with pytest.raises(DataError) as caught:
        summarise(records)
    assert caught.value.code == ("too_few_examples" if records else "training_data_empty")


def test_an_empty_file_and_a_giant_one_are_refused(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.touch()
    with pytest.raises(DataError, match="contains no records"):
        summarise(str(path))
    with path.open("wb") as stream:
        stream.truncate(3_000_000_000)
    with pytest.raises(DataError, match=r"3\.0 GB"):
        summarise(str(path))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
KEYS = st.sampled_from(["text", "prompt", "completion", "messages", "content", "language", "file_path", "start_line"])


@given(st.dictionaries(KEYS, JSON, max_size=5) | JSON)
def test_any_record_is_valid_or_refused_with_a_message(value: Any):
    try:
        record = parse(value, "record 1")
    except DataError as error:
        message = str(error)
        assert message.startswith("Record 1 cannot be used")
    else:
        assert record.format in RecordFormat
        assert record.content.strip()


@given(st.binary(max_size=400))
def test_any_file_gives_records_or_a_data_error(content: bytes):
    with tempfile.TemporaryDirectory() as directory:  # hypothesis does not reset tmp_path between examples
        path = Path(directory) / "data.jsonl"
        path.write_bytes(content)
        try:
            result = "".join(record.content for record in read_file(path))
        except PeftMcpError as error:
            result = error.code
            assert result in {"broken_record", "mixed_formats", "unreadable_file"}
    assert result or not content.strip(b"\xef\xbb\xbf \t\r\n\v\f")


def test_importing_the_package_loads_no_heavy_package():
    heavy = ["tree_sitter", "detect_secrets", "pathspec", "charset_normalizer", "requests", "torch", "numpy", "mcp"]
    program = f"import sys, peft_core.data; print([name for name in {heavy} if name in sys.modules])"
    process = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert process.stdout.strip() == "[]"


def test_14_small_functions_are_counted_one_by_one_and_the_training_set_is_known(tmp_path: Path):
    for number in range(8):
        (tmp_path / f"m{number}.py").write_text(
            "\n\n".join(
                f"def work_{number}_{k}(first, second):\n"
                + "".join(f"    v{k}_{n} = {number * n} + first\n" for n in range(7))
                for k in range(8)
            )
        )
    summary = summarise(str(tmp_path))
    assert (summary.units, summary.sampled_files) == (64, 8)
    assert summary.training_set is not None
    prepared = prepare(
        make_dataset_spec(tmp_path, max_length=512, held_out_fraction=0.1),
        directory=tmp_path.parent / "dataset",
        token_counter=EstimatedTokenCounter(),
        report=lambda _: None,
    )
    assert summary.training_set.examples == prepared.summary.train_examples
    assert summary.training_set.tokens == prepared.summary.train_tokens


def test_a_language_whose_grammar_is_not_installed_is_named_with_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    repository(tmp_path)
    for number in range(3):
        (tmp_path / f"q{number}.sql").write_text(f"CREATE TABLE t{number} (id INT);\n")
    missing = dataclasses.replace(GRAMMARS["sql"], module="tree_sitter_of_nobody")
    monkeypatch.setitem(GRAMMARS, "sql", missing)
    assert summarise(str(tmp_path)).without_grammar == {"sql": 3}
    monkeypatch.undo()
    assert summarise(str(tmp_path)).without_grammar == {}


@pytest.mark.slow
def test_a_large_repository_is_estimated_from_a_sample_as_it_will_be_cut(tmp_path: Path):
    for number in range(400):
        functions = 3 + number % 17
        (tmp_path / f"m{number}.py").write_text(
            "\n\n".join(
                f"def work_{number}_{k}(first, second):\n"
                + "".join(f"    v{k}_{n} = {number * n + k} + first * second\n" for n in range(10 + number % 7))
                for k in range(functions)
            )
        )
    summary = summarise(str(tmp_path))
    assert summary.sampled_files < 400
    assert summary.units == pytest.approx(sum(3 + number % 17 for number in range(400)), rel=0.1)
    prepared = prepare(
        make_dataset_spec(tmp_path, max_length=512, held_out_fraction=0.1),
        directory=tmp_path.parent / "dataset",
        token_counter=EstimatedTokenCounter(),
        report=lambda _: None,
    )
    assert summary.training_set is not None
    assert summary.training_set.examples == pytest.approx(prepared.summary.train_examples, rel=0.15)
