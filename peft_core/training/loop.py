"""The training loop: optimiser steps, evaluations, checkpoints, and recovery from divergence.

The loss of a step is the mean over all target tokens of its examples. Each micro-batch contributes its sum divided by that
number of tokens, and processes add up their gradients, so packing and the number of processes change only the rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from peft_core.errors import NonFiniteError, TrainingError
from peft_core.evaluation.worker.scoring import held_out_loss
from peft_core.modeling.activation_arena import ActivationArena
from peft_core.modeling.batches import Document, Order
from peft_core.modeling.device import rng_state, set_rng_state
from peft_core.modeling.memory import peak_memory_bytes, return_freed_memory, set_malloc_trim, trim_if_above
from peft_core.modeling.mps import release_cache
from peft_core.modeling.objective import Objective
from peft_core.schemas.events import (
    CheckpointSaved,
    Emit,
    Event,
    HeldOutMeasured,
    MemorySaved,
    RateLowered,
    StepCompleted,
    StoppedEarly,
)
from peft_core.schemas.training import TrainingConfig
from peft_core.system.cancellation import Cancelled, StopFlag
from peft_core.system.failures import describe_error, is_out_of_memory
from peft_core.training.checkpoint import (
    START,
    Checkpoint,
    Progress,
    RollbackState,
    RollbackStates,
    StateId,
    Tensors,
    save_checkpoint,
)

_CHECKPOINT_INTERVAL_S = 60.0
_DEFAULT_EVALUATIONS = 4  # in a run, including the one after training, unless eval_steps is set

# A run that diverges is rolled back to its last good state and continues with a quarter of the learning rate, at most twice.
# A rate that is too high is rarely so by more than a factor of 16; what overflows even then has another cause.
_ROLLBACK_RATE_FACTOR = 0.25
_MAX_ROLLBACKS = 2
# Steps between two saved states. Fewer would not help, because the last steps before an overflow are lost already (a tiny model
# went from a gradient norm of 0.06 to infinity in one step, at an inconspicuous loss); more would repeat too much work.
# Counted in steps rather than seconds, so that a repeated run rolls back to the same step.
_ROLLBACK_SAVE_STEPS = 50
# Exploding weights pass through large finite losses first. A state whose loss exceeds the base model's by more than this
# (a factor of e in perplexity) is not saved as good.
ROLLBACK_MAX_LOSS_INCREASE = 1.0


@dataclass
class TrainingLoop:
    """One run and all state that changes during it."""

    config: TrainingConfig
    accelerator: Accelerator
    objective: Objective
    weights: dict[str, nn.Parameter]  # the adapter's
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    documents: Sequence[Document]
    order: Order
    held_out: Sequence[Document]  # evaluated during training; a sample if the held-out set is large
    progress: Progress
    checkpoint_directory: Path
    run_key: str
    emit: Emit
    stop: StopFlag
    clock: Callable[[], float] = time.monotonic
    between_steps: Callable[[], None] = lambda: None  # called after every step
    activation_arena: ActivationArena | None = None  # dropped when memory runs out
    best: Tensors | None = None  # weights at the best evaluation, if early stopping is on
    rollback: RollbackState = field(default_factory=RollbackState)
    memory_saved: tuple[MemorySaved, ...] = ()

    def __post_init__(self) -> None:
        # The runner may have died before it stored the latest events. Checkpoints therefore carry those since the previous
        # checkpoint, and those of the interval before, for a resumed run to emit again.
        self._work_afterwards = 0.0
        self._events: list[Event] = []
        self._previous_events: list[Event] = []
        self._rng = rng_state(self.accelerator.device)
        self._rollback_states = RollbackStates(self.checkpoint_directory, self.run_key)
        self._longest = max(map(len, self.documents))
        self.planned_tokens = self.order.tokens([len(document) for document in self.documents])

    @property
    def passes(self) -> float:
        """How often the steps so far went over the data."""
        return self.order.shown_by(self.progress.step) / len(self.documents)

    @property
    def step_of_weights(self) -> int:
        """The step whose weights `run` ends with."""
        return self.progress.step if self.best is None else self.progress.best_step

    @property
    def seen(self) -> list[Document]:
        """The documents that the weights which `run` ends with were trained on, each once."""
        return [self.documents[index] for index in self.order.seen_by(self.step_of_weights)]

    def run(self, *, work_afterwards: float = 0.0) -> None:
        """Run all remaining steps. The weights are then the last ones, or the best ones if early stopping is on.

        `work_afterwards`: what follows the last step, in tokens of training; the expected end of the job includes it.

        Raises:
            TrainingError: the loss or gradient is not finite, and rollbacks did not help.
            Cancelled: on request, after writing a checkpoint.
        """
        self._work_afterwards = work_afterwards
        self.objective.model.train()
        if self.state_id == START:
            self.save_rollback_state()  # nothing is trained yet: the loss of base model or parent, which is finite
            # kill-point: worker: the start state is in its place
        saved_at = self.clock()
        try:
            while True:
                try:
                    self.maybe_evaluate()
                    if self.progress.stopped_early or self.progress.step >= self.order.total_steps:
                        break
                    # kill-point: worker: a step is about to start (pass 2)
                    self.train_step()
                    # kill-point: worker: a step is complete (pass 3)
                except Diverged as divergence:
                    self.roll_back(divergence)
                if self.clock() - saved_at > _CHECKPOINT_INTERVAL_S:
                    self.save_checkpoint()
                    saved_at = self.clock()
                self._check_stop()
                self.between_steps()
        except Cancelled:
            self.save_checkpoint()
            raise
        self.save_checkpoint()
        self.activation_arena = None
        if self.best is not None:
            self._set_weights(self.best)

    # ---- One step

    def train_step(self) -> None:
        """Run one optimiser step: gradients of all micro-batches, update, event."""
        began = self.clock()
        accelerator, step = self.accelerator, self.progress.step + 1
        examples = [self.documents[index] for index in self.order.step(step)]
        targets = sum(example.targets for example in examples)
        share = examples[accelerator.process_index :: accelerator.num_processes]

        # 1. Gradients of the mean over the target tokens of all processes.
        while (loss := self.forward_backward(share, targets)) is None:
            self.optimizer.zero_grad()
            return_freed_memory()
            release_cache(accelerator.device)
            if accelerator.num_processes == 1:
                self.stop.check()
        # kill-point: worker: the gradients of a step are computed (pass 2)
        self.all_reduce_gradients()
        loss_value = accelerator.reduce(loss, reduction="sum").item()

        # 2. Update.
        norm = accelerator.clip_grad_norm_(list(self.weights.values()), self.config.max_grad_norm)
        check_finite(step, loss_value, float(norm))
        paused = self.clock()
        self.maybe_save_rollback_state(loss_value)
        began += self.clock() - paused  # writing a file does not count as training time
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        release_cache(accelerator.device)

        # 3. Progress.
        progress = self.progress
        progress.step = step
        progress.tokens += sum(len(example) for example in examples)
        progress.seconds += self.clock() - began
        self._rng = rng_state(accelerator.device)
        tokens_per_second = progress.tokens / max(progress.seconds, 1e-9)
        self._emit(
            StepCompleted(
                step=step,
                loss=loss_value,
                learning_rate=learning_rate,
                tokens=progress.tokens,
                tokens_per_second=tokens_per_second,
                eta_s=(self.planned_tokens - progress.tokens + self._work_afterwards) / tokens_per_second,
                memory_bytes=peak_memory_bytes(),
            )
        )

    def forward_backward(self, examples: Sequence[Document], targets: int) -> torch.Tensor | None:
        """Add the gradients of this process's examples to the weights and return its share of the loss.

        Returns None if memory ran out. Memory use has then been reduced, and the caller can try the step again.
        """
        accelerator = self.accelerator
        loss = torch.zeros((), device=accelerator.device)
        tokens = self.objective.capacity
        try:
            for batch in self.objective.batches(examples, accelerator.device):
                tokens = batch.tokens
                arena = self.activation_arena
                with arena.of_one_pass() if arena else nullcontext(), accelerator.autocast():
                    batch_loss = self.objective.loss(batch) / targets
                accelerator.backward(batch_loss)
                loss += batch_loss.detach()
                trim_if_above()
                if accelerator.num_processes == 1 and self.stop.requested:
                    self.optimizer.zero_grad()
                    raise Cancelled
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or not self.objective.reduce_memory(tokens, self._longest):
                raise
            reason = describe_error(error)
        else:
            return loss
        # Outside the handler, where the traceback no longer keeps the failed step's tensors alive.
        self.activation_arena = None
        event = MemorySaved(
            step=self.progress.step + 1,
            tokens_at_once=self.objective.capacity,
            layers_computed_twice=self.objective.recomputes,
            reason=reason,
        )
        self.memory_saved = (*self.memory_saved, event)
        self._emit(event)
        return None

    def all_reduce_gradients(self) -> None:
        """Add up the gradients of all processes.

        DistributedDataParallel is not used for this: it averages, it needs the forward pass of a wrapper where the objective
        calls the decoder, and a process without examples in the last step would make the others wait forever.
        """
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.weights.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="sum")
        for parameter, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = summed.view_as(parameter)

    # ---- Evaluation and early stopping

    def maybe_evaluate(self) -> None:
        """Measure the held-out loss every `eval_steps` steps.

        After the last step only early stopping needs it, because the whole held-out set is evaluated next anyway.
        """
        progress, total, patience = self.progress, self.order.total_steps, self.config.early_stopping_patience
        every = self.config.eval_steps or max(1, -(-total // _DEFAULT_EVALUATIONS))
        at_end = progress.step == total
        due = patience is not None if at_end else progress.step % every == 0
        if not due or progress.measured_at == progress.step:
            return
        try:
            loss = held_out_loss(self.objective, self.held_out, self.accelerator, self.stop)
        except NonFiniteError as error:
            raise Diverged(progress.step, error.what) from error
        progress.measured_at = progress.step
        self._emit(HeldOutMeasured(step=progress.step, loss=loss))
        if patience is None:
            return
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.misses = loss, progress.step, 0
            self.best = {name: weight.detach().clone() for name, weight in self.weights.items()}
            return
        progress.misses += 1
        if progress.misses >= patience and not at_end:
            progress.stopped_early = True
            self._emit(StoppedEarly(step=progress.step, best_step=progress.best_step))

    # ---- Checkpoints

    def save_checkpoint(self) -> None:
        """Write the checkpoint that a restarted process resumes from."""
        if not self.accelerator.is_main_process:
            return
        recent = (*self._previous_events, *self._events)
        # kill-point: worker: a checkpoint is about to be written
        save_checkpoint(self.checkpoint_directory, self.run_key, replace(self._state(), recent=recent))
        # kill-point: worker: a checkpoint is in its place
        self._rollback_states.set_checkpointed(self.rollback.target)
        # kill-point: worker: rollback states that no checkpoint names are deleted
        self._previous_events, self._events = self._events, []
        self.emit(CheckpointSaved(step=self.progress.step))

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from the checkpoint on disk, exactly as if the run had not been interrupted."""
        self._rollback_states.set_checkpointed(checkpoint.rollback.target)
        self._load_state(checkpoint)

    @property
    def state_id(self) -> StateId:
        return StateId(self.progress.step, len(self.rollback.history))

    def _state(self) -> Checkpoint:
        return Checkpoint(
            progress=self.progress,
            adapter=self.weights,
            best=self.best,
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            rng=self._rng,
            rollback=self.rollback,
            memory_saved=self.memory_saved,
        )

    def _load_state(self, state: Checkpoint) -> None:
        self._set_weights(state.adapter)
        self.optimizer.load_state_dict(state.optimizer)
        self.scheduler.load_state_dict(state.scheduler)
        # The base model may have been scored again since the state was saved.
        self.progress = replace(state.progress, base_loss=self.progress.base_loss)
        self.best, self.rollback = state.best, state.rollback
        self._rng = dict(state.rng)
        set_rng_state(self.accelerator.device, self._rng)
        # A rollback may load a state from before memory ran out; the run then keeps its reduced memory use.
        if len(state.memory_saved) > len(self.memory_saved):
            self.memory_saved = state.memory_saved
            set_malloc_trim()
            self.activation_arena = None
            self.objective.capacity = self.memory_saved[-1].tokens_at_once
            if self.memory_saved[-1].layers_computed_twice:
                self.objective.enable_gradient_checkpointing()

    def _set_weights(self, tensors: Tensors) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[name])

    # ---- Divergence and rollback

    def maybe_save_rollback_state(self, loss: float) -> None:
        """Save the current state if it is due and good. Called after the gradients and before the update.

        `loss` belongs to the step under way, and so shows whether the weights that the previous step left are good. It is
        summed over all processes, which therefore decide alike.
        """
        is_due = self.progress.step >= self.rollback.target.step + _ROLLBACK_SAVE_STEPS
        if is_due and loss <= self.progress.base_loss + ROLLBACK_MAX_LOSS_INCREASE:
            self.save_rollback_state()

    def save_rollback_state(self) -> None:
        """Save the current state as the one to roll back to."""
        # The other processes read it only after the next sum over all processes, when it is complete.
        if self.accelerator.is_main_process:
            self._rollback_states.save(self._state())
        self.rollback = replace(self.rollback, target=self.state_id)

    def roll_back(self, divergence: Diverged) -> None:
        """Return to the last good state and lower the learning rate. The same examples follow in the same order.

        Raises:
            TrainingError: the run has been rolled back as often as allowed.
        """
        history = self.rollback.history
        if len(history) == _MAX_ROLLBACKS:
            raise divergence_error(divergence, history, self.config, self.progress.step, self.accelerator.device)
        self.optimizer.zero_grad()
        self.optimizer.state.clear()  # frees Adam's moments before those of the loaded state take memory
        self.best = None
        state = self._rollback_states.load(self.rollback.next_target)
        self._load_state(state)
        factor = _ROLLBACK_RATE_FACTOR ** (len(history) + 1)
        scale_learning_rates(self.optimizer, self.scheduler, factor / state.rollback.rate_factor)
        event = RateLowered(
            step=divergence.step, back_to_step=self.progress.step, factor=factor, reason=divergence.reason
        )
        self.rollback = RollbackState(target=state.id, history=(*history, event))
        self._emit(event)

    # ---- Events and cancellation

    def _emit(self, event: Event) -> None:
        self._events.append(event)
        self.emit(event)

    def _check_stop(self) -> None:
        """Raise Cancelled in all processes if any of them was asked to stop: signals reach them at different times."""
        if self.accelerator.num_processes == 1:
            self.stop.check()
            return
        requests = torch.tensor(float(self.stop.requested), device=self.accelerator.device)
        if self.accelerator.reduce(requests, reduction="sum").item() > 0:
            raise Cancelled


