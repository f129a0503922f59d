"""What a training records of its sources: units that edits change one by one, and a file that damage does not break."""

import gzip
import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_core.data.languages import language_of_file
from peft_core.data.prepare import prepare
from peft_core.data.snapshot import (
    MAX_UNPACKED_BYTES,
    SNAPSHOT_FILE_NAME,
    FileState,
    Snapshot,
    SourceState,
    held_out_digests,
    read_snapshot,
    state_of,
    take_snapshot,
    write_snapshot,
)
from peft_core.data.split import digest
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.data.units import units_of_file
from peft_core.data.walk import File, walk
from tests.factories import make_dataset_spec

MODULE = '''"""A module."""

import os
import sys

LIMIT = 3


class Basket:
    """Things."""

    size = 0

    def add(self, thing):
        self.size += 1
        return thing

    def clear(self):
        self.size = 0


def main(arguments):
    if len(arguments) > LIMIT:
        sys.exit(os.EX_USAGE)
'''


def file_of(directory: Path, text: str, name: str = "module.py") -> File:
    (directory / name).write_text(text)
    language = language_of_file(name)
    assert language is not None
    return File(directory / name, name, language, len(text))


def digests(directory: Path, text: str, name: str = "module.py") -> list[str]:
    return [unit.digest for unit in units_of_file(file_of(directory, text, name))]


def test_a_file_is_cut_into_functions_methods_and_runs_of_statements(tmp_path: Path):
    units = units_of_file(file_of(tmp_path, MODULE))
    assert [(unit.kind, unit.start_line, unit.end_line) for unit in units] == [
        ("module", 1, 1),
        ("module", 3, 4),
        ("module", 6, 6),
        ("class", 9, 10),
        ("class", 12, 12),
        ("method", 14, 16),
        ("method", 18, 19),
        ("function", 22, 24),
    ]
    assert len({unit.digest for unit in units}) == 8


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("self.size += 1", "self.size += 2", 1),
        ("import os\n", "import os\nimport re\n", 1),
        ("    def clear", "    def pop(self):\n        return None\n\n    def clear", 1),
        ("\n\nclass", "\n\n\n\nclass", 0),  # blank lines
        ("        self.size = 0", "            self.size = 0", 0),  # white space
    ],
)
def test_an_edit_changes_only_the_units_that_hold_its_lines(tmp_path: Path, old: str, new: str, changed: int):
    before = set(digests(tmp_path, MODULE))
    after = set(digests(tmp_path, MODULE.replace(old, new)))
    assert len(after - before) == changed


def test_a_licence_is_no_unit(tmp_path: Path):
    licence = "# Copyright 2024 The Authors\n# SPDX-License-Identifier: MIT\n\n"
    assert digests(tmp_path, licence + MODULE) == digests(tmp_path, MODULE)


@given(st.text("abc \n\tdef():classx=1#", max_size=200))
def test_the_units_cover_every_line_once(tmp_path_factory: pytest.TempPathFactory, text: str):
    units = units_of_file(file_of(tmp_path_factory.mktemp("units"), text))
    rows = [line for unit in units for line in range(unit.start_line, unit.end_line + 1)]
    assert len(rows) == len(set(rows))
    visible = {row for row, line in enumerate(text.split("\n"), 1) if line.strip()}
    assert not units or visible <= set(rows)


# The snapshot of a dataset.


def repository(root: Path, files: int = 10) -> Path:
    root.mkdir()
    for number in range(files):
        functions = (
            f"def work_{number}_{n}(value, other):\n    first = value * {n} + {number}\n    return [first, other, {n}]\n"
            for n in range(6)
        )
        (root / f"module_{number}.py").write_text("\n\n".join(functions))
    return root


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=Someone", "-c", "user.email=someone@example.com"]
    done = subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_a_training_records_its_files_units_and_commit(tmp_path: Path):
    root = repository(tmp_path / "r")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "First")
    prepare(
        make_dataset_spec(root),
        directory=tmp_path / "out",
        token_counter=EstimatedTokenCounter(),
        report=lambda _: None,
    )
    snapshot = read_snapshot(tmp_path / "out")
    assert snapshot is not None
    assert snapshot.sources == (SourceState(commit=git(root, "rev-parse", "HEAD"), dirty=False),)
    found = walk(root).files
    assert [file.path for file in snapshot.files] == [file.name for file in found]
    assert {file.path: file.unit_digests for file in snapshot.files} == {
        file.name: [unit.digest for unit in units_of_file(file)] for file in found
    }
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert [file.path for file in snapshot.files if file.part == "held_out"] == manifest["held_out_files"]
    assert {file.part for file in snapshot.files} == {"train", "held_out"}
    held_out = [json.loads(line) for line in (tmp_path / "out" / "held_out.jsonl").read_text().splitlines()]
    texts = ["".join(s["text"] for s in example["segments"] if s.get("learn", True)) for example in held_out]
    assert held_out_digests(snapshot) == {digest(text) for text in texts}
    packed = (tmp_path / "out" / SNAPSHOT_FILE_NAME).read_bytes()
    assert str(tmp_path).encode() not in gzip.decompress(packed)


