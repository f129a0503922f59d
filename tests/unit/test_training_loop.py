import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from peft_core.compute.stop import Stop, Stopped
from peft_core.errors import TrainingError
from peft_core.events import CheckpointSaved, Event, HeldOutMeasured, StepCompleted, StoppedEarly
from peft_core.spec import TrainingConfig
from peft_core.training import lora
from peft_core.training.batches import plan_order
from peft_core.training.checkpoint import Progress, load_checkpoint
from peft_core.training.evaluate import held_out_loss, subset
from peft_core.training.loop import Loop
from peft_core.training.objective import choose_objective
from tests.toys import toy_documents, toy_model

CONFIG = TrainingConfig(rank=4, batch_size=3, max_steps=8, max_length=64, learning_rate=5e-3, dropout=0.1, eval_steps=3)
TRAIN = toy_documents((20, 9, 33, 14, 40, 8, 21, 17, 5, 30), seed=1)
HELD_OUT = toy_documents((25, 12, 30), seed=2)


class Recorder:
    """Takes events; may ask to stop after a step."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[Event] = []
        self.stop = Stop()
        self._stop_after = stop_after

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepCompleted) and event.step == self._stop_after:
            self.stop.request()

    def losses(self) -> dict[int, float]:
        return {event.step: event.loss for event in self.events if isinstance(event, StepCompleted)}

    def held_out(self) -> dict[int, float]:
        return {event.step: event.loss for event in self.events if isinstance(event, HeldOutMeasured)}


def make_loop(directory: Path, recorder: Recorder, config: TrainingConfig = CONFIG) -> Loop:
    torch.manual_seed(config.seed)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    model = toy_model()
    objective = choose_objective(model, config.max_length)
    adapted = lora.attach(model, config, "toy")
    order = plan_order(
        examples=len(TRAIN),
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
    )
    optimizer = lora.build_optimizer(adapted, config)
    return Loop(
        config=config,
        accelerator=accelerator,
        objective=objective,
        weights=lora.weights(adapted),
        optimizer=accelerator.prepare_optimizer(optimizer),
        scheduler=accelerator.prepare_scheduler(lora.build_scheduler(optimizer, config, order.total_steps)),
        documents=TRAIN,
        order=order,
        held_out=HELD_OUT,
        progress=Progress(base_loss=1.0),
        checkpoint_directory=directory,
        run_key="this run",
        emit=recorder,
        stop=recorder.stop,
    )


def uninterrupted(directory: Path, config: TrainingConfig = CONFIG) -> tuple[Recorder, Loop]:
    recorder = Recorder()
    loop = make_loop(directory, recorder, config)
    loop.run()
    return recorder, loop


def test_training_lowers_the_loss_and_tells_of_every_step(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_steps": 60})
    recorder, loop = uninterrupted(tmp_path, config)
    losses = recorder.losses()
    assert list(losses) == list(range(1, 61))
    assert sum(list(losses.values())[-10:]) < sum(list(losses.values())[:10])
    steps = [event for event in recorder.events if isinstance(event, StepCompleted)]
    assert steps[-1].eta_s == pytest.approx(0.0)
    assert steps[-1].tokens == loop.order.tokens([len(document) for document in TRAIN])


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(tmp_path: Path) -> None:
    first, again = (uninterrupted(tmp_path / name)[0].losses() for name in ("a", "b"))
    other = uninterrupted(tmp_path / "c", CONFIG.model_copy(update={"seed": 1}))[0].losses()
    assert first == again
    assert first != other


@pytest.mark.parametrize("step", [1, 3, 7])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path, step: int) -> None:
    expected, expected_loop = uninterrupted(tmp_path / "whole")

    first = Recorder(stop_after=step)
    with pytest.raises(Stopped):
        make_loop(tmp_path / "parts", first).run()
    assert isinstance(first.events[-1], CheckpointSaved)
    checkpoint = load_checkpoint(tmp_path / "parts", "this run")
    assert checkpoint is not None

    second = Recorder()
    loop = make_loop(tmp_path / "parts", second, CONFIG)
    torch.rand(100)  # a new process has drawn other random numbers by now
    loop.restore(checkpoint)
    loop.run()

    assert {**first.losses(), **second.losses()} == expected.losses()
    assert {**first.held_out(), **second.held_out()} == expected.held_out()
    for name, weight in loop.weights.items():
        assert torch.equal(weight, expected_loop.weights[name])


def test_a_stop_within_a_step_leaves_the_state_of_the_last_whole_step(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_length": 8192, "batch_size": 10})
    whole = uninterrupted(tmp_path / "whole", config)[0].losses()
    recorder = Recorder()
    loop = make_loop(tmp_path / "parts", recorder, config)
    loop.run_key = "this run"
    loop._complete_step()
    recorder.stop.request()
    with pytest.raises(Stopped):
        loop.run()
    checkpoint = load_checkpoint(tmp_path / "parts", "this run")
    assert checkpoint is not None
    assert checkpoint.progress.step == 1
    second = Recorder()
    resumed = make_loop(tmp_path / "parts", second, config)
    resumed.restore(checkpoint)
    resumed.run()
    assert {**recorder.losses(), **second.losses()} == whole


def test_early_stopping_keeps_the_best_state(tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={"max_steps": 60, "learning_rate": 5e-2, "early_stopping_patience": 2, "eval_steps": 2, "dropout": 0.0}
    )
    recorder, loop = uninterrupted(tmp_path, config)
    stopped = recorder.events[-2]
    assert isinstance(stopped, StoppedEarly)
    measured = recorder.held_out()
    assert stopped.best_step == min(measured, key=measured.__getitem__)
    assert stopped.step == stopped.best_step + 4
    final = held_out_loss(loop.objective, HELD_OUT, loop.accelerator, Stop())
    assert final == pytest.approx(measured[stopped.best_step], rel=1e-6)


def test_without_patience_the_last_measurement_is_left_to_the_whole_set(tmp_path: Path) -> None:
    recorder, _ = uninterrupted(tmp_path, CONFIG.model_copy(update={"eval_steps": None}))
    assert list(recorder.held_out()) == [2, 4, 6]


def test_a_run_that_diverges_fails_with_the_step_and_what_to_do(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, Recorder())
    next(iter(loop.weights.values())).data.fill_(math.inf)
    with pytest.raises(TrainingError, match="step 1") as caught:
        loop.run()
    assert caught.value.code == "non_finite_loss"
    assert "learning_rate" in str(caught.value)


def test_a_held_out_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, Recorder())
    for weight in loop.weights.values():
        weight.data.fill_(math.nan)
    with pytest.raises(TrainingError, match="held-out"):
        held_out_loss(loop.objective, HELD_OUT, loop.accelerator, Stop())


def test_the_sample_for_measurements_during_training_is_fixed_and_bounded() -> None:
    documents = toy_documents((200,) * 100)
    chosen = subset(documents, seed=0)
    assert 7000 < sum(map(len, chosen)) <= 8192
    assert chosen == subset(documents, seed=0)
    assert set(map(id, subset(HELD_OUT, seed=0))) == set(map(id, HELD_OUT))
    assert len(subset(toy_documents((9000,)), seed=0)) == 1