class Diverged(Exception):
    """The loss or the gradient norm at a step is not finite."""

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"at step {step} {reason}")
        self.step, self.reason = step, reason


def check_finite(step: int, loss: float, gradient_norm: float) -> None:
    """Raise Diverged if the loss or the gradient norm is NaN or infinite."""
    infinity = float("inf")
    if not abs(loss) < infinity:
        raise Diverged(step, f"the loss is {loss}")
    if not gradient_norm < infinity:
        raise Diverged(step, f"the gradient norm is {gradient_norm}")


def scale_learning_rates(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, factor: float
) -> None:
    """Multiply the current learning rates and all later ones of the schedule."""
    for group in optimizer.param_groups:
        group["lr"] *= factor
        group["initial_lr"] *= factor
    state = scheduler.state_dict()
    state |= {name: [rate * factor for rate in state[name]] for name in ("base_lrs", "_last_lr")}
    scheduler.load_state_dict(state)


def divergence_error(
    divergence: Diverged,
    history: Sequence[RateLowered],
    config: TrainingConfig,
    completed_steps: int,
    device: torch.device,
) -> TrainingError:
    """Describe the divergence, the rollbacks that did not help, and the likely cause."""
    rate_A, rate_B = config.rates
    lower_rate = [
        f"Lower learning_rate, for example to {rate_A * history[-1].factor:g}.",
        "Lower max_grad_norm, or raise warmup_ratio.",
    ]
    change_batches = ["Try a smaller max_length or another seed, which cuts or orders the examples differently."]
    if device.type != "cpu":
        change_batches.append("Try device='cpu', which computes in float32.")
    if completed_steps == history[-1].back_to_step:
        cause = (
            "The learning rate is not the cause, because it failed again before the first update: the examples of this step "
            "or the number format are."
        )
        suggestions = change_batches
    elif all(event.step == divergence.step for event in history):
        cause = "The learning rate is probably too high, or the examples of this step are the cause, as it failed each time."
        suggestions = lower_rate + change_batches
    else:
        cause = "The learning rate is probably too high."
        suggestions = lower_rate
    attempts = "; ".join(
        f"after step {event.step} ({event.reason}) from step {event.back_to_step} with 1/{1 / event.factor:g} of the rate"
        for event in history
    )
    return TrainingError(
        f"Training diverged at step {divergence.step}: {divergence.reason} (learning_rate = {rate_A:g}, {rate_B:g} for "
        f"LoRA B). {cause} It was restarted {attempts}.",
        code=NonFiniteError.code,
        suggestions=suggestions,
        details={"step": divergence.step, "tried": [event.model_dump(exclude={"kind"}) for event in history]},
    )
