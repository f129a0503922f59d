"""One training run, from the task to the adapter's files, in numbered phases."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog
import torch
from peft import PeftModel

from peft_core.adapters.manifest import Computation, DataRecord, RunRecord
from peft_core.base_models.tokenizer import BaseTokenizer
from peft_core.data.dataset import read_examples
from peft_core.errors import DataError
from peft_core.evaluation.summary import Scores, mean_loss, perplexity
from peft_core.evaluation.worker.completions import undo_fusion
from peft_core.evaluation.worker.evaluator import Evaluator, load_scores, save_scores
from peft_core.evaluation.worker.memorisation import measure_memorisation
from peft_core.evaluation.worker.scoring import HeldOutExample, sample_for_training
from peft_core.evaluation.worker.setup import RunData, Session, prepare_data, start_session
from peft_core.modeling.activation_arena import ActivationArena
from peft_core.modeling.batches import Document, Order, plan_order, tokenise
from peft_core.modeling.device import device_memory_bytes
from peft_core.modeling.fused_blocks import FusionStats, fuse
from peft_core.modeling.load import not_finite
from peft_core.modeling.memory import peak_memory_bytes, return_freed_memory, seconds_alive, set_malloc_keep
from peft_core.modeling.threads import ThreadTuner
from peft_core.planning.defaults import require_complete
from peft_core.planning.evaluation_budget import budget_after_training
from peft_core.schemas.evaluation import Evaluation, Memorisation
from peft_core.schemas.events import AdapterWritten, DatasetPrepared, Emit, Evaluated, HeldOutMeasured, RunPlanned
from peft_core.schemas.results import Metrics, Phase
from peft_core.schemas.task import TrainingTask
from peft_core.system.cancellation import StopFlag
from peft_core.system.child_process import NODE_VARIABLE
from peft_core.training import lora
from peft_core.training.base import BaseModel, NeedsCheck, is_accelerator, load_on_checked_device
from peft_core.training.checkpoint import Checkpoint, Progress, load_checkpoint, run_key, scores_key
from peft_core.training.loop import TrainingLoop
from peft_core.training.parent import SHARE_OF_PARENT, Parent, read_parent
from peft_core.training.save import write_adapter

_log = structlog.get_logger(__name__)

# Share of the estimated memory that malloc may keep between micro-batches if saved activations fragment the heap. If it keeps
# everything, memory peaks a tenth above the estimate within a hundred steps. Costs 2 % of the speed.
_MALLOC_KEEP_SHARE = 0.8
# After more than one pass over the data, models are surer than they are right, and forget. Taking what the adapter adds back to
# this share undoes most of both and keeps the lines that became right. benchmarks/NOTES.md has the measurement.
_REPEATED_PASSES, _SHARE_AFTER_REPETITION = 1.2, 0.8


@dataclass(frozen=True)
class AdaptedModel:
    """The base model with the adapter, and which of its operations were fused."""

    base: BaseModel
    peft: PeftModel
    fusion: FusionStats
    parent_weights: Mapping[str, torch.Tensor] | None  # of the adapter that the training continues from


@dataclass(frozen=True)
class Moderation:
    """What was done to the weights after the last step, as `RunRecord` has it."""

    scaled_by: float | None = None
    share_of_parent: float | None = None


@dataclass(frozen=True)
class TrainingSet:
    """What the loop trains on and measures itself with."""

    documents: Sequence[Document]
    order: Order
    held_out: Sequence[Document]  # evaluated during training; a sample if the held-out set is large


def run(task: TrainingTask, emit: Emit, stop: StopFlag, *, needs_check: NeedsCheck = is_accelerator) -> None:
    """Train, and write the adapter to the job's directory. A device for which `needs_check` is true is checked first.

    Raises:
        PeftMcpError: a failure that the user can correct.
        Cancelled: on request, after writing a checkpoint.
    """
    config = task.request.config
    require_complete(config)
    session = start_session(task, emit, stop)
    parent = read_parent(task)

    # 1. Dataset. The base model's files come first, because examples are measured with its tokenizer.
    session.start_phase(Phase.PREPARING_DATA)
    data = prepare_data(session, parent=None if parent is None else parent.data)
    documents = _load_training_documents(session, data)
    evaluator = Evaluator(data, config.max_length, seed=config.seed)
    emit(DatasetPrepared(dataset=data.dataset.summary))

    # 2. Frozen base model on a device that computes correctly, and the checkpoint if the run was interrupted.
    session.start_phase(Phase.LOADING_MODEL)
    session, base = load_on_checked_device(session, data, documents, needs_check)
    task, threads = session.task, ThreadTuner.for_training(session.device.device)
    order = _plan_order(session, documents, evaluator, base)
    stop.check()
    key = run_key(task, data.dataset.summary)
    checkpoint = _load_checkpoint(session, key, order)

    # 3. Scores of the base model.
    sample = sample_for_training([example.document for example in data.held_out], config.seed)
    base_scores = _score_base(session, base, evaluator, key, threads, is_resumed=checkpoint is not None)
    base_loss = mean_loss(base_scores.held_out)
    emit(HeldOutMeasured(step=0, loss=base_loss, whole_set=True))

    # 4. Training.
    adapted = _attach_adapter(session, base, parent)
    parent_scores = None if parent is None else _score_parent(session, base, evaluator, key, threads)
    emit(HeldOutMeasured(step=0, loss=_loss_of_sample(sample, data.held_out, parent_scores or base_scores)))
    session.start_phase(Phase.TRAINING)
    loop = _build_loop(session, adapted, TrainingSet(documents, order, sample), base_loss, key, threads)
    if checkpoint is not None:
        loop.restore(checkpoint)
    del checkpoint  # it is at least as large as the adapter
    loop.run(work_afterwards=evaluator.work_after_training(budget_after_training(loop.planned_tokens)))
    # kill-point: worker: all steps are done
    moderation = _moderate(adapted, loop)

    # 5. Scores of the adapter.
    session.start_phase(Phase.EVALUATING_ADAPTER)
    threads.keep_up()
    scores = evaluator.score(base.objective, session.accelerator, stop)
    emit(HeldOutMeasured(step=loop.step_of_weights, loss=mean_loss(scores.held_out), whole_set=True))

    # 6. Completions of both models, and the adapter's files.
    if session.accelerator.is_main_process:
        evaluation = _evaluate(session, adapted, evaluator, data.tokenizer, base_scores, scores, loop)
        evaluation = _with_catch_up(evaluation, parent, data.held_out, parent_scores, scores)
        emit(Evaluated(evaluation=evaluation))
        _write_adapter(session, adapted, data, loop, moderation, mean_loss(scores.held_out), evaluation)
    session.accelerator.end_training()  # a process that does not leave its group may end with SIGABRT


def _load_training_documents(session: Session, data: RunData) -> list[Document]:
    """Tokenise the training set.

    Raises:
        DataError: no example of the training or the held-out set has a target token.
    """
    max_length = session.task.request.config.max_length
    path = session.paths.dataset / "train.jsonl"
    documents = [tokenise(example, data.tokenizer, max_length) for example in read_examples(path)]
    usable = [document for document in documents if document.targets]
    if len(usable) < len(documents):
        _log.warning("examples_without_targets", file=path.name, excluded=len(documents) - len(usable))
    for name, examples in ((path.name, usable), ("held_out.jsonl", data.held_out)):
        if not examples:
            raise DataError(
                f"No example in {name} has a token to learn within max_length = {max_length}.",
                suggestions=["Raise max_length, or shorten the prompts."],
            )
    return usable


def _plan_order(session: Session, documents: Sequence[Document], evaluator: Evaluator, base: BaseModel) -> Order:
    """Plan the steps, and how much of the held-out files is read so that it takes a tenth of their time."""
    config = session.task.request.config
    order = plan_order(
        examples=len(documents),
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
    )
    tokens = order.tokens([len(document) for document in documents])
    budget = budget_after_training(tokens)
    evaluator.choose_windows(base.objective, budget.windows)
    searched = [session.paths.dataset / "train.jsonl", *session.task.earlier_examples]  # as generate(retrieve=true)
    evaluator.choose_positions(base.objective, budget.positions, searched)
    return order


def _load_checkpoint(session: Session, key: str, order: Order) -> Checkpoint | None:
    """Load the run's checkpoint, if it has one, and announce the steps to run."""
    checkpoint = load_checkpoint(session.paths.checkpoint, key)
    for event in checkpoint.recent if checkpoint is not None else ():
        session.emit(event)  # again, because the previous runner may have been killed before it stored the event
    start_step = checkpoint.progress.step if checkpoint is not None else 0
    node = os.environ.get(NODE_VARIABLE, "")
    device = session.device.device
    session.emit(RunPlanned(device=device, total_steps=order.total_steps, start_step=start_step, node=node))
    return checkpoint


