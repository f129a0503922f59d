"""What a training that continues from an adapter trains on, and what it is evaluated on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from peft_core.data.catch_up import MAX_OLD_HELD_OUT, MIN_REPLAYED, ParentData
from peft_core.data.dataset import PreparedDataset, read_examples
from peft_core.data.examples import learned_text
from peft_core.data.leakage import TrainingFingerprint, read_fingerprint
from peft_core.data.prepare import prepare
from peft_core.data.snapshot import Snapshot, read_snapshot
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.errors import DataError
from peft_core.schemas.dataset import CatchUpSpec
from tests.factories import make_dataset_spec

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "omicron",
    "pi",
    "rho",
    "sigma",
    "tau",
    "upsilon",
]
ALL = CatchUpSpec(replay_share=1000.0)
SOME = CatchUpSpec(replay_share=1.0)


def function(file: int, number: int, version: int = 1) -> str:
    """A function of about a hundred tokens that no other one resembles."""
    first, second, third = (WORDS[(file * factor + number * 7 + version * 11) % len(WORDS)] for factor in (1, 3, 7))
    return (
        f"def {first}_{second}_{file}_{number}(value_{file}, scale_{number}):\n"
        f"    {third}_{version} = value_{file} * {file * 31 + number} + scale_{number}\n"
        f"    {second}_sum_{number} = [{first}_{file} - {number} for {first}_{file} in range({third}_{version})]\n"
        f"    if {third}_{version} > {number * 17 + version}:\n"
        f"        raise ValueError('{first} {second} {third} in {file} {number} {version}')\n"
        f"    return sum({second}_sum_{number}) / ({file} + scale_{number} * {version})\n"
    )


def write(root: Path, file: int, functions: int = 8, *, name: str = "", changed: dict[int, int] | None = None) -> Path:
    """Write a module. `changed`: versions of functions by their number."""
    path = root / (name or f"module_{file}.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = changed or {}
    path.write_text("\n\n".join(function(file, number, versions.get(number, 1)) for number in range(functions)))
    return path


@pytest.fixture
def code(tmp_path: Path) -> Path:
    for file in range(20):
        write(tmp_path / "code", file)
    return tmp_path / "code"


def build(source: Path, directory: Path, parent: ParentData | None = None, **spec: Any) -> PreparedDataset:
    return prepare(
        make_dataset_spec(source, **{"max_length": 160, **spec}),
        directory=directory,
        token_counter=EstimatedTokenCounter(),
        report=lambda _message: None,
        parent=parent,
    )


def recorded(directory: Path) -> ParentData:
    snapshot, fingerprint = read_snapshot(directory), read_fingerprint(directory)
    assert isinstance(snapshot, Snapshot)
    assert isinstance(fingerprint, TrainingFingerprint)
    return ParentData(snapshot, fingerprint)


@pytest.fixture
def parent(code: Path, tmp_path: Path) -> ParentData:
    build(code, tmp_path / "first")
    return recorded(tmp_path / "first")


def texts(directory: Path, part: str) -> set[str]:
    return {learned_text(example) for example in read_examples(directory / f"{part}.jsonl")}


def paths(directory: Path, part: str) -> set[str]:
    return {example.path for example in read_examples(directory / f"{part}.jsonl")}


def trained_file(parent: ParentData, number: int = 0) -> int:
    return int(sorted(parent.trained_files)[number].removeprefix("module_").removesuffix(".py"))


def held_out_file(parent: ParentData) -> int:
    return int(min(parent.held_out_files).removeprefix("module_").removesuffix(".py"))


def test_changed_and_new_code_is_trained_on_with_a_sample_of_the_known(
    code: Path, parent: ParentData, tmp_path: Path
) -> None:
    file = trained_file(parent)
    write(code, file, changed={2: 2})
    write(code, 50, 3, name="new.py")
    dataset = build(code, tmp_path / "second", parent, catch_up=SOME)
    train = read_examples(tmp_path / "second" / "train.jsonl")
    trained = [learned_text(example) for example in train]
    assert any(f"{file} 2 2')" in text for text in trained)
    assert sum(example.path == "new.py" for example in train) == 3
    assert dataset.summary.replayed_examples == MIN_REPLAYED
    assert dataset.summary.train_examples == 1 + 3 + MIN_REPLAYED
    assert dataset.summary.left_out["unchanged"] > 50
    assert paths(tmp_path / "second", "train") - {"new.py"} <= parent.trained_files


def test_deleted_code_is_not_replayed(code: Path, parent: ParentData, tmp_path: Path) -> None:
    deleted, changed = trained_file(parent, 0), trained_file(parent, 1)
    (code / f"module_{deleted}.py").unlink()
    write(code, changed, changed={0: 2})
    build(code, tmp_path / "second", parent, catch_up=ALL)
    assert paths(tmp_path / "second", "train") == parent.trained_files - {f"module_{deleted}.py"}


def test_what_was_held_out_is_never_trained_on_whatever_it_is_called_now(
    code: Path, parent: ParentData, tmp_path: Path
) -> None:
    before = texts(tmp_path / "first", "held_out")
    held_out = held_out_file(parent)
    shutil.move(code / f"module_{held_out}.py", code / "renamed.py")
    copied = (code / "renamed.py").read_text().split("\n\n\n")[0]
    changed = write(code, trained_file(parent), changed={0: 2})
    changed.write_text(f"{copied}\n\n\n{changed.read_text()}")
    for max_length in (160, 400):  # other cuts do not reveal it either
        directory = tmp_path / f"second-{max_length}"
        build(code, directory, parent, catch_up=ALL, max_length=max_length)
        trained = "\n".join(texts(directory, "train"))
        assert "renamed.py" not in paths(directory, "train")
        assert copied.splitlines()[1] not in trained
        assert not texts(directory, "train") & before
        assert "renamed.py" in {f.path for f in recorded(directory).snapshot.files if f.part == "held_out"}


def test_three_generations_never_train_on_what_the_first_held_out(
    code: Path, parent: ParentData, tmp_path: Path
) -> None:
    ever = texts(tmp_path / "first", "held_out")
    for generation in range(2, 5):
        write(code, trained_file(parent, generation), changed={1: generation})
        write(code, held_out_file(parent), changed={3: generation})
        directory = tmp_path / f"generation-{generation}"
        build(code, directory, parent, catch_up=ALL)
        assert not texts(directory, "train") & ever
        ever |= texts(directory, "held_out")
        parent = recorded(directory)
        assert len(parent.snapshot.held_out_ever) == len(ever)


def test_changed_held_out_code_and_a_sample_of_the_old_are_evaluated(
    code: Path, parent: ParentData, tmp_path: Path
) -> None:
    before = texts(tmp_path / "first", "held_out")
    held_out = held_out_file(parent)
    write(code, held_out, changed={0: 2, 1: 2})
    write(code, trained_file(parent), changed={0: 2})
    build(code, tmp_path / "second", parent, catch_up=SOME)
    evaluated = read_examples(tmp_path / "second" / "held_out.jsonl")
    old = [example for example in evaluated if parent.held_out_before(example)]
    changed = [example for example in evaluated if not parent.held_out_before(example)]
    assert {example.path for example in changed} == {f"module_{held_out}.py"}
    assert len(changed) == 2
    assert {learned_text(example) for example in old} < before
    assert 0 < len(old) <= MAX_OLD_HELD_OUT


def test_the_fingerprint_of_a_successor_covers_what_its_parent_was_trained_on(
    code: Path, parent: ParentData, tmp_path: Path
) -> None:
    first = read_examples(tmp_path / "first" / "train.jsonl")
    write(code, trained_file(parent), changed={0: 2})
    build(code, tmp_path / "second", parent, catch_up=SOME)
    successor = recorded(tmp_path / "second")
    assert all(successor.fingerprint.share_of(learned_text(example)) == 1 for example in first)
    assert successor.trained_files == parent.trained_files


def test_a_limit_drops_replay_first_and_keeps_a_quarter_of_it(code: Path, parent: ParentData, tmp_path: Path) -> None:
    for number in range(10):
        write(code, trained_file(parent, number), changed=dict.fromkeys(range(4), 2))
    dataset = build(code, tmp_path / "loose", parent, catch_up=CatchUpSpec(replay_share=1.0, max_examples=60))
    assert (dataset.summary.train_examples, dataset.summary.replayed_examples) == (60, 20)
    dataset = build(code, tmp_path / "tight", parent, catch_up=CatchUpSpec(replay_share=1.0, max_examples=20))
    assert (dataset.summary.train_examples, dataset.summary.replayed_examples) == (20, 5)
    assert dataset.summary.left_out["not_needed"] == 25  # of 40 changed ones


def test_changed_code_over_the_limit_is_trained_on_by_the_next_trainings(
    code: Path, parent: ParentData, tmp_path: Path
) -> None:
    held_out = texts(tmp_path / "first", "held_out")
    changed = {trained_file(parent, number) for number in range(5)}
    for file in changed:
        write(code, file, changed=dict.fromkeys(range(4), 2))
    trained: set[str] = set()
    for generation, left in enumerate((8, 0)):
        directory = tmp_path / f"generation-{generation}"
        dataset = build(code, directory, parent, catch_up=CatchUpSpec(replay_share=0.0, max_examples=12))
        new = texts(directory, "train")
        assert not new & (trained | held_out)
        trained |= new
        assert dataset.summary.left_out.get("not_needed", 0) == left
        parent = recorded(directory)
    assert all(f"{file} {number} 2')" in "".join(trained) for file in changed for number in range(4))
    with pytest.raises(DataError, match="Nothing to catch up"):
        build(code, tmp_path / "last", parent, catch_up=SOME)


def test_every_example_is_used_or_counted_with_a_reason(code: Path, parent: ParentData, tmp_path: Path) -> None:
    write(code, held_out_file(parent), changed={0: 2})
    write(code, trained_file(parent), changed={0: 2, 1: 2})
    whole = build(code, tmp_path / "second", parent, catch_up=SOME).summary
    counted = whole.train_examples + whole.held_out_examples + sum(whole.left_out.values())
    copied = (code / f"module_{trained_file(parent)}.py").read_text()
    (code / "copy.py").write_text(copied)
    more = build(code, tmp_path / "third", parent, catch_up=SOME).summary
    examples = copied.count("def ")
    assert more.left_out["duplicate"] == whole.left_out.get("duplicate", 0) + examples
    assert more.train_examples + more.held_out_examples + sum(more.left_out.values()) == counted + examples


def test_without_a_change_there_is_nothing_to_catch_up(code: Path, parent: ParentData, tmp_path: Path) -> None:
    write(code, held_out_file(parent), changed={0: 2})  # a change that must not be trained on
    with pytest.raises(DataError, match="Nothing to catch up") as caught:
        build(code, tmp_path / "second", parent, catch_up=SOME)
    assert caught.value.code == "nothing_to_catch_up"


def test_records_are_compared_by_their_content(tmp_path: Path) -> None:
    def write_records(functions: range) -> Path:
        path = tmp_path / "records.jsonl"
        lines = [{"content": function(n, n), "language": "python", "file_path": f"f{n}.py"} for n in functions]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return path

    build(write_records(range(40)), tmp_path / "first", source_kind="jsonl")
    first = texts(tmp_path / "first", "held_out")
    dataset = build(
        write_records(range(50)), tmp_path / "second", recorded(tmp_path / "first"), catch_up=SOME, source_kind="jsonl"
    )
    assert dataset.summary.replayed_examples == MIN_REPLAYED
    assert not texts(tmp_path / "second", "train") & first
    assert texts(tmp_path / "second", "held_out") > first
