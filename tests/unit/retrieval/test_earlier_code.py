"""The code of earlier trainings: what has changed or gone since is not found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from peft_core.data.examples import examples_from_file, keep_secrets
from peft_core.data.snapshot import (
    SNAPSHOT_FILE_NAME,
    Snapshot,
    read_snapshot,
    state_of,
    take_snapshot,
    write_snapshot,
)
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.data.walk import walk
from peft_core.retrieval.units import CodeUnit, read_units


def function(name: str, value: str, indent: str = "") -> str:
    rows = (f"def {name}(self, path):", f"    first = read_{value}(path, strict=True)", "    return first.strip()")
    return "".join(f"{indent}{row}\n" for row in rows)


CLASS = 'class Store:\n    """Holds the configuration of a site, read from a path."""\n'
BEFORE = {
    "same.py": function("load", "one"),
    "moved.py": function("moved", "two"),
    "deleted.py": function("deleted", "three"),
    "store.py": f"{CLASS}\n{function('kept', 'four', '    ')}\n{function('edited', 'old', '    ')}",
}
AFTER = {
    "same.py": BEFORE["same.py"],
    "place/now.py": BEFORE["moved.py"],
    "store.py": f"{CLASS}\n{function('kept', 'four', '    ')}\n{function('edited', 'new', '    ')}",
}


def dataset(root: Path, code: Mapping[str, str], trained: str = "") -> Path:
    """Write the code, and a dataset of the files whose names begin with `trained`; return its examples."""
    for name, text in code.items():
        path = root / "code" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    files = walk(root / "code").files
    counter = EstimatedTokenCounter()
    lines = [
        f"{example.model_dump_json()}\n"
        for file in files
        if file.name.startswith(trained)
        for example in examples_from_file(file, token_counter=counter, max_length=64, redact=keep_secrets).examples
    ]
    (root / "train.jsonl").write_text("".join(lines))
    states = [state for file in files if (state := state_of(file)) is not None]
    write_snapshot(root / SNAPSHOT_FILE_NAME, take_snapshot([], states, train=[], held_out=[], held_out_examples=[]))
    return root / "train.jsonl"


def lines_of(units: list[CodeUnit]) -> list[tuple[str, str]]:
    return sorted((unit.path, line.strip()) for unit in units for line in unit.text.splitlines() if "def " in line)


def test_code_that_was_changed_or_deleted_before_an_update_is_not_found(tmp_path: Path) -> None:
    before = dataset(tmp_path / "before", BEFORE)
    assert len(lines_of(read_units([before], ()))) == 5
    units = read_units([dataset(tmp_path / "after", AFTER, "store.py"), before], ())
    assert lines_of(units) == [
        ("place/now.py", "def moved(self, path):"),
        ("same.py", "def load(self, path):"),
        ("store.py", "def edited(self, path):"),
        ("store.py", "def kept(self, path):"),
    ]
    assert "read_old" not in "".join(unit.text for unit in units)


def test_unchanged_functions_of_a_changed_file_are_found_though_the_update_did_not_repeat_them(tmp_path: Path) -> None:
    files = [dataset(tmp_path / "after", AFTER, "nothing"), dataset(tmp_path / "before", BEFORE)]
    assert ("store.py", "def kept(self, path):") in lines_of(read_units(files, ()))
    (tmp_path / "before" / SNAPSHOT_FILE_NAME).unlink()  # as on a cluster, to which only the examples are sent
    assert ("same.py", "def load(self, path):") in lines_of(read_units(files, ()))


def test_all_code_is_found_where_an_update_records_no_files(tmp_path: Path) -> None:
    files = [dataset(tmp_path / "after", AFTER, "nothing"), dataset(tmp_path / "before", BEFORE)]
    write_snapshot(tmp_path / "after" / SNAPSHOT_FILE_NAME, Snapshot())
    assert len(lines_of(read_units(files, ()))) == 5


def test_files_of_which_something_was_left_to_the_next_training_are_not_taken_for_one_another(tmp_path: Path) -> None:
    before, after = dataset(tmp_path / "before", BEFORE), dataset(tmp_path / "after", AFTER, "nothing")
    for file, name in ((before, "deleted.py"), (after, "store.py")):
        snapshot = read_snapshot(file.parent)
        assert snapshot is not None
        states = tuple(state.without([]) if state.path == name else state for state in snapshot.files)
        write_snapshot(file.parent / SNAPSHOT_FILE_NAME, snapshot.model_copy(update={"files": states}))
    assert "deleted" not in "".join(unit.text for unit in read_units([after, before], ()))