def _key_of_scores(session: Session, base: BaseModel, key: str) -> str:
    return scores_key(key, session.device.device, base.weights_dtype, len(session.task.earlier_examples))


def _score_base(
    session: Session, base: BaseModel, evaluator: Evaluator, key: str, threads: ThreadTuner, *, is_resumed: bool
) -> Scores:
    """Return the base model's scores, which a run that is resumed on the same device finds on disk.

    Raises:
        BaseCheckpointError: its outputs are NaN or Inf.
    """
    path, key = session.paths.base_scores, _key_of_scores(session, base, key)
    scores = load_scores(path, key, evaluator) if is_resumed else None
    if scores is None:
        session.start_phase(Phase.EVALUATING_BASE)
        threads.keep_up()
        # kill-point: worker: the base model is about to be evaluated
        scores = evaluator.score(base.objective, session.accelerator, session.stop, key=key)
        if not math.isfinite(mean_loss(scores.held_out)):
            raise not_finite(session.task.request.base.path)
        if session.accelerator.is_main_process:
            save_scores(path, scores)
    return scores


def _score_parent(session: Session, base: BaseModel, evaluator: Evaluator, key: str, threads: ThreadTuner) -> Scores:
    """Return the scores of the adapter that the model holds now, the parent. They are kept as the base model's."""
    path, key = session.paths.parent_scores, _key_of_scores(session, base, key)
    scores = load_scores(path, key, evaluator, more=False)
    if scores is None:
        session.start_phase(Phase.EVALUATING_BASE, "evaluating the adapter to continue from")
        threads.keep_up()
        scores = evaluator.score(base.objective, session.accelerator, session.stop, key=key, more=False)
        if session.accelerator.is_main_process:
            save_scores(path, scores)
    return scores


