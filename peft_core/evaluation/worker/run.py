"""One evaluation, from the task to the comparison, in numbered phases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import structlog
from accelerate import Accelerator
from safetensors.torch import load as tensors_of

from peft_core.adapters.files import AdapterFiles, read_adapter
from peft_core.adapters.verify import verify_files
from peft_core.data.dataset import read_examples
from peft_core.data.leakage import FINGERPRINT_FILE_NAME, MAX_FINGERPRINT_BYTES, TrainingFingerprint
from peft_core.data.prepare import prepare
from peft_core.data.walk import ExclusionReason
from peft_core.errors import DataError, HeaderError, InferenceError
from peft_core.evaluation.worker.completions import undo_fusion
from peft_core.evaluation.worker.evaluator import WRITING_TOKENS, Evaluator
from peft_core.evaluation.worker.scoring import held_out_examples_of, mean_loss
from peft_core.modeling.adapter_model import ResidentModel
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.modeling.device import choose, describe, timed, use_cores
from peft_core.modeling.memory import return_freed_memory, set_malloc_keep
from peft_core.modeling.objective import probe_fast_paths
from peft_core.modeling.tokenizer import load_tokenizer
from peft_core.paths import JobPaths
from peft_core.schemas.dataset import DatasetPurpose, DatasetSummary
from peft_core.schemas.events import DatasetPrepared, Emit, Evaluated, HeldOutMeasured, PhaseStarted, RunPlanned
from peft_core.schemas.results import BaseMatch, Phase
from peft_core.schemas.task import TrainingTask
from peft_core.system.allowed_paths import require_task_adapter, require_task_source
from peft_core.system.cancellation import StopFlag
from peft_core.system.files import read_small

_log = structlog.get_logger(__name__)


def run(task: TrainingTask, emit: Emit, stop: StopFlag) -> None:
    """Measure base and adapter on text that the adapter was not trained on.

    Raises:
        ModelError: what a user can mend.
        Stopped: on request.
    """
    request, paths = task.request, JobPaths(task.job_dir)
    assert request.evaluated is not None, "a task of the training child"  # noqa: S101 -- the runner's mistake
    config, directory_of_adapter = request.config, request.evaluated.adapter_path
    set_malloc_keep()
    use_cores()
    plan = choose(config.device, timed(config.device, describe(), config.precision), config.precision)
    accelerator = Accelerator(cpu=plan.device == "cpu", mixed_precision=plan.autocast)

    # 1. Text that was not trained on.
    emit(PhaseStarted(phase=Phase.PREPARING_DATA))

    def report(detail: str) -> None:
        stop.check()
        emit(PhaseStarted(phase=Phase.PREPARING_DATA, detail=detail))

    require_task_adapter(task, directory_of_adapter)
    known = _trained_on(directory_of_adapter)
    directory = ensure_hf_directory(request.base, task.base_models_dir, report)
    tokenizer = load_tokenizer(directory)
    dataset = prepare(
        request.dataset,
        directory=paths.dataset,
        token_counter=tokenizer,
        report=report,
        known=known,
        may_read=partial(require_task_source, task),
    )
    trials = held_out_examples_of(read_examples(paths.dataset / "held_out.jsonl"), tokenizer, config.max_length)
    if len(trials) < DatasetPurpose.EVALUATION.min_examples:
        raise _too_little(dataset.summary, len(trials))
    summary = dataset.summary.model_copy(
        update={
            "held_out_examples": len(trials),
            "held_out_tokens": sum(len(trial.document) for trial in trials),
        },
    )
    emit(DatasetPrepared(dataset=summary))
    exam = Evaluator(trials, tokenizer, config.max_length, seed=config.seed)
    stop.check()

    # 2. Base and adapter: the bytes that are checked are those that are loaded.
    emit(PhaseStarted(phase=Phase.LOADING_MODEL))
    model = ResidentModel.load(request.base, directory, plan)
    emit(RunPlanned(device=plan.device, total_steps=0))
    files = _checked(directory_of_adapter, task)
    assert files.settings is not None, "judged usable"  # noqa: S101 -- cannot be
    assert files.weights is not None, "judged usable"  # noqa: S101 -- likewise
    name, effect = model.add(files.settings, tensors_of(files.weights))
    _log.info("adapter_loaded", **effect.model_dump())
    objective = probe_fast_paths(model.causal, config.max_length)  # with the adapter on: it may change the head
    return_freed_memory()
    stop.check()

    # 3. The base, then the adapter.
    emit(PhaseStarted(phase=Phase.EVALUATING_BASE))
    model.select(None)
    base = exam.score(objective, accelerator, stop)
    emit(HeldOutMeasured(step=0, loss=mean_loss(trials, base.held_out), whole_set=True))
    emit(PhaseStarted(phase=Phase.EVALUATING_ADAPTER))
    model.select(name)
    adapter = exam.score(objective, accelerator, stop)

    # 4. What both write, and the sum of it all.
    emit(PhaseStarted(phase=Phase.EVALUATING_ADAPTER, detail="both write from held-out prompts"))
    undo_fusion(model.causal, model.causal)

    @contextmanager
    def without_adapter() -> Iterator[None]:
        model.select(None)
        yield
        model.select(name)

    least, most = WRITING_TOKENS
    budget = min(most, max(least, 2 * summary.held_out_tokens))  # of each model
    evaluation = exam.compare(base, adapter, model.causal, without_adapter, budget=budget, stop=stop)
    seen = None if known is None else 0.0  # those that were are left out
    emit(Evaluated(evaluation=evaluation.model_copy(update={"seen_in_training": seen})))


def _trained_on(adapter: Path) -> TrainingFingerprint | None:
    try:
        return TrainingFingerprint.from_bytes(read_small(adapter / FINGERPRINT_FILE_NAME, MAX_FINGERPRINT_BYTES))
    except HeaderError:
        return None


def _checked(directory: Path, task: TrainingTask) -> AdapterFiles:
    files = read_adapter(directory, with_weights=True)
    found = verify_files(files, task.request.base, scan_weights=True)
    evaluated = task.request.evaluated
    insists = evaluated is not None and evaluated.accept_unproven_base
    if not (found.compatible or (insists and found.verdict is BaseMatch.SHAPE_ONLY)):
        why = "; ".join(reason.message for reason in found.reasons[:3]) or found.verdict
        raise InferenceError(
            f"The adapter cannot be put on {task.request.base.name}: {why}",
            code="adapter_rejected",
            suggestions=["Call verify_adapter_compatibility to see every reason"],
        )
    return files


def _too_little(summary: DatasetSummary, usable: int) -> DataError:
    seen = summary.left_out.get(ExclusionReason.TRAINED_ON, 0)
    unclear = summary.left_out.get(ExclusionReason.MAYBE_TRAINED_ON, 0)
    if seen or unclear:
        also = f" and perhaps on {unclear}" if unclear else ""
        return DataError(
            f"The evaluation data overlaps the training data: of {seen + unclear + usable} examples the adapter was trained "
            f"on {seen}{also}, which leaves {usable}; at least {DatasetPurpose.EVALUATION.min_examples} are needed.",
            code="evaluation_overlaps_training",
            suggestions=["Give code that the adapter was not trained on: newer files, or another part of the project"],
        )
    return DataError(
        f"The evaluation data gives {usable} examples; at least {DatasetPurpose.EVALUATION.min_examples} are needed.",
        code="too_few_examples",
        suggestions=["Give more code: a directory further up, or the whole repository"],
    )
