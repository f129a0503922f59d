"""One evaluation of an existing adapter, from the task to the comparison with its base model, in numbered phases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from peft_core.adapters.files import read_adapter
from peft_core.adapters.verify import verify_files
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.leakage import FINGERPRINT_FILE_NAME, MAX_FINGERPRINT_BYTES, TrainingFingerprint
from peft_core.errors import DataError, HeaderError, InferenceError
from peft_core.evaluation.summary import mean_loss
from peft_core.evaluation.worker.completions import undo_fusion
from peft_core.evaluation.worker.evaluator import Evaluator, completion_budget
from peft_core.evaluation.worker.setup import RunData, Session, prepare_data, require_adapter, start_session
from peft_core.modeling.adapter_model import ResidentModel
from peft_core.modeling.memory import return_freed_memory
from peft_core.modeling.objective import probe_fast_paths
from peft_core.schemas.dataset import DatasetPurpose, DatasetSummary
from peft_core.schemas.events import DatasetPrepared, Emit, Evaluated, HeldOutMeasured, RunPlanned
from peft_core.schemas.results import BaseMatch, Phase
from peft_core.schemas.task import TrainingTask
from peft_core.schemas.training import EvaluatedAdapter
from peft_core.system.cancellation import StopFlag
from peft_core.system.files import read_small

_log = structlog.get_logger(__name__)


def run(task: TrainingTask, emit: Emit, stop: StopFlag) -> None:
    """Compare base model and adapter on text that the adapter was not trained on.

    Raises:
        PeftMcpError: a failure that the user can correct.
        Cancelled: on request.
    """
    evaluated, config = task.request.evaluated, task.request.config
    assert evaluated is not None, "this is a training task"  # noqa: S101 -- an error in the caller
    session = start_session(task, emit, stop)
    accelerator = session.accelerator

    # 1. Text that the adapter was not trained on.
    session.start_phase(Phase.PREPARING_DATA)
    require_adapter(task, evaluated.adapter_path)
    known = _training_fingerprint(evaluated.adapter_path)
    data = prepare_data(session, known)
    summary = _summary(data)
    emit(DatasetPrepared(dataset=summary))
    evaluator = Evaluator(data.held_out, data.tokenizer, config.max_length, seed=config.seed)
    stop.check()

    # 2. Base model and adapter.
    session.start_phase(Phase.LOADING_MODEL)
    model = ResidentModel.load(task.request.base, data.base_directory, session.device)
    emit(RunPlanned(device=session.device.device, total_steps=0))
    name = _add_adapter(model, evaluated, session)
    # With the adapter active, because it may change the output head.
    objective = probe_fast_paths(model.causal, config.max_length)
    return_freed_memory()
    stop.check()

    # 3. Scores of the base model, then of the adapter.
    session.start_phase(Phase.EVALUATING_BASE)
    model.select(None)
    base_scores = evaluator.score(objective, accelerator, stop)
    emit(HeldOutMeasured(step=0, loss=mean_loss(base_scores.held_out), whole_set=True))
    session.start_phase(Phase.EVALUATING_ADAPTER)
    model.select(name)
    adapter_scores = evaluator.score(objective, accelerator, stop)

    # 4. Completions of both, and the summary.
    session.start_phase(Phase.EVALUATING_ADAPTER, "completing held-out prompts with both models")
    undo_fusion(model.causal, model.causal)

    @contextmanager
    def without_adapter() -> Iterator[None]:
        model.select(None)
        yield
        model.select(name)

    budget = completion_budget(2 * summary.held_out_tokens)
    evaluation = evaluator.compare(base_scores, adapter_scores, model.causal, without_adapter, budget=budget, stop=stop)
    seen_in_training = None if known is None else 0.0  # known examples were excluded
    emit(Evaluated(evaluation=evaluation.model_copy(update={"seen_in_training": seen_in_training})))


def _training_fingerprint(adapter: Path) -> TrainingFingerprint | None:
    """Return the record of what the adapter was trained on, or None if it has none."""
    try:
        return TrainingFingerprint.from_bytes(read_small(adapter / FINGERPRINT_FILE_NAME, MAX_FINGERPRINT_BYTES))
    except HeaderError:
        return None


def _summary(data: RunData) -> DatasetSummary:
    """Return the dataset's summary for the examples that can be evaluated.

    Raises:
        DataError: there are too few of them.
    """
    summary, usable = data.dataset.summary, len(data.held_out)
    needed = DatasetPurpose.EVALUATION.min_examples
    if usable >= needed:
        tokens = sum(len(example.document) for example in data.held_out)
        return summary.model_copy(update={"held_out_examples": usable, "held_out_tokens": tokens})
    seen = summary.left_out.get(ExclusionReason.TRAINED_ON, 0)
    maybe_seen = summary.left_out.get(ExclusionReason.MAYBE_TRAINED_ON, 0)
    if seen or maybe_seen:
        also = f" and possibly on {maybe_seen} more" if maybe_seen else ""
        raise DataError(
            f"The evaluation data overlaps the training data: of {seen + maybe_seen + usable} examples the adapter was trained "
            f"on {seen}{also}, which leaves {usable}; at least {needed} are needed.",
            code="evaluation_overlaps_training",
            suggestions=["Pass code that the adapter was not trained on: newer files, or another part of the project"],
        )
    raise DataError(
        f"The evaluation data has {usable} usable examples; at least {needed} are needed.",
        code="too_few_examples",
        suggestions=["Pass more code: a parent directory, or the whole repository"],
    )


def _add_adapter(model: ResidentModel, evaluated: EvaluatedAdapter, session: Session) -> str:
    """Check the adapter's files, load the very bytes that were checked, and return the adapter's name in the model.

    Raises:
        InferenceError: the adapter does not fit the base model.
    """
    base = session.task.request.base
    files = read_adapter(evaluated.adapter_path, weights="keep")
    check = verify_files(files, base)
    is_accepted = evaluated.accept_unproven_base and check.verdict is BaseMatch.SHAPE_ONLY
    if not (check.compatible or is_accepted):
        reasons = "; ".join(reason.message for reason in check.reasons[:3]) or check.verdict
        raise InferenceError(
            f"The adapter cannot be loaded onto {base.name}: {reasons}",
            code="adapter_rejected",
            suggestions=["Call verify_adapter_compatibility to see every reason"],
        )
    name, effect = model.add(files)
    _log.info("adapter_loaded", **effect.model_dump())
    return name