def _attach_adapter(session: Session, base: BaseModel, parent: Parent | None) -> AdaptedModel:
    """Wrap the base model with an adapter that has no effect yet, or with the weights of its parent."""
    request = session.task.request
    peft = lora.attach(base.model, request.config, request.base.name)
    if parent is not None:
        lora.load_weights(peft, parent.take_tensors())
    # kill-point: worker: the adapter is attached
    parent_weights = None if parent is None else lora.copy_of_weights(peft)
    adapted = AdaptedModel(base, peft, fuse(peft), parent_weights)
    return_freed_memory()
    return adapted


def _moderate(adapted: AdaptedModel, loop: TrainingLoop) -> Moderation:
    """Take the weights back towards those of the parent, or after several passes towards the base model."""
    if adapted.parent_weights is not None:
        lora.blend(adapted.peft, adapted.parent_weights, SHARE_OF_PARENT)
        return Moderation(share_of_parent=SHARE_OF_PARENT)
    # The weights that early stopping chooses, by their loss, are not too sure.
    if loop.best is not None or loop.passes <= _REPEATED_PASSES:
        return Moderation()
    lora.scale(adapted.peft, _SHARE_AFTER_REPETITION)
    return Moderation(scaled_by=_SHARE_AFTER_REPETITION)


def _loss_of_sample(sample: Sequence[Document], held_out: Sequence[HeldOutExample], scores: Scores) -> float:
    """Return the mean loss on the documents that are evaluated during training as well."""
    sampled = set(map(id, sample))
    pairs = zip(held_out, scores.held_out, strict=True)
    return mean_loss([score for example, score in pairs if id(example.document) in sampled])


def _build_loop(
    session: Session,
    adapted: AdaptedModel,
    training_set: TrainingSet,
    base_loss: float,
    key: str,
    threads: ThreadTuner,
) -> TrainingLoop:
    request, accelerator, base = session.task.request, session.accelerator, adapted.base
    # The arena pays off only if bf16 blocks are all that saves activations. In float32 it saves neither memory nor time: the
    # backward pass needs much memory of its own there, and finds it in the heap that the forward pass has used.
    is_all_bf16 = base.uses_bf16_blocks and adapted.fusion.linears == 0 and base.objective.head is not None
    uses_arena = is_all_bf16 and not base.compute_plan.recompute_layers
    if base.compute_plan.recompute_layers:
        base.objective.enable_gradient_checkpointing()
    elif session.device.device == "cpu":
        share = 1.0 if uses_arena else _MALLOC_KEEP_SHARE
        set_malloc_keep(up_to_bytes=round(share * request.estimate.memory_bytes))
    optimizer = lora.build_optimizer(adapted.peft, request.config)
    scheduler = lora.build_scheduler(optimizer, request.config, training_set.order.total_steps)
    return TrainingLoop(
        config=request.config,
        accelerator=accelerator,
        objective=base.objective,
        weights=lora.weights(adapted.peft),
        optimizer=accelerator.prepare_optimizer(optimizer),
        scheduler=accelerator.prepare_scheduler(scheduler),
        documents=training_set.documents,
        order=training_set.order,
        held_out=training_set.held_out,
        progress=Progress(base_loss=base_loss),
        checkpoint_directory=session.paths.checkpoint,
        run_key=key,
        emit=session.emit,
        stop=session.stop,
        between_steps=threads.keep_up,
        # The loop holds the only reference, so that it can free the memory.
        activation_arena=ActivationArena(adapted.peft) if uses_arena else None,
    )


