from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_core.errors import TrainingError
from peft_core.schemas.dataset import DatasetSummary
from peft_core.schemas.events import RateLowered
from peft_core.schemas.task import TrainingTask
from peft_core.schemas.training import TrainingConfig
from peft_core.training.checkpoint import (
    START,
    Checkpoint,
    Progress,
    RollbackStates,
    StateId,
    load_checkpoint,
    run_key,
    save_checkpoint,
)
from tests.factories import make_request

DATASET = DatasetSummary(
    train_examples=1,
    held_out_examples=1,
    train_tokens=1,
    held_out_tokens=1,
    files=1,
    left_out={},
    sha256="d" * 64,
)


def make_checkpoint(step: int) -> Checkpoint:
    weight = torch.full((2, 2), float(step))
    return Checkpoint(
        progress=Progress(base_loss=2.5, step=step),
        adapter={"a": weight},
        best=None,
        optimizer={"state": {}, "param_groups": []},
        scheduler={"last_epoch": step},
        rng={"cpu": torch.get_rng_state()},
    )


def make_task(tmp_path: Path, **changes: Any) -> TrainingTask:
    return TrainingTask(
        job_id="j",
        project_id="p",
        request=make_request(**changes),
        job_dir=tmp_path,
        base_models_dir=tmp_path,
    )


def test_the_newest_checkpoint_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, "key", make_checkpoint(step))
    loaded = load_checkpoint(tmp_path, "key")
    assert loaded is not None
    assert loaded.progress == Progress(base_loss=2.5, step=2)
    assert loaded.adapter["a"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_the_mark_to_go_back_to_the_lowered_rates_and_what_was_told_are_part_of_it(tmp_path: Path) -> None:
    lowered = (RateLowered(step=7, back_to_step=1, factor=0.25, reason="the loss is nan"),)
    told = replace(make_checkpoint(5), lowered=lowered, recent=lowered, good=StateId(1, 0))
    save_checkpoint(tmp_path, "key", told)
    loaded = load_checkpoint(tmp_path, "key")
    assert loaded is not None
    assert loaded.lowered == loaded.recent == lowered
    assert loaded.good == StateId(1, 0)


def test_a_checkpoint_from_before_runs_went_back_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "key", make_checkpoint(5))
    document = torch.load(tmp_path / "state.pt", weights_only=True)
    del document["lowered"], document["good_state"], document["recent"]
    torch.save(document, tmp_path / "state.pt")
    loaded = load_checkpoint(tmp_path, "key")
    assert loaded is not None
    assert (loaded.progress.step, loaded.lowered, loaded.good) == (5, (), START)


def test_good_states_stay_while_the_checkpoint_names_them_and_the_start_for_good(tmp_path: Path) -> None:
    states = RollbackStates(tmp_path, "key")
    lowered = (RateLowered(step=7, back_to_step=0, factor=0.25, reason="the loss is nan"),)
    again = replace(make_checkpoint(50), lowered=lowered)  # the same step, on another way
    for state in (make_checkpoint(0), make_checkpoint(50)):
        states.keep(state)
    states.set_checkpointed(StateId(50, 0))
    for state in (make_checkpoint(100), make_checkpoint(150), again):
        states.keep(state)
    assert {path.name for path in tmp_path.iterdir()} == {"good-0-0.pt", "good-50-0.pt", "good-50-1.pt"}
    assert [states.at(mark).lowered for mark in (StateId(50, 0), StateId(50, 1))] == [(), lowered]
    assert states.at(StateId(50, 0)).adapter["a"].tolist() == [[50.0, 50.0], [50.0, 50.0]]
    states.set_checkpointed(StateId(50, 1))
    assert {path.name for path in tmp_path.iterdir()} == {"good-0-0.pt", "good-50-1.pt"}
    assert states.at(START).progress.step == 0


def test_a_good_state_whose_writing_was_cut_short_is_overwritten(tmp_path: Path) -> None:
    states = RollbackStates(tmp_path, "key")
    states.keep(make_checkpoint(0))
    (tmp_path / ".state.pt.tmp").write_bytes(b"PK\x03\x04 half")
    states.keep(make_checkpoint(50))
    assert {path.name for path in tmp_path.iterdir()} == {"good-0-0.pt", "good-50-0.pt"}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"PK\x03\x04 half")])
def test_where_a_good_state_cannot_be_read_the_start_is_and_where_that_cannot_be_it_is_told(
    tmp_path: Path,
    damage: Callable[[Path], object],
) -> None:
    states = RollbackStates(tmp_path, "key")
    states.keep(make_checkpoint(0))
    states.keep(make_checkpoint(50))
    damage(tmp_path / "good-50-0.pt")
    assert states.at(StateId(50, 0)).progress.step == 0
    damage(tmp_path / "good-0-0.pt")
    with pytest.raises(TrainingError, match=r"good-0-0\.pt is missing or damaged"):
        states.at(StateId(50, 0))


def test_a_half_written_checkpoint_does_not_hide_the_one_before(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "key", make_checkpoint(1))
    (tmp_path / ".state.pt.tmp").write_bytes(b"PK\x03\x04 half")
    loaded = load_checkpoint(tmp_path, "key")
    assert loaded is not None
    assert loaded.progress.step == 1


def test_a_damaged_checkpoint_is_as_good_as_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, "key") is None
    save_checkpoint(tmp_path, "key", make_checkpoint(1))
    whole = (tmp_path / "state.pt").read_bytes()
    for damaged in (b"", b"junk", whole[: len(whole) // 2]):
        (tmp_path / "state.pt").write_bytes(damaged)
        assert load_checkpoint(tmp_path, "key") is None
    torch.save({"format": 1, "key": "key", "progress": Path}, tmp_path / "state.pt")  # code, not data
    assert load_checkpoint(tmp_path, "key") is None


def test_the_checkpoint_of_another_run_is_left_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "key", make_checkpoint(1))
    assert load_checkpoint(tmp_path, "other") is None


def test_a_run_is_told_by_its_settings_base_and_data(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    key = run_key(task, DATASET)
    assert key == run_key(task.model_copy(update={"job_id": "another", "job_dir": tmp_path / "elsewhere"}), DATASET)
    assert key != run_key(make_task(tmp_path, config=TrainingConfig(rank=8)), DATASET)
    assert key != run_key(task, DATASET.model_copy(update={"sha256": "e" * 64}))
