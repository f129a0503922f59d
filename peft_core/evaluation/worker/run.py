"""One evaluation of an existing adapter, or of two, from the task to the comparison with the base model, in numbered phases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import structlog
import torch

from peft_core.adapters.files import read_adapter
from peft_core.adapters.verify import verify_files
from peft_core.data.exclusions import ExclusionReason
from peft_core.data.leakage import TrainingFingerprint, read_fingerprint
from peft_core.devices.records import distrusted
from peft_core.errors import DataError, InferenceError, sanitize
from peft_core.evaluation.comparison import compare_adapters
from peft_core.evaluation.summary import Measurement, mean_loss
from peft_core.evaluation.worker.completions import undo_fusion
from peft_core.evaluation.worker.evaluator import Evaluator
from peft_core.evaluation.worker.prompts import Prompt
from peft_core.evaluation.worker.setup import RunData, Session, prepare_data, require_adapter, start_session
from peft_core.modeling.adapter_model import ResidentModel
from peft_core.modeling.memory import return_freed_memory
from peft_core.modeling.objective import Objective, probe_fast_paths
from peft_core.paths import DataPaths, adapter_names
from peft_core.planning.evaluation_budget import budget_of_evaluation
from peft_core.retrieval.service import training_code
from peft_core.schemas.dataset import DatasetPurpose, DatasetSummary
from peft_core.schemas.evaluation import ComparedAdapter, TrainedOn
from peft_core.schemas.events import AdaptersCompared, DatasetPrepared, Emit, Evaluated, HeldOutMeasured, RunPlanned
from peft_core.schemas.results import BaseMatch, Phase
from peft_core.schemas.task import TrainingTask
from peft_core.schemas.training import EvaluatedAdapter
from peft_core.system.cancellation import StopFlag

_log = structlog.get_logger(__name__)


def run(task: TrainingTask, emit: Emit, stop: StopFlag) -> None:
    """Compare a base model with one adapter, or with two, on text that no adapter was trained on.

    Raises:
        PeftMcpError: a failure that the user can correct.
        Cancelled: on request.
    """
    evaluated, config = task.request.evaluated, task.request.config
    assert evaluated is not None, "this is a training task"  # noqa: S101 -- an error in the caller
    session = start_session(task, emit, stop, distrusted=distrusted(task.data_dir, torch.__version__))

    # 1. Text that no adapter was trained on.
    session.start_phase(Phase.PREPARING_DATA)
    for field, path in evaluated.paths.items():
        require_adapter(task, path, field)
    paths = list(evaluated.paths.values())
    known = [read_fingerprint(path) for path in paths]
    data = prepare_data(session, known)
    summary = _summary(data, list(evaluated.paths))
    emit(DatasetPrepared(dataset=summary))
    evaluator = Evaluator(data, config.max_length, seed=config.seed)
    stop.check()

    # 2. Base model and adapters.
    session.start_phase(Phase.LOADING_MODEL)
    model = ResidentModel.load(task.request.base, data.base_directory, session.device)
    emit(RunPlanned(device=session.device.device, total_steps=0))
    names = [_add_adapter(model, path, session) for path in paths]
    # With all adapters in the model: one that changes the output head wraps it for all.
    objective = probe_fast_paths(model.causal, config.max_length)
    return_freed_memory()
    stop.check()

    # 3. Scores and completions of each.
    searched: tuple[Path, ...] = ()  # a comparison of two adapters measures no retrieval
    if task.data_dir is not None and len(paths) == 1:
        searched = training_code(DataPaths(task.data_dir), paths[0])
    budget = budget_of_evaluation(summary.held_out_tokens, has_training_code=bool(searched))
    evaluator.choose_windows(objective, budget.windows)
    evaluator.choose_positions(objective, budget.positions, searched)
    measured, prompts = _measure(session, model, names, evaluator, objective, budget.completions)

    # 4. The summary.
    emit(_result(evaluated, known, summary, evaluator, measured, prompts))


def _result(
    evaluated: EvaluatedAdapter,
    known: Sequence[TrainingFingerprint | None],
    summary: DatasetSummary,
    evaluator: Evaluator,
    measured: Sequence[Measurement],
    prompts: Sequence[Prompt],
) -> Evaluated | AdaptersCompared:
    """Return the evaluation of one adapter, or the comparison of two. `measured` has the base model, then each adapter."""
    base, *adapters = measured
    evaluations = [
        # What an adapter is known to have been trained on was excluded.
        evaluator.summarise(base, adapter, prompts).model_copy(
            update={"seen_in_training": None if fingerprint is None else 0.0}
        )
        for adapter, fingerprint in zip(adapters, known, strict=True)
    ]
    if evaluated.compared_with is None:
        return Evaluated(evaluation=evaluations[0])
    paths = list(evaluated.paths.values())
    a, b = (
        ComparedAdapter(name=sanitize(name), adapter_path=str(path), evaluation=evaluation.without_texts)
        for name, path, evaluation in zip(adapter_names(paths), paths, evaluations, strict=True)
    )
    comparison = compare_adapters(
        (a, b),
        measured,
        evaluator.quote(prompts),
        left_out=_trained_on(summary),
        shared_training=None if known[0] is None or known[1] is None else known[0].overlap(known[1]),
        seed=evaluator.seed,
    )
    return AdaptersCompared(comparison=comparison)


def _measure(
    session: Session,
    model: ResidentModel,
    adapters: Sequence[str],
    evaluator: Evaluator,
    objective: Objective,
    completion_tokens: int,
) -> tuple[list[Measurement], list[Prompt]]:
    """Measure the base model, then each adapter."""
    stop = session.stop
    session.start_phase(Phase.EVALUATING_BASE)
    model.select(None)
    scores = [evaluator.score(objective, session.accelerator, stop)]
    session.emit(HeldOutMeasured(step=0, loss=mean_loss(scores[0].held_out), whole_set=True))
    # What remains: scores of the adapters, and completions of all.
    work, labels = 2 * len(adapters) + 1, ["the adapter"] if len(adapters) == 1 else ["adapter A", "adapter B"]
    for number, (name, label) in enumerate(zip(adapters, labels, strict=True)):
        detail = label if len(adapters) > 1 else ""
        session.start_phase(Phase.EVALUATING_ADAPTER, detail, done=number / work)
        model.select(name)
        scores.append(evaluator.score(objective, session.accelerator, stop))
    undo_fusion(model.causal, model.causal)
    prompts = evaluator.choose_prompts(completion_tokens)
    measured: list[Measurement] = []
    for selected, label, scored in zip([None, *adapters], ["the base model", *labels], scores, strict=True):
        done = (len(adapters) + len(measured)) / work
        session.start_phase(Phase.EVALUATING_ADAPTER, f"completing held-out prompts with {label}", done=done)
        model.select(selected)
        measured.append(evaluator.measure(scored, prompts, model.causal, stop))
    return measured, prompts


def _trained_on(summary: DatasetSummary) -> TrainedOn:
    """Return how many examples were left out because an adapter was trained on them."""

    def count(reason: ExclusionReason) -> int:
        return summary.left_out.get(reason, 0)

    return TrainedOn(
        adapter_a=count(ExclusionReason.TRAINED_ON_BY_A),
        adapter_b=count(ExclusionReason.TRAINED_ON_BY_B),
        both=count(ExclusionReason.TRAINED_ON),
        uncertain=count(ExclusionReason.MAYBE_TRAINED_ON),
    )


def _summary(data: RunData, adapters: Sequence[str]) -> DatasetSummary:
    """Return the dataset's summary for the examples that can be evaluated. `adapters`: the fields that name them.

    Raises:
        DataError: there are too few of them.
    """
    summary, usable = data.dataset.summary, len(data.held_out)
    needed = DatasetPurpose.EVALUATION.min_examples
    if usable >= needed:
        tokens = sum(len(example.document) for example in data.held_out)
        return summary.model_copy(update={"held_out_examples": usable, "held_out_tokens": tokens})
    left_out = _trained_on(summary)
    if left_out.total:
        raise DataError(
            f"The evaluation data overlaps the training data: of {left_out.total + usable} examples "
            f"{_overlap_in_words(left_out, adapters)}, which leaves {usable}; at least {needed} are needed.",
            code="evaluation_overlaps_training",
            suggestions=["Pass code that no adapter was trained on: newer files, or another part of the project"],
        )
    raise DataError(
        f"The evaluation data has {usable} usable examples; at least {needed} are needed.",
        code="too_few_examples",
        suggestions=["Pass more code: a parent directory, or the whole repository"],
    )


def _overlap_in_words(left_out: TrainedOn, adapters: Sequence[str]) -> str:
    if len(adapters) > 1:
        return f"there are {left_out.in_words(adapters[0], adapters[1])}"
    also = f" and possibly on {left_out.uncertain} more" if left_out.uncertain else ""
    return f"the adapter was trained on {left_out.both}{also}"


def _add_adapter(model: ResidentModel, path: Path, session: Session) -> str:
    """Check the adapter's files, load the very bytes that were checked, and return the adapter's name in the model.

    Raises:
        InferenceError: the adapter does not fit the base model.
    """
    base, evaluated = session.task.request.base, session.task.request.evaluated
    files = read_adapter(path, weights="keep")
    check = verify_files(files, base)
    is_accepted = evaluated is not None and evaluated.accept_unproven_base and check.verdict is BaseMatch.SHAPE_ONLY
    if not (check.compatible or is_accepted):
        reasons = "; ".join(reason.message for reason in check.reasons[:3]) or check.verdict
        raise InferenceError(
            f"The adapter {path.name} cannot be loaded onto {base.name}: {reasons}",
            code="adapter_rejected",
            suggestions=["Call verify_adapter_compatibility to see every reason"],
        )
    name, effect = model.add(files)
    _log.info("adapter_loaded", **effect.model_dump())
    return name
