"""One training run, from the task to the adapter's files, in numbered phases."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import structlog
import torch
from accelerate import Accelerator

from peft_core.adapters.manifest import Computation, DataRecord
from peft_core.data.dataset import PreparedDataset, read_examples
from peft_core.data.leakage import FINGERPRINT_FILE_NAME
from peft_core.data.prepare import prepare
from peft_core.errors import DataError
from peft_core.evaluation.summary import perplexity
from peft_core.evaluation.worker.completions import undo_fusion
from peft_core.evaluation.worker.evaluator import Evaluator, Scores, keep_scores, kept_scores, writing_budget
from peft_core.evaluation.worker.scoring import held_out_examples_of, mean_loss, subset
from peft_core.modeling.activation_arena import ActivationArena
from peft_core.modeling.batches import Document, plan_order, tokenise
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.modeling.device import DevicePlan, choose, describe, device_memory_bytes, timed, use_cores
from peft_core.modeling.fused_blocks import FusionStats, fuse
from peft_core.modeling.load import load_planned, move
from peft_core.modeling.memory import (
    peak_memory_bytes,
    return_freed_memory,
    seconds_alive,
    set_malloc_keep,
    set_malloc_trim,
)
from peft_core.modeling.objective import probe_fast_paths
from peft_core.modeling.threads import ThreadTuner
from peft_core.modeling.tokenizer import BaseTokenizer, load_tokenizer
from peft_core.paths import JobPaths
from peft_core.planning.cost_model import uses_bf16_blocks
from peft_core.planning.defaults import require_complete
from peft_core.schemas.evaluation import Evaluation
from peft_core.schemas.events import (
    AdapterWritten,
    DatasetPrepared,
    Emit,
    Evaluated,
    HeldOutMeasured,
    PhaseStarted,
    RunPlanned,
)
from peft_core.schemas.results import Metrics, Phase
from peft_core.schemas.task import ComputePlan, TrainingTask
from peft_core.system.allowed_paths import require_task_source
from peft_core.system.cancellation import StopFlag
from peft_core.training import lora
from peft_core.training.checkpoint import Progress, load_checkpoint, run_key
from peft_core.training.loop import TrainingLoop
from peft_core.training.save import RunFacts, write_adapter

_log = structlog.get_logger(__name__)

# Of the estimate, between micro-batches, where saved tensors leave holes in the heap: with all of it kept a hundred steps
# peaked a tenth above what was planned. Costs a fiftieth of the speed.
_KEPT_SHARE = 0.8


def run(task: TrainingTask, emit: Emit, stop: StopFlag) -> None:
    """Train, and leave the adapter complete in the job's directory.

    Raises:
        ModelError: what a user can mend.
        Stopped: on request; what was reached is in the checkpoint.
    """
    config, base, paths = task.request.config, task.request.base, JobPaths(task.job_dir)
    require_complete(config)
    _set_up_process(config.seed, task.request.execution)
    plan = choose(config.device, timed(config.device, describe(), config.precision), config.precision)
    _log.info("device_chosen", device=plan.device, formats=plan.note)
    accelerator = _accelerator(plan.device, plan.autocast)
    threads = ThreadTuner.for_training(plan.device)

    # 1. Text to documents. The base comes first: its tokenizer measures the text.
    emit(PhaseStarted(phase=Phase.PREPARING_DATA))

    def report(detail: str) -> None:
        stop.check()
        emit(PhaseStarted(phase=Phase.PREPARING_DATA, detail=detail))

    with accelerator.main_process_first():  # the others find everything done
        directory = ensure_hf_directory(base, task.base_models_dir, report)
        tokenizer = load_tokenizer(directory)
        dataset = prepare(
            task.request.dataset,
            directory=paths.dataset,
            token_counter=tokenizer,
            report=report,
            may_read=partial(require_task_source, task),
        )
    train = _documents(paths.dataset / "train.jsonl", tokenizer, config.max_length)
    trials = held_out_examples_of(read_examples(paths.dataset / "held_out.jsonl"), tokenizer, config.max_length)
    held_out = _useful([trial.document for trial in trials], "held_out.jsonl", config.max_length)
    exam = Evaluator(trials, tokenizer, config.max_length, seed=config.seed)
    emit(DatasetPrepared(dataset=dataset.summary))
    stop.check()

    # 2. The frozen base on its device.
    emit(PhaseStarted(phase=Phase.LOADING_MODEL))
    model, execution = load_planned(base, directory, task.request.execution, plan)
    model = move(model, accelerator.device)
    narrow = uses_bf16_blocks(config, base, execution)
    objective = probe_fast_paths(model, config.max_length, uses_bf16_blocks=narrow)
    return_freed_memory()
    order = plan_order(
        examples=len(train),
        batch_size=config.batch_size,
        num_epochs=config.num_epochs,
        max_steps=config.max_steps,
        seed=config.seed,
    )
    stop.check()

    # 3. The base on all held-out examples, unless an interrupted run has measured it.
    key = run_key(task, dataset.summary)
    checkpoint = load_checkpoint(paths.checkpoint, key)
    start = checkpoint.progress.step if checkpoint is not None else 0
    for event in checkpoint.recent if checkpoint is not None else ():
        emit(event)  # once more: the process that should have heard may have been killed before this one
    emit(RunPlanned(device=plan.device, total_steps=order.total_steps, start_step=start))
    sample = subset(held_out, config.seed)
    base_scores = kept_scores(paths.base_scores, key, len(trials)) if checkpoint is not None else None
    if base_scores is None:
        emit(PhaseStarted(phase=Phase.EVALUATING_BASE))
        threads.keep_up()
        base_scores = exam.score(objective, accelerator, stop, key=key)
        if accelerator.is_main_process:
            keep_scores(paths.base_scores, base_scores)
    emit(HeldOutMeasured(step=0, loss=_loss_on(sample, exam, base_scores)))
    base_loss = mean_loss(trials, base_scores.held_out)
    emit(HeldOutMeasured(step=0, loss=base_loss, whole_set=True))

    # 4. The adapter, trained.
    emit(PhaseStarted(phase=Phase.TRAINING))
    adapted = lora.attach(model, config, base.name)
    fused = fuse(adapted)
    return_freed_memory()
    # Where nothing is saved but what blocks in bfloat16 save. In float32 neither memory nor speed was gained: the backward pass
    # needs much room there, and in the heap finds it in what it has used.
    apart = narrow and fused.linears == 0 and objective.head is not None and not execution.recompute_layers
    if execution.recompute_layers:
        objective.recompute_layers()
    elif plan.device == "cpu":
        kept_share = 1.0 if apart else _KEPT_SHARE
        set_malloc_keep(up_to_bytes=round(kept_share * task.request.estimate.memory_bytes))
    optimizer = lora.build_optimizer(adapted, config)
    loop = TrainingLoop(
        config=config,
        accelerator=accelerator,
        objective=objective,
        weights=lora.weights(adapted),
        optimizer=accelerator.prepare_optimizer(optimizer),
        scheduler=accelerator.prepare_scheduler(lora.build_scheduler(optimizer, config, order.total_steps)),
        documents=train,
        order=order,
        held_out=sample,
        progress=Progress(base_loss=base_loss),
        checkpoint_directory=paths.checkpoint,
        run_key=key,
        emit=emit,
        stop=stop,
        between_steps=threads.keep_up,
        activation_arena=ActivationArena(adapted)
        if apart
        else None,  # no other reference: the loop must be able to free it
    )
    if checkpoint is not None:
        loop.restore(checkpoint)
    del checkpoint  # as much as the adapter, or more
    loop.run()
    progress = loop.progress

    # 5. The adapter on all held-out examples.
    emit(PhaseStarted(phase=Phase.EVALUATING_ADAPTER))
    threads.keep_up()
    adapter_scores = exam.score(objective, accelerator, stop)
    adapter_loss = mean_loss(trials, adapter_scores.held_out)
    emit(HeldOutMeasured(step=progress.step, loss=adapter_loss, whole_set=True))

    # 6. Its files.
    if accelerator.is_main_process:
        emit(PhaseStarted(phase=Phase.EVALUATING_ADAPTER, detail="both write from held-out prompts"))
        undo_fusion(adapted, model)
        if objective.head is not None:
            objective.head.release()
        return_freed_memory()
        budget = writing_budget(progress.tokens)
        evaluation = exam.compare(base_scores, adapter_scores, model, adapted.disable_adapter, budget=budget, stop=stop)
        # `prepare` kept apart what is held out; early stopping looked at a part of it.
        chosen_on_part = config.early_stopping_patience is not None
        evaluation = evaluation.model_copy(update={"seen_in_training": 0.0, "chosen_on_part": chosen_on_part})
        emit(Evaluated(evaluation=evaluation))
        emit(PhaseStarted(phase=Phase.SAVING))
        facts = _facts(task, plan, execution, dataset, loop, fused, evaluation)
        measured = partial(_metrics, progress, adapter_loss, accelerator.device)
        metrics = write_adapter(paths.adapter, adapted, task, facts, measured)
        _log.info("adapter_written", **metrics.model_dump())
        emit(AdapterWritten(metrics=metrics))
    accelerator.end_training()  # a process that leaves its group unclosed may end with SIGABRT


def _loss_on(sample: list[Document], exam: Evaluator, scores: Scores) -> float:
    """The mean over the documents that are measured during training as well."""
    sampled = set(map(id, sample))
    chosen = [(t, s) for t, s in zip(exam.held_out, scores.held_out, strict=True) if id(t.document) in sampled]
    return mean_loss([trial for trial, _ in chosen], [score for _, score in chosen])


def _facts(
    task: TrainingTask,
    plan: DevicePlan,
    execution: ComputePlan,
    dataset: PreparedDataset,
    loop: TrainingLoop,
    fused: FusionStats,
    evaluation: Evaluation,
) -> RunFacts:
    progress, objective = loop.progress, loop.objective
    return RunFacts(
        data=DataRecord(
            source_kind=task.request.source_kind,
            summary=dataset.summary,
            languages=dataset.languages,
            repository_commit=dataset.repository_commit,
            repository_dirty=dataset.repository_dirty,
        ),
        device=plan.device,
        computation=Computation(
            execution=execution,
            documents_packed=objective.packed,
            head_in_chunks=objective.head is not None,
            fused_blocks=fused.blocks,
            fused_linears=fused.linears,
            estimated_memory_bytes=task.request.estimate.memory_bytes,
        ),
        weights_dtype="bfloat16" if execution.weights == "bfloat16" else "float32",
        steps=progress.step,
        stopped_early_at=progress.step if progress.stopped_early else None,
        best_step=progress.best_step if loop.best is not None else None,
        rate_lowered=loop.rollback.history,
        memory_saved=loop.memory_saved,
        created_at=datetime.now(UTC),
        evaluation=evaluation,
        trained_on=(JobPaths(task.job_dir).dataset / FINGERPRINT_FILE_NAME).read_bytes(),
    )


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


def _accelerator(device: str, mixed_precision: str) -> Accelerator:
    # One scheduler step for each optimiser step, however many processes share it.
    return Accelerator(cpu=device == "cpu", mixed_precision=mixed_precision, step_scheduler_with_optimizer=False)


def _set_up_process(seed: int, way: ComputePlan) -> None:
    if way.recompute_layers:
        set_malloc_trim()
    else:
        set_malloc_keep()
    use_cores()
    # Torch draws LoRA A and dropout from its global generators; everything else here has a generator of its own.
    torch.manual_seed(seed)


def _documents(path: Path, tokenizer: BaseTokenizer, max_length: int) -> list[Document]:
    """The tokenised examples that have something to learn."""
    documents = [tokenise(example, tokenizer, max_length) for example in read_examples(path)]
    return _useful(documents, path.name, max_length)


def _useful(documents: list[Document], name: str, max_length: int) -> list[Document]:
    """Those that have something to learn."""
    useful = [document for document in documents if document.targets]
    if not useful:
        raise DataError(
            f"No example in {name} has a token to learn within max_length = {max_length}.",
            suggestions=["Raise max_length, or shorten the prompts."],
        )
    if len(useful) < len(documents):
        _log.warning("examples_without_targets", file=name, left_out=len(documents) - len(useful))
    return useful
