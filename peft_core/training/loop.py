"""The optimiser loop: steps, measurements, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn

from peft_core.errors import NonFiniteError, TrainingError
from peft_core.evaluation.worker.scoring import held_out_loss
from peft_core.modeling.activation_arena import ActivationArena
from peft_core.modeling.batches import Document, Order
from peft_core.modeling.device import release_cache, rng_state, set_rng_state
from peft_core.modeling.memory import peak_memory_bytes, return_freed_memory, set_malloc_trim, trim_if_above
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
    RollbackStates,
    StateId,
    Tensors,
    mark_of,
    save_checkpoint,
)

_CHECKPOINT_EVERY_S = 60.0
_MEASUREMENTS = 4  # in a run, the final one included, unless eval_steps says otherwise

# A run that diverges goes back to its last good state with a quarter of the rate, twice: together a sixteenth. A rate
# that is too high is seldom so by more than that; what still overflows then is no matter of the rate.
_LOWER_BY = 0.25
_TRIES = 2
# The good state is renewed every so many steps: seldom, as the steps just before a fault are lost already (on a toy model
# the norm went from 0.06 to infinity in one step, at a loss that looked well), and often enough that little is done again.
# Counted, not timed, so that the same run goes back to the same step.
_GOOD_EVERY = 50
# Weights that run away pass through finite losses first. A step this much above the base shows them: perplexity times e.
ROLLBACK_MAX_LOSS_INCREASE = 1.0


@dataclass
class Loop:
    """One run and everything that changes in it."""

    config: TrainingConfig
    accelerator: Accelerator
    objective: Objective
    weights: dict[str, nn.Parameter]  # the adapter
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    documents: Sequence[Document]
    order: Order
    held_out: Sequence[Document]  # measured during training; may be a subset
    progress: Progress
    checkpoint_directory: Path
    run_key: str
    emit: Emit
    stop: StopFlag
    clock: Callable[[], float] = time.monotonic
    between_steps: Callable[[], None] = lambda: None  # what the machine needs then
    saved: ActivationArena | None = None  # where it pays, and until memory runs out
    best: Tensors | None = None
    lowered: tuple[RateLowered, ...] = ()
    memory_saved: tuple[MemorySaved, ...] = ()

    def __post_init__(self) -> None:
        # Since the last checkpoint, and between that and the one before it: whoever should have heard may have died meanwhile.
        self._told: list[Event] = []
        self._told_before: list[Event] = []
        self._rng = rng_state(self.accelerator.device)
        self._good = START
        self._good_states = RollbackStates(self.checkpoint_directory, self.run_key)
        self._longest = max(map(len, self.documents))
        self._planned_tokens = self.order.tokens([len(document) for document in self.documents])

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from the checkpoint on disk as if there had been no interruption."""
        if not self._good_states.has(START):  # an older version kept it elsewhere
            self._keep_as_good()
        self._good_states.set_checkpointed(checkpoint.good)
        self._load_state(checkpoint)

    def _load_state(self, checkpoint: Checkpoint) -> None:
        self._set_weights(checkpoint.adapter)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.scheduler.load_state_dict(checkpoint.scheduler)
        self.progress, self.best = checkpoint.progress, checkpoint.best
        self._rng, self.lowered = dict(checkpoint.rng), checkpoint.lowered
        if len(checkpoint.memory_saved) > len(self.memory_saved):  # fewer: this run has gone back to before it saved
            self.memory_saved = checkpoint.memory_saved
            set_malloc_trim()
            self.saved = None
            self.objective.capacity = self.memory_saved[-1].tokens_at_once
            if self.memory_saved[-1].layers_computed_twice:
                self.objective.recompute_layers()
        self._good = checkpoint.good
        set_rng_state(self.accelerator.device, self._rng)

    def run(self) -> None:
        """All remaining steps. Afterwards the weights are the last ones, or the best where early stopping is on.

        Raises:
            TrainingError: loss or gradient is not finite, and lower rates did not help.
            Stopped: on request; a checkpoint was written.
        """
        self.objective.model.train()
        if self._mark == START:
            self._keep_as_good()  # without effect yet, and the loss of the base is finite
        saved_at = self.clock()
        try:
            while True:
                try:
                    self._maybe_evaluate()
                    if self.progress.stopped_early or self.progress.step >= self.order.total_steps:
                        break
                    self._train_step()
                except Diverged as fault:
                    self._rollback(fault)  # raises where that was tried often enough
                if self.clock() - saved_at > _CHECKPOINT_EVERY_S:
                    self._save()
                    saved_at = self.clock()
                self._check_stop()
                self.between_steps()
        except Cancelled:
            self._save()
            raise
        self._save()
        self.saved = None
        if self.best is not None:
            self._set_weights(self.best)

    def _emit(self, event: Event) -> None:
        self._told.append(event)
        self.emit(event)

    def _train_step(self) -> None:
        """One optimiser step: its examples in micro-batches, each loss weighted so that the packing does not matter."""
        began = self.clock()
        accelerator, step = self.accelerator, self.progress.step + 1
        examples = [self.documents[index] for index in self.order.step(step)]
        targets = sum(example.targets for example in examples)
        share = examples[accelerator.process_index :: accelerator.num_processes]

        # 1. Gradients of the mean over all target tokens of the step, of all processes.
        while (loss := self._forward_backward(share, targets)) is None:
            self.optimizer.zero_grad()
            return_freed_memory()
            release_cache(accelerator.device)
            if accelerator.num_processes == 1:
                self.stop.check()
        self._all_reduce_gradients()
        loss_value = accelerator.reduce(loss, reduction="sum").item()

        # 2. The update.
        norm = accelerator.clip_grad_norm_(list(self.weights.values()), self.config.max_grad_norm)
        check_finite(step, loss_value, float(norm))
        began += self._maybe_save_rollback_state(loss_value)
        learning_rate = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        release_cache(accelerator.device)

        # 3. The facts.
        progress = self.progress
        progress.step = step
        progress.tokens += sum(len(example) for example in examples)
        progress.seconds += self.clock() - began
        self._rng = rng_state(accelerator.device)
        rate = progress.tokens / max(progress.seconds, 1e-9)
        self._emit(
            StepCompleted(
                step=step,
                loss=loss_value,
                learning_rate=learning_rate,
                tokens=progress.tokens,
                tokens_per_second=rate,
                eta_s=(self._planned_tokens - progress.tokens) / rate,
                memory_bytes=peak_memory_bytes(),
            ),
        )

    def _forward_backward(self, examples: Sequence[Document], targets: int) -> torch.Tensor | None:
        """Leave this process's gradients in the weights. Its part of the loss; None: memory ran out, and less is taken now."""
        accelerator = self.accelerator
        loss = torch.zeros((), device=accelerator.device)
        tokens = self.objective.capacity
        try:
            for batch in self.objective.batches(examples, accelerator.device):
                tokens = batch.tokens
                with self.saved.of_one_pass() if self.saved else nullcontext(), accelerator.autocast():
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
        self.saved = None
        event = MemorySaved(
            step=self.progress.step + 1,
            tokens_at_once=self.objective.capacity,
            layers_computed_twice=self.objective.recomputes,
            reason=reason,
        )
        self.memory_saved = (*self.memory_saved, event)
        self._emit(event)
        return None

    def _all_reduce_gradients(self) -> None:
        """Add up the gradients of all processes.

        Not by DistributedDataParallel: it averages, it wants the forward of a wrapper where the objective calls the
        decoder, and a process without examples in the last step would leave the others waiting.
        """
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.weights.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), reduction="sum")
        for parameter, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = summed.view_as(parameter)

    def _maybe_evaluate(self) -> None:
        """Held-out loss at every `eval_steps`; at the end only for early stopping, as the whole set follows anyway."""
        progress, total, patience = self.progress, self.order.total_steps, self.config.early_stopping_patience
        every = self.config.eval_steps or max(1, -(-total // _MEASUREMENTS))
        at_end = progress.step == total
        due = (progress.step % every == 0 and not at_end) or (at_end and patience is not None)
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

    def _check_stop(self) -> None:
        """Stop together: with several processes each hears of it in its own time."""
        if self.accelerator.num_processes == 1:
            self.stop.check()
            return
        asked = torch.tensor(float(self.stop.requested), device=self.accelerator.device)
        if self.accelerator.reduce(asked, reduction="sum").item() > 0:
            raise Cancelled

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        recent = (*self._told_before, *self._told)
        save_checkpoint(self.checkpoint_directory, self.run_key, replace(self._state(), recent=recent))
        self._good_states.set_checkpointed(self._good)
        self._told_before, self._told = self._told, []
        self.emit(CheckpointSaved(step=self.progress.step))

    def _state(self) -> Checkpoint:
        return Checkpoint(
            progress=self.progress,
            adapter=self.weights,
            best=self.best,
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            rng=self._rng,
            lowered=self.lowered,
            memory_saved=self.memory_saved,
            good=self._good,
        )

    def _maybe_save_rollback_state(self, loss: float) -> float:
        """Between gradients and update: the state is that of the step before, and `loss` is what shows it to be good.

        All processes decide the same, as they have the same summed loss. Seconds that it took, which are none of the step's.
        """
        began = self.clock()
        due = self.progress.step >= self._good.step + _GOOD_EVERY
        if due and loss <= self.progress.base_loss + ROLLBACK_MAX_LOSS_INCREASE:
            self._keep_as_good()
        return self.clock() - began

    def _keep_as_good(self) -> None:
        if self.accelerator.is_main_process:  # the others read it after the next sum over all processes, if ever
            self._good_states.keep(self._state())
        self._good = self._mark

    @property
    def _mark(self) -> StateId:
        return StateId(self.progress.step, len(self.lowered))

    def _rollback(self, fault: Diverged) -> None:
        """To the last good state with a lower rate; the same examples follow in the same order.

        A state from which a lower rate diverges as well was not good: the next way back from there is to the start.
        """
        tried = self.lowered
        if len(tried) == _TRIES:
            raise failure_of(fault, tried, self.config, self.progress.step, self.accelerator.device)
        lost = tried and tried[-1].back_to_step == self._good.step
        self.optimizer.zero_grad()
        self.optimizer.state.clear()  # before there is another
        self.best = None
        good = self._good_states.at(START if lost else self._good)
        self._load_state(replace(good, good=mark_of(good)))
        factor = _LOWER_BY ** (len(tried) + 1)
        multiply_rates(self.optimizer, self.scheduler, factor / (self.lowered[-1].factor if self.lowered else 1.0))
        event = RateLowered(step=fault.step, back_to_step=self.progress.step, factor=factor, reason=fault.what)
        self.lowered = (*tried, event)
        self._emit(event)

    def _set_weights(self, tensors: Tensors) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(tensors[name])


# FOLDED FROM peft_core.training.loop: A run whose numbers are no longer finite: how it is noticed, lower rates, and
# what is said when they did not help.


class Diverged(Exception):
    """At a step, and what shows it."""

    def __init__(self, step: int, what: str) -> None:
        super().__init__(f"at step {step} {what}")
        self.step, self.what = step, what


def check_finite(step: int, loss: float, gradient_norm: float) -> None:
    """Raise Diverged unless both are."""
    infinity = float("inf")
    if not abs(loss) < infinity:
        raise Diverged(step, f"the loss is {loss}")
    if not gradient_norm < infinity:
        raise Diverged(step, f"the gradient norm is {gradient_norm}")


def multiply_rates(
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    by: float,
) -> None:
    """Those of now and all that the schedule has to come."""
    for group in optimizer.param_groups:
        group["lr"] *= by
        group["initial_lr"] *= by
    rates = scheduler.state_dict()
    rates |= {name: [rate * by for rate in rates[name]] for name in ("base_lrs", "_last_lr")}
    scheduler.load_state_dict(rates)


def failure_of(
    fault: Diverged,
    lowered: Sequence[RateLowered],
    config: TrainingConfig,
    step: int,
    device: torch.device,
) -> TrainingError:
    """What happened after `step` completed ones, what was tried, and the likely cause."""
    tried = "; ".join(
        f"after step {event.step}, where {event.reason}, 1/{1 / event.factor:g} of the rate from step {event.back_to_step}"
        for event in lowered
    )
    rate_A, rate_B = config.rates
    other_rate = [
        f"Lower learning_rate, for instance to {rate_A * lowered[-1].factor:g}.",
        "Lower max_grad_norm, or raise warmup_ratio.",
    ]
    other_data = ["Try a smaller max_length or another seed: the examples are then cut or ordered differently."]
    if device.type != "cpu":
        other_data.append("Try device='cpu', which computes in float32.")
    if step == lowered[-1].back_to_step:
        cause = "No update lies between: not the rate, but the examples of this step or the arithmetic are the cause."
        suggestions = other_data
    elif all(event.step == fault.step for event in lowered):
        cause = "The likely cause is too high a rate, or, as it is the same step each time, its examples."
        suggestions = other_rate + other_data
    else:
        cause = "The likely cause is too high a rate."
        suggestions = other_rate
    rates = f"learning_rate = {rate_A:g}, {rate_B:g} for LoRA B"
    return TrainingError(
        f"At step {fault.step} {fault.what}: the run diverged ({rates}). {cause} Tried in vain: {tried}.",
        code=NonFiniteError.code,
        suggestions=suggestions,
        details={"step": fault.step, "tried": [event.model_dump(exclude={"kind"}) for event in lowered]},
    )
