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
    RollbackState,
    RollbackStates,
    StateId,
    load_checkpoint,
    run_key,
    save_checkpoint,
    scores_key,
)
from tests.factories import make_request

DATASET = DatasetSummary(
    train_examples=1, held_out_examples=1, train_tokens=1, held_out_tokens=1, files=1, left_out={}, sha256="d" * 64
)


LOWERED = RateLowered(step=7, back_to_step=1, factor=0.25, reason="the loss is nan")


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
        job_id="j", project_id="p", request=make_request(**changes), job_dir=tmp_path, base_models_dir=tmp_path
    )


def test_a_new_checkpoint_replaces_the_previous_one(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, "key", make_checkpoint(step))
    loaded = load_checkpoint(tmp_path, "key")
    assert loaded is not None
    assert loaded.progress == Progress(base_loss=2.5, step=2)
    assert loaded.adapter["a"].tolist() == [[2.0, 2.0], [2.0, 2.0]]
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def test_a_checkpoint_keeps_the_rollback_state_and_the_recent_events(tmp_path: Path) -> None:
    rollback = RollbackState(target=StateId(1, 0), history=(LOWERED,))
    save_checkpoint(tmp_path, "key", replace(make_checkpoint(5), rollback=rollback, recent=(LOWERED,)))
    loaded = load_checkpoint(tmp_path, "key")
    assert loaded is not None
    assert loaded.rollback == rollback
    assert loaded.recent == (LOWERED,)


def test_rollback_states_are_kept_while_the_checkpoint_names_them_and_the_start_always(tmp_path: Path) -> None:
    states = RollbackStates(tmp_path, "key")
    rollback = RollbackState(history=(LOWERED,))
    after_rollback = replace(make_checkpoint(50), rollback=rollback)  # the same step at a lower rate
    for state in (make_checkpoint(0), make_checkpoint(50)):
        states.save(state)
    states.set_checkpointed(StateId(50, 0))
    for state in (make_checkpoint(100), make_checkpoint(150), after_rollback):
        states.save(state)
    assert {path.name for path in tmp_path.iterdir()} == {"good-0-0.pt", "good-50-0.pt", "good-50-1.pt"}
    histories = [states.load(state_id).rollback.history for state_id in (StateId(50, 0), StateId(50, 1))]
    assert histories == [(), (LOWERED,)]
    assert states.load(StateId(50, 0)).adapter["a"].tolist() == [[50.0, 50.0], [50.0, 50.0]]
    states.set_checkpointed(StateId(50, 1))
    assert {path.name for path in tmp_path.iterdir()} == {"good-0-0.pt", "good-50-1.pt"}
    assert states.load(START).progress.step == 0


def test_the_next_rollback_goes_to_the_start_if_the_last_one_went_to_the_same_state() -> None:
    assert RollbackState(target=StateId(50, 0)).next_target == StateId(50, 0)
    assert RollbackState(target=StateId(1, 0), history=(LOWERED,)).next_target == START
    assert RollbackState(target=StateId(50, 1), history=(LOWERED,)).next_target == StateId(50, 1)


def test_a_partly_written_rollback_state_is_overwritten(tmp_path: Path) -> None:
    states = RollbackStates(tmp_path, "key")
    states.save(make_checkpoint(0))
    (tmp_path / ".state.pt.tmp").write_bytes(b"PK\x03\x04 half")
    states.save(make_checkpoint(50))
    assert {path.name for path in tmp_path.iterdir()} == {"good-0-0.pt", "good-50-0.pt"}


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b"PK\x03\x04 half")])
def test_an_unreadable_rollback_state_falls_back_to_the_start_and_an_unreadable_start_is_an_error(
    tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    states = RollbackStates(tmp_path, "key")
    states.save(make_checkpoint(0))
    states.save(make_checkpoint(50))
    damage(tmp_path / "good-50-0.pt")
    assert states.load(StateId(50, 0)).progress.step == 0
    damage(tmp_path / "good-0-0.pt")
    with pytest.raises(TrainingError, match=r"good-0-0\.pt is missing or damaged"):
        states.load(StateId(50, 0))


def test_a_partly_written_checkpoint_does_not_hide_the_previous_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "key", make_checkpoint(1))
    (tmp_path / ".state.pt.tmp").write_bytes(b"PK\x03\x04 half")
    loaded = load_checkpoint(tmp_path, "key")
    assert loaded is not None
    assert loaded.progress.step == 1


def test_a_missing_or_damaged_checkpoint_loads_as_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, "key") is None
    save_checkpoint(tmp_path, "key", make_checkpoint(1))
    intact = (tmp_path / "state.pt").read_bytes()
    for damaged in (b"", b"junk", intact[: len(intact) // 2]):
        (tmp_path / "state.pt").write_bytes(damaged)
        assert load_checkpoint(tmp_path, "key") is None
    # `Path` is a class, which only unpickling with code execution would load.
    torch.save({"format": 1, "key": "key", "progress": Path}, tmp_path / "state.pt")
    assert load_checkpoint(tmp_path, "key") is None


def test_the_checkpoint_of_another_run_is_not_loaded(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "key", make_checkpoint(1))
    assert load_checkpoint(tmp_path, "other") is None


def test_the_run_key_depends_on_settings_base_model_and_data_only(tmp_path: Path) -> None:
    task = make_task(tmp_path)
    key = run_key(task, DATASET)
    assert key == run_key(task.model_copy(update={"job_id": "another", "job_dir": tmp_path / "elsewhere"}), DATASET)
    assert key != run_key(make_task(tmp_path, config=TrainingConfig(rank=8)), DATASET)
    assert key != run_key(task, DATASET.model_copy(update={"sha256": "e" * 64}))


def test_scores_are_kept_for_one_device_and_number_format_and_the_same_searched_code(tmp_path: Path) -> None:
    key = run_key(make_task(tmp_path), DATASET)
    places = [("cpu", "float32", 0), ("cuda", "float32", 0), ("cuda", "bfloat16", 0), ("cuda", "bfloat16", 1)]
    assert len({scores_key(key, *place) for place in places}) == 4
    assert scores_key(key, "cpu", "float32", 0) != scores_key("another", "cpu", "float32", 0)