def _evaluate(
    session: Session,
    adapted: AdaptedModel,
    evaluator: Evaluator,
    tokenizer: BaseTokenizer,
    base_scores: Scores,
    adapter_scores: Scores,
    loop: TrainingLoop,
) -> Evaluation:
    """Compare base model and adapter. The model cannot be trained afterwards."""
    session.start_phase(Phase.EVALUATING_ADAPTER, "completing held-out prompts with both models")
    base = adapted.base
    undo_fusion(adapted.peft, base.model)
    if base.objective.head is not None:
        base.objective.head.release()
    return_freed_memory()
    evaluation = evaluator.compare(
        base_scores,
        adapter_scores,
        base.model,
        adapted.peft.disable_adapter,
        completion_tokens=budget_after_training(loop.progress.tokens).completions,
        stop=session.stop,
    )
    return evaluation.model_copy(
        update={
            "seen_in_training": 0.0,  # `prepare` separates held-out from training data
            "chosen_on_part": session.task.request.config.early_stopping_patience is not None,
            "memorisation": _measure_memorisation(session, adapted, tokenizer, loop),
        }
    )


def _with_catch_up(
    evaluation: Evaluation,
    parent: Parent | None,
    held_out: Sequence[HeldOutExample],
    before: Scores | None,
    after: Scores,
) -> Evaluation:
    """Add the comparison with the adapter that the run continues from, if there is one."""
    if parent is None or before is None:
        return evaluation
    return evaluation.model_copy(update={"catch_up": parent.compare(held_out, before, after)})


def _measure_memorisation(
    session: Session, adapted: AdaptedModel, tokenizer: BaseTokenizer, loop: TrainingLoop
) -> Memorisation | None:
    """Measure how much training text the adapter repeats. Fusion must have been undone."""
    session.start_phase(Phase.EVALUATING_ADAPTER, "looking for training text that it repeats")
    return measure_memorisation(
        adapted.base.model,
        adapted.peft.disable_adapter,
        loop.seen,
        tokenizer,
        limit=budget_after_training(loop.progress.tokens).memorisation_prompts,
        seed=session.task.request.config.seed,
        stop=session.stop,
    )


def _write_adapter(
    session: Session,
    adapted: AdaptedModel,
    data: RunData,
    loop: TrainingLoop,
    moderation: Moderation,
    adapter_loss: float,
    evaluation: Evaluation,
) -> None:
    session.start_phase(Phase.SAVING)
    request, progress, dataset = session.task.request, loop.progress, data.dataset
    base, fusion, seen = adapted.base, adapted.fusion, loop.seen
    run_record = RunRecord(
        config=request.config.model_copy(update={"base_model": None, "more_sources": [], "continue_from": None}),
        target_modules=lora.target_modules(adapted.peft),
        device=session.device.device,
        device_check=session.device_note,
        weights_dtype=base.weights_dtype,
        steps=progress.step,
        examples_seen=len(seen),
        tokens_seen=sum(map(len, seen)),
        stopped_early_at=progress.step if progress.stopped_early else None,
        continued_from=request.continued.adapter_id if request.continued is not None else None,
        best_step=progress.best_step if loop.best is not None else None,
        scaled_by=moderation.scaled_by,
        share_of_parent=moderation.share_of_parent,
        computation=Computation(
            execution=base.compute_plan,
            documents_packed=base.objective.packed,
            head_in_chunks=base.objective.head is not None,
            fused_blocks=fusion.blocks,
            fused_linears=fusion.linears,
            estimated_memory_bytes=request.estimate.memory_bytes,
        ),
        memory_saved=loop.memory_saved,
        rate_lowered=loop.rollback.history,
    )
    metrics = write_adapter(
        session.paths.adapter,
        adapted.peft,
        session.task,
        data=DataRecord(
            source_kind=request.source_kind,
            summary=dataset.summary,
            languages=dataset.languages,
            repository_commit=dataset.repository_commit,
            repository_dirty=dataset.repository_dirty,
            repositories=dataset.repositories,
        ),
        run=run_record,
        evaluation=evaluation,
        dataset=session.paths.dataset,
        created_at=datetime.now(UTC),
        measure=lambda adapter_bytes: _metrics(progress, adapter_loss, session.accelerator.device, adapter_bytes),
    )
    _log.info("adapter_written", **metrics.model_dump())
    session.emit(AdapterWritten(metrics=metrics))


def _metrics(progress: Progress, adapter_loss: float, device: torch.device, adapter_bytes: int) -> Metrics:
    return Metrics(
        base_loss=progress.base_loss,
        adapter_loss=adapter_loss,
        base_perplexity=perplexity(progress.base_loss),
        adapter_perplexity=perplexity(adapter_loss),
        tokens=progress.tokens,
        tokens_per_second=progress.tokens / progress.seconds,
        wall_s=seconds_alive(),
        peak_memory_bytes=peak_memory_bytes(),
        device_memory_bytes=device_memory_bytes(device) or None,
        adapter_bytes=adapter_bytes,
    )
