import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from peft_core.errors import TrainingError
from peft_core.evaluation.worker.scoring import held_out_loss, sample_for_training
from peft_core.modeling.activation_arena import ActivationArena
from peft_core.modeling.batches import MicroBatch, plan_order
from peft_core.modeling.objective import Objective, probe_fast_paths
from peft_core.schemas.events import (
    CheckpointSaved,
    Event,
    HeldOutMeasured,
    MemorySaved,
    RateLowered,
    StepCompleted,
    StoppedEarly,
)
from peft_core.schemas.training import TrainingConfig
from peft_core.system.cancellation import Cancelled, StopFlag
from peft_core.system.failures import error_info
from peft_core.training import lora
from peft_core.training.checkpoint import Progress, load_checkpoint
from peft_core.training.loop import TrainingLoop
from peft_core.worker.__main__ import TRAINING
from tests.tiny_models import tiny_documents, tiny_model

CONFIG = TrainingConfig(rank=4, batch_size=3, max_steps=8, max_length=64, learning_rate=5e-3, dropout=0.1, eval_steps=3)
TRAIN = tiny_documents((20, 9, 33, 14, 40, 8, 21, 17, 5, 30), seed=1)
HELD_OUT = tiny_documents((25, 12, 30), seed=2)


class Recorder:
    """Records events; requests a stop after a given number of steps, which includes repeated ones."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[Event] = []
        self.stop = StopFlag()
        self._stop_after = stop_after

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepCompleted) and len(self.steps()) == self._stop_after:
            self.stop.request()

    def steps(self) -> list[StepCompleted]:
        return [event for event in self.events if isinstance(event, StepCompleted)]

    def losses(self) -> dict[int, float]:
        return {event.step: event.loss for event in self.steps()}

    def lowered(self) -> list[tuple[int, int, float]]:
        """Return (step of divergence, step rolled back to, share of the learning rate) of every rollback."""
        return [(e.step, e.back_to_step, e.factor) for e in self.events if isinstance(e, RateLowered)]

    def held_out(self) -> dict[int, float]:
        return {event.step: event.loss for event in self.events if isinstance(event, HeldOutMeasured)}


def make_loop(directory: Path, recorder: Recorder, config: TrainingConfig = CONFIG) -> TrainingLoop:
    torch.manual_seed(config.seed)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    model = tiny_model()
    objective = probe_fast_paths(model, config.max_length)
    adapted = lora.attach(model, config, "tiny")
    order = plan_order(
        examples=len(TRAIN),
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
    )
    optimizer = lora.build_optimizer(adapted, config)
    return TrainingLoop(
        config=config,
        accelerator=accelerator,
        objective=objective,
        weights=lora.weights(adapted),
        optimizer=accelerator.prepare_optimizer(optimizer),
        scheduler=accelerator.prepare_scheduler(lora.build_scheduler(optimizer, config, order.total_steps)),
        documents=TRAIN,
        order=order,
        held_out=HELD_OUT,
        progress=Progress(base_loss=5.0),
        checkpoint_directory=directory,
        run_key="this run",
        emit=recorder,
        stop=recorder.stop,
    )


def uninterrupted(directory: Path, config: TrainingConfig = CONFIG) -> tuple[Recorder, TrainingLoop]:
    recorder = Recorder()
    loop = make_loop(directory, recorder, config)
    loop.run()
    return recorder, loop


def test_training_lowers_the_loss_and_emits_an_event_for_every_step(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_steps": 60})
    recorder, loop = uninterrupted(tmp_path, config)
    losses = recorder.losses()
    assert list(losses) == list(range(1, 61))
    assert sum(list(losses.values())[-10:]) < sum(list(losses.values())[:10])
    steps = [event for event in recorder.events if isinstance(event, StepCompleted)]
    assert steps[-1].eta_s == pytest.approx(0.0)
    assert steps[-1].tokens == loop.order.tokens([len(document) for document in TRAIN])


def test_losses_are_reproducible_for_the_same_seed_and_differ_for_another(tmp_path: Path) -> None:
    first, again = (uninterrupted(tmp_path / name)[0].losses() for name in ("a", "b"))
    other = uninterrupted(tmp_path / "c", CONFIG.model_copy(update={"seed": 1}))[0].losses()
    assert first == again
    assert first != other


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_resumed_run_continues_exactly_as_if_it_had_not_been_interrupted(tmp_path: Path, step: int) -> None:
    expected, expected_loop = uninterrupted(tmp_path / "uninterrupted")

    first = Recorder(stop_after=step)
    with pytest.raises(Cancelled):
        make_loop(tmp_path / "resumed", first).run()
    assert isinstance(first.events[-1], CheckpointSaved)
    checkpoint = load_checkpoint(tmp_path / "resumed", "this run")
    assert checkpoint is not None

    second = Recorder()
    loop = make_loop(tmp_path / "resumed", second, CONFIG)
    torch.rand(100)  # a new process has a different generator state
    loop.restore(checkpoint)
    loop.run()

    assert {**first.losses(), **second.losses()} == expected.losses()
    assert {**first.held_out(), **second.held_out()} == expected.held_out()
    for name, weight in loop.weights.items():
        assert torch.equal(weight, expected_loop.weights[name])


def test_a_resumed_run_compares_with_the_base_loss_that_it_measured_itself(tmp_path: Path) -> None:
    first = Recorder(stop_after=3)
    with pytest.raises(Cancelled):
        make_loop(tmp_path, first).run()
    checkpoint = load_checkpoint(tmp_path, "this run")
    assert checkpoint is not None
    loop = make_loop(tmp_path, Recorder())
    loop.progress.base_loss = 4.75  # on another device, say
    loop.restore(checkpoint)
    assert (loop.progress.step, loop.progress.base_loss) == (3, 4.75)


def test_a_stop_in_the_middle_of_a_step_checkpoints_the_last_completed_step(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_length": 8192, "batch_size": 10})
    reference = uninterrupted(tmp_path / "uninterrupted", config)[0].losses()
    recorder = Recorder()
    loop = make_loop(tmp_path / "resumed", recorder, config)
    loop.run_key = "this run"
    loop.train_step()
    recorder.stop.request()
    with pytest.raises(Cancelled):
        loop.run()
    checkpoint = load_checkpoint(tmp_path / "resumed", "this run")
    assert checkpoint is not None
    assert checkpoint.progress.step == 1
    second = Recorder()
    resumed = make_loop(tmp_path / "resumed", second, config)
    resumed.restore(checkpoint)
    resumed.run()
    assert {**recorder.losses(), **second.losses()} == reference


def test_early_stopping_ends_with_the_best_weights(tmp_path: Path) -> None:
    config = CONFIG.model_copy(
        update={"max_steps": 60, "learning_rate": 5e-2, "early_stopping_patience": 2, "eval_steps": 2, "dropout": 0.0}
    )
    recorder, loop = uninterrupted(tmp_path, config)
    stopped = recorder.events[-2]
    assert isinstance(stopped, StoppedEarly)
    measured = recorder.held_out()
    assert stopped.best_step == min(measured, key=measured.__getitem__)
    assert stopped.step == stopped.best_step + 4
    final = held_out_loss(loop.objective, HELD_OUT, loop.accelerator, StopFlag())
    assert final == pytest.approx(measured[stopped.best_step], rel=1e-6)
    assert loop.step_of_weights == stopped.best_step


def test_only_documents_of_the_steps_that_led_to_the_weights_have_been_seen(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_steps": 2, "eval_steps": 1, "early_stopping_patience": 2})
    _, loop = uninterrupted(tmp_path, config)
    loop.progress.best_step = 1
    assert list(map(id, loop.seen)) == [id(TRAIN[index]) for index in sorted(loop.order.step(1))]
    loop.best = None  # as without early stopping
    assert len(loop.seen) == 6


def test_the_loop_does_not_evaluate_after_the_last_step_without_early_stopping(tmp_path: Path) -> None:
    recorder, _ = uninterrupted(tmp_path, CONFIG.model_copy(update={"eval_steps": None}))
    assert list(recorder.held_out()) == [2, 4, 6]


def test_a_last_step_with_fewer_examples_counts_as_many_passes_as_it_shows(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_steps": None, "num_epochs": 1.0})
    _, loop = uninterrupted(tmp_path, config)
    assert loop.progress.step * config.batch_size > loop.order.shown == 10
    assert loop.passes == 1.0
    loop.progress.step = 3
    assert loop.passes == 0.9


@dataclass
class Overflowing(Objective):
    """Overflows as a 16-bit number format would: returns inf once a weight of LoRA B exceeds the limit."""

    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)
    limit: float = math.inf

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        largest = max(float(weight.detach().abs().max()) for name, weight in self.weights.items() if "lora_B" in name)
        return super().loss(batch) * (math.inf if largest > self.limit else 1.0)


@dataclass
class Faulty(Objective):
    """Returns NaN in the calls with these numbers (0-based), counted either in training or in evaluations."""

    calls: tuple[int, ...] = ()
    training: bool = True
    made: list[bool] = field(default_factory=list)

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        loss = super().loss(batch)
        if self.model.training != self.training:
            return loss
        self.made.append(True)
        return loss * math.nan if len(self.made) - 1 in self.calls else loss


@dataclass
class MemoryLimited(Objective):
    """Runs out of memory for micro-batches of more than `max_tokens`; with gradient checkpointing, of four times as many."""

    max_tokens: int = 1 << 60

    def loss(self, batch: MicroBatch) -> torch.Tensor:
        loss = super().loss(batch)
        if self.model.training and batch.tokens > self.max_tokens * (4 if self.recomputes else 1):
            loss = loss + torch.empty(1 << 50).sum()  # a petabyte
        return loss


def limit_memory(loop: TrainingLoop, max_tokens: int) -> TrainingLoop:
    loop.objective = MemoryLimited(**vars(loop.objective), max_tokens=max_tokens)
    return loop


def overflow_above(loop: TrainingLoop, limit: float) -> TrainingLoop:
    loop.objective = Overflowing(**vars(loop.objective), weights=loop.weights, limit=limit)
    return loop


def make_faulty(loop: TrainingLoop, *calls: int, training: bool = True) -> TrainingLoop:
    loop.objective = Faulty(**vars(loop.objective), calls=calls, training=training)
    return loop


@pytest.fixture
def save_rollback_state_every_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_core.training.loop._ROLLBACK_SAVE_STEPS", 2)


def test_a_diverged_run_rolls_back_and_completes_with_a_quarter_of_the_learning_rate(tmp_path: Path) -> None:
    expected = uninterrupted(tmp_path / "plain")[0].steps()
    recorder = Recorder()
    loop = overflow_above(make_loop(tmp_path / "overflowing", recorder), limit=0.1)
    loop.run()

    [(diverged_at, back_to, factor)] = recorder.lowered()
    assert (back_to, factor) == (0, 0.25)
    before, again = recorder.steps()[: diverged_at - 1], recorder.steps()[diverged_at - 1 :]
    assert len(before) > 1
    assert [event.loss for event in before] == [event.loss for event in expected[: diverged_at - 1]]
    assert [event.step for event in again] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert again[0].loss == expected[0].loss  # the same examples and dropout masks
    assert [event.learning_rate for event in again] == [event.learning_rate / 4 for event in expected]
    assert again[-1].tokens == expected[-1].tokens
    assert [event.factor for event in loop.rollback.history] == [0.25]


def test_a_learning_rate_that_is_still_too_high_is_lowered_a_second_time(tmp_path: Path) -> None:
    expected = uninterrupted(tmp_path / "plain")[0].steps()
    recorder = Recorder()
    overflow_above(make_loop(tmp_path / "overflowing", recorder), limit=0.03).run()
    assert [factor for _, _, factor in recorder.lowered()] == [0.25, 0.0625]
    assert [event.learning_rate for event in recorder.steps()[-8:]] == [e.learning_rate / 16 for e in expected]


def test_a_third_divergence_is_an_error_that_names_step_attempts_and_cause(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(TrainingError) as caught:
        overflow_above(make_loop(tmp_path, recorder), limit=0.006).run()
    error = caught.value
    assert error.code == "non_finite_loss"
    assert [factor for _, _, factor in recorder.lowered()] == [0.25, 0.0625]
    step = error.details["step"]
    assert step == recorder.steps()[-1].step + 1
    assert f"diverged at step {step}: the loss is inf" in error.message
    assert "from step 0 with 1/4 of the rate" in error.message
    assert "from step 0 with 1/16 of the rate" in error.message
    assert "The learning rate is probably too high" in error.message
    assert any("learning_rate" in suggestion for suggestion in error.suggestions)


def test_an_absurd_learning_rate_fails_after_two_rollbacks(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"learning_rate": 1e20})
    recorder = Recorder()
    with pytest.raises(TrainingError, match="rate is probably too high"):
        make_loop(tmp_path, recorder, config).run()
    assert [(back, factor) for _, back, factor in recorder.lowered()] == [(0, 0.25), (0, 0.0625)]


def test_the_learning_rate_is_not_blamed_if_no_update_preceded_the_divergence(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(TrainingError, match="The learning rate is not the cause") as caught:
        overflow_above(make_loop(tmp_path, recorder), limit=-1.0).run()
    assert recorder.lowered() == [(1, 0, 0.25), (1, 0, 0.0625)]
    assert not any("learning_rate" in suggestion for suggestion in caught.value.suggestions)


@pytest.mark.usefixtures("save_rollback_state_every_two_steps")
def test_a_rollback_goes_to_the_last_state_that_was_verified_to_be_good(tmp_path: Path) -> None:
    expected = uninterrupted(tmp_path / "plain")[0].steps()
    recorder = Recorder()
    loop = make_faulty(make_loop(tmp_path / "faulty", recorder), 5)  # a step has one micro-batch, so this is step 6
    loop.run()
    assert recorder.lowered() == [(6, 4, 0.25)]
    steps = recorder.steps()
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert steps[5].loss == steps[4].loss
    assert [event.learning_rate for event in steps[5:]] == [event.learning_rate / 4 for event in expected[4:]]
    assert steps[5].tokens == steps[4].tokens


@pytest.mark.usefixtures("save_rollback_state_every_two_steps")
def test_a_run_leaves_its_rollback_states_next_to_its_checkpoint(tmp_path: Path) -> None:
    uninterrupted(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"state.pt", "good-0-0.pt", "good-6-0.pt"}


@pytest.mark.usefixtures("save_rollback_state_every_two_steps")
def test_a_second_divergence_from_the_same_state_rolls_back_to_the_start(tmp_path: Path) -> None:
    recorder = Recorder()
    make_faulty(make_loop(tmp_path, recorder), 5, 7).run()  # the second fault is in the second step after the rollback
    assert recorder.lowered() == [(6, 4, 0.25), (6, 0, 0.0625)]
    assert recorder.steps()[-1].step == 8


@pytest.mark.usefixtures("save_rollback_state_every_two_steps")
def test_a_second_rollback_goes_to_a_newer_good_state_if_there_is_one(tmp_path: Path) -> None:
    expected = uninterrupted(tmp_path / "plain")[0].steps()
    recorder = Recorder()
    make_faulty(make_loop(tmp_path / "faulty", recorder), 2, 7).run()  # steps 1, 2, fault, 1, 2, 3, 4, fault, 3, ...
    assert recorder.lowered() == [(3, 0, 0.25), (5, 2, 0.0625)]
    assert recorder.steps()[-1].learning_rate == expected[-1].learning_rate / 16


@pytest.mark.usefixtures("save_rollback_state_every_two_steps")
def test_a_state_with_a_loss_far_above_the_base_model_is_not_saved_as_good(tmp_path: Path) -> None:
    recorder = Recorder()
    loop = make_faulty(make_loop(tmp_path, recorder), 5)
    loop.progress.base_loss = 1.0
    loop.run()
    assert recorder.lowered() == [(6, 0, 0.25)]


def test_a_held_out_loss_that_is_not_finite_causes_a_rollback(tmp_path: Path) -> None:
    recorder = Recorder()
    make_faulty(make_loop(tmp_path, recorder), 0, training=False).run()
    assert recorder.lowered() == [(3, 0, 0.25)]
    assert list(recorder.held_out()) == [3, 6]
    reasons = [event.reason for event in recorder.events if isinstance(event, RateLowered)]
    assert reasons == ["the loss on the held-out examples is nan"]


@pytest.mark.usefixtures("save_rollback_state_every_two_steps")
@pytest.mark.parametrize("stop_after", range(1, 12))
def test_a_run_with_rollbacks_resumes_exactly_at_any_step(tmp_path: Path, stop_after: int) -> None:
    """The interruption falls before the first divergence, between the two, or after them."""
    limit = 0.03
    expected = Recorder()
    reference = overflow_above(make_loop(tmp_path / "uninterrupted", expected), limit)
    reference.run()
    assert len(expected.lowered()) == 2
    assert len(expected.steps()) >= 11

    first = Recorder(stop_after)
    with pytest.raises(Cancelled):
        overflow_above(make_loop(tmp_path / "resumed", first), limit).run()
    checkpoint = load_checkpoint(tmp_path / "resumed", "this run")
    assert checkpoint is not None
    second = Recorder()
    loop = overflow_above(make_loop(tmp_path / "resumed", second), limit)
    torch.rand(100)
    loop.restore(checkpoint)
    loop.run()

    def facts(*recorders: Recorder) -> list[tuple[float, ...]]:
        steps = [(event.step, event.loss, event.learning_rate) for r in recorders for event in r.steps()]
        return [*steps, *(lowered for r in recorders for lowered in r.lowered())]

    assert facts(first, second) == facts(expected)
    assert loop.rollback.history == reference.rollback.history
    for name, weight in loop.weights.items():
        assert torch.equal(weight, reference.weights[name])


class Killed(Exception):
    """Stands in for SIGKILL: nothing is saved."""


@pytest.mark.usefixtures("save_rollback_state_every_two_steps")
@pytest.mark.parametrize(("saved_after", "killed_after"), [(1, 4), (3, 9), (6, 8), (6, 12)])
def test_a_killed_run_resumes_from_a_checkpoint_that_is_older_than_its_rollback_states(
    tmp_path: Path, saved_after: int, killed_after: int
) -> None:
    limit = 0.03
    expected = Recorder()
    overflow_above(make_loop(tmp_path / "uninterrupted", expected), limit).run()
    assert len(expected.lowered()) == 2

    first = Recorder()
    loop = overflow_above(make_loop(tmp_path / "resumed", first), limit)

    def emit(event: Event) -> None:
        first(event)
        if len(first.steps()) == killed_after:
            raise Killed

    loop.emit = emit
    loop.clock = lambda: 100.0 * (len(first.steps()) >= saved_after)  # exactly one checkpoint is due
    with pytest.raises(Killed):
        loop.run()
    checkpoint = load_checkpoint(tmp_path / "resumed", "this run")
    assert checkpoint is not None

    second = Recorder()
    loop = overflow_above(make_loop(tmp_path / "resumed", second), limit)
    loop.restore(checkpoint)
    loop.run()
    steps, reference = (
        [(event.step, event.loss, event.learning_rate) for event in r.steps()] for r in (second, expected)
    )
    assert len(loop.rollback.history) == 2
    assert steps[-1][0] == 8
    assert steps == reference[saved_after:]


PLAIN = CONFIG.model_copy(update={"dropout": 0.0})  # dropout masks depend on the micro-batches


@pytest.mark.parametrize(("max_tokens", "reductions"), [(45, [(40, False)]), (11, [(40, False), (40, True)])])
def test_a_step_that_runs_out_of_memory_is_repeated_with_less_memory_and_the_same_result(
    tmp_path: Path, max_tokens: int, reductions: list[tuple[int, bool]]
) -> None:
    expected, reference = uninterrupted(tmp_path / "plain", PLAIN)
    recorder = Recorder()
    loop = limit_memory(make_loop(tmp_path / "limited", recorder, PLAIN), max_tokens)
    loop.activation_arena = ActivationArena(loop.objective.model)
    arenas: list[ActivationArena | None] = []

    def emit(event: Event) -> None:
        recorder(event)
        if isinstance(event, MemorySaved):
            arenas.append(loop.activation_arena)

    loop.emit = emit
    loop.run()
    assert arenas == [None] * len(reductions)
    saved = [event for event in recorder.events if isinstance(event, MemorySaved)]
    assert [(event.tokens_at_once, event.layers_computed_twice) for event in saved] == reductions
    assert "you tried to allocate" in saved[0].reason
    assert loop.memory_saved == tuple(saved)
    assert recorder.losses() == pytest.approx(expected.losses(), rel=1e-5)
    for name, weight in loop.weights.items():
        assert torch.allclose(weight, reference.weights[name], atol=1e-4)


def test_the_activation_arena_does_not_change_any_result(tmp_path: Path) -> None:
    expected, reference = uninterrupted(tmp_path / "plain")
    recorder = Recorder()
    loop = make_loop(tmp_path / "arena", recorder)
    loop.activation_arena = arena = ActivationArena(loop.objective.model)
    loop.run()
    assert arena.nbytes > 0
    assert recorder.losses() == expected.losses()
    assert all(torch.equal(weight, reference.weights[name]) for name, weight in loop.weights.items())


def test_running_out_of_memory_before_the_first_micro_batch_is_reported_as_such(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, Recorder(), PLAIN)

    def out_of_memory(*_: object) -> None:
        torch.empty(1 << 50)

    loop.objective.batches = out_of_memory  # type: ignore[method-assign,assignment]  # really requests a petabyte
    with pytest.raises(RuntimeError, match="you tried to allocate"):
        loop.run()
    assert loop.objective.recomputes


def test_running_out_of_memory_with_minimal_memory_use_ends_the_run(tmp_path: Path) -> None:
    recorder = Recorder()
    with pytest.raises(RuntimeError, match="you tried to allocate") as caught:
        limit_memory(make_loop(tmp_path, recorder, PLAIN), 9).run()
    problem = error_info(caught.value, TRAINING)
    assert problem.code == "out_of_memory"
    assert "Lower rank" in problem.suggestions[0]


def test_a_resumed_run_starts_with_the_reduced_memory_use(tmp_path: Path) -> None:
    with pytest.raises(Cancelled):
        limit_memory(make_loop(tmp_path, Recorder(stop_after=3), PLAIN), 11).run()
    checkpoint = load_checkpoint(tmp_path, "this run")
    assert checkpoint is not None
    assert len(checkpoint.memory_saved) == 2
    recorder = Recorder()
    loop = limit_memory(make_loop(tmp_path, recorder, PLAIN), 11)
    loop.activation_arena = ActivationArena(loop.objective.model)
    loop.restore(checkpoint)
    assert loop.activation_arena is None
    assert (loop.objective.capacity, loop.objective.recomputes) == (40, True)
    loop.run()
    assert not [event for event in recorder.events if isinstance(event, MemorySaved)]
    assert loop.memory_saved == checkpoint.memory_saved


def test_a_held_out_loss_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    loop = make_loop(tmp_path, Recorder())
    for weight in loop.weights.values():
        weight.data.fill_(math.nan)
    with pytest.raises(TrainingError, match="held-out"):
        held_out_loss(loop.objective, HELD_OUT, loop.accelerator, StopFlag())


def test_the_sample_for_evaluations_during_training_is_fixed_and_bounded() -> None:
    documents = tiny_documents((200,) * 100)
    chosen = sample_for_training(documents, seed=0)
    assert 7000 < sum(map(len, chosen)) <= 8192
    assert chosen == sample_for_training(documents, seed=0)
    assert set(map(id, sample_for_training(HELD_OUT, seed=0))) == set(map(id, HELD_OUT))
    assert len(sample_for_training(tiny_documents((9000,)), seed=0)) == 1