def test_a_file_whose_name_holds_a_secret_is_not_recorded(tmp_path: Path):
    token = "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6q7R8"
    assert state_of(file_of(tmp_path, MODULE, f"{token}.py")) is None
    assert state_of(file_of(tmp_path, MODULE, "plain.py")) is not None


# Reading.

HEX = "0123456789abcdef"


def hexadecimal(digits: int) -> st.SearchStrategy[str]:
    return st.text(HEX, min_size=digits, max_size=digits)


SNAPSHOTS = st.builds(
    Snapshot,
    sources=st.lists(
        st.builds(
            SourceState, name=st.text(max_size=9), commit=st.none() | hexadecimal(40), dirty=st.none() | st.booleans()
        ),
        max_size=2,
    ).map(tuple),
    files=st.lists(
        st.builds(
            FileState,
            path=st.text(max_size=20),
            digest=hexadecimal(32),
            part=st.sampled_from(["train", "held_out", "unused"]),
            units=st.none() | st.lists(hexadecimal(16), max_size=4).map("".join),
        ),
        max_size=4,
    ).map(tuple),
    held_out_ever=st.lists(hexadecimal(32), max_size=4).map(tuple),
)


@given(SNAPSHOTS)
def test_what_is_written_is_read_again(tmp_path_factory: pytest.TempPathFactory, snapshot: Snapshot):
    directory = tmp_path_factory.mktemp("snapshot")
    write_snapshot(directory / SNAPSHOT_FILE_NAME, snapshot)
    assert read_snapshot(directory) == snapshot


@given(SNAPSHOTS, st.data())
def test_a_damaged_file_gives_no_snapshot_and_no_error(
    tmp_path_factory: pytest.TempPathFactory, snapshot: Snapshot, data: st.DataObject
):
    directory = tmp_path_factory.mktemp("snapshot")
    path = directory / SNAPSHOT_FILE_NAME
    write_snapshot(path, snapshot)
    raw = bytearray(path.read_bytes())
    place = data.draw(st.integers(10, len(raw) - 1))  # after the header of gzip, of which some bytes mean nothing
    if data.draw(st.booleans()):
        raw[place] ^= data.draw(st.integers(1, 255))
    else:
        del raw[place:]
    path.write_bytes(raw)
    assert read_snapshot(directory) is None


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": 2},
        {"files": [{"path": "a.py", "digest": "zz", "part": "train"}]},
        {"files": [{"path": "a.py", "digest": "0" * 32, "part": "everything"}]},
        {"files": [{"path": "a.py", "digest": "0" * 32, "units": "0123"}]},
        {"sources": [{"name": "", "commit": "--upload-pack=touch /tmp/x", "dirty": None}]},
        {"held_out_ever": ["0"]},
    ],
)
def test_values_of_another_kind_are_refused(tmp_path: Path, change: dict[str, object]):
    content = json.dumps(Snapshot().model_dump(mode="json") | change)
    (tmp_path / SNAPSHOT_FILE_NAME).write_bytes(gzip.compress(content.encode()))
    assert read_snapshot(tmp_path) is None


def test_fields_of_a_newer_version_are_ignored(tmp_path: Path):
    content = json.dumps(Snapshot().model_dump(mode="json") | {"weather": "sunny"})
    (tmp_path / SNAPSHOT_FILE_NAME).write_bytes(gzip.compress(content.encode()))
    assert read_snapshot(tmp_path) == Snapshot()


def test_a_bomb_a_link_and_a_missing_file_are_refused(tmp_path: Path):
    path = tmp_path / SNAPSHOT_FILE_NAME
    assert read_snapshot(tmp_path) is None
    path.write_bytes(gzip.compress(b" " * (MAX_UNPACKED_BYTES + 1)))
    assert read_snapshot(tmp_path) is None
    path.write_bytes(gzip.compress(b"[" * 1_000_000))
    assert read_snapshot(tmp_path) is None
    path.unlink()
    write_snapshot(tmp_path / "elsewhere", Snapshot())
    path.symlink_to(tmp_path / "elsewhere")
    assert read_snapshot(tmp_path) is None


def test_of_too_many_files_the_names_and_digests_remain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = tuple(FileState(path=f"{n}.py", digest="0" * 32, units="0" * 1600) for n in range(10))
    monkeypatch.setattr("peft_core.data.snapshot.MAX_UNPACKED_BYTES", 3_000)
    write_snapshot(tmp_path / SNAPSHOT_FILE_NAME, Snapshot(files=files))
    snapshot = read_snapshot(tmp_path)
    assert snapshot is not None
    assert [file.path for file in snapshot.files] == [file.path for file in files]
    assert {file.units for file in snapshot.files} == {None}
    write_snapshot(tmp_path / SNAPSHOT_FILE_NAME, Snapshot(files=files * 10, held_out_ever=("1" * 32,)))
    assert read_snapshot(tmp_path) == Snapshot(held_out_ever=("1" * 32,))


def test_more_files_than_a_reader_accepts_are_not_recorded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("peft_core.data.snapshot.MAX_FILES", 2)
    files = [FileState(path=f"{n}.py", digest="0" * 32) for n in range(3)]
    taken = [
        take_snapshot([], files[:count], train={"0.py"}, held_out={"1.py"}, held_out_examples=[]) for count in (2, 3)
    ]
    assert [[file.part for file in snapshot.files] for snapshot in taken] == [["train", "held_out"], []]
