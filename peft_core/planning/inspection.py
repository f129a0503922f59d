"""The dry run of a training: its dataset, its settings, and how long it would take."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from peft_core.config import Settings
from peft_core.errors import unwritable
from peft_core.paths import DataPaths
from peft_core.planning.continuation import Adapters
from peft_core.planning.cost_model import steps_of
from peft_core.planning.planner import plan, write_source
from peft_core.planning.preview import Preview, PreviewRequest
from peft_core.schemas.base_model import Base
from peft_core.schemas.dataset import DatasetSummary, Example, Segment, TrainingData
from peft_core.schemas.results import DataSample, Estimate, NextStep, TrainingDataReport
from peft_core.schemas.task import JobRequest
from peft_core.schemas.training import TrainingConfig
from peft_core.system.child_process import run_json_child
from peft_core.system.cleanup import prune_inspections
from peft_core.system.user_paths import user_path

TIMEOUT_S = 120.0
_MAX_SAMPLE = 1200  # characters
_MIN_SHOWN = 60  # characters of each segment of a long example
LEARNED_BEGINS, LEARNED_ENDS = "\u27e6", "\u27e7"  # white square brackets, which code does not have


def inspect_training_data(
    training_data: TrainingData,
    config: TrainingConfig,
    settings: Settings,
    measured_speed: Callable[[Base, str], float | None],
    adapters: Adapters | None = None,
) -> TrainingDataReport:
    """Check and choose everything that `train_adapter` would, and preview the examples. Nothing is saved.

    Raises:
        InvalidArgument, DataError, BaseCheckpointError, StorageError: it could not be trained on, and why.
    """
    draft = plan(training_data, config, settings, measured_speed, adapters)
    with _scratch(settings.paths) as scratch:
        request = write_source(draft, training_data, scratch / "source" / "records.jsonl")
        preview = _preview(request, scratch, settings)
    return _report(
        request,
        preview,
        given=str(user_path(training_data).absolute()) if isinstance(training_data, str) else "these records",
    )


@contextmanager
def _scratch(paths: DataPaths) -> Iterator[Path]:
    """Yield a directory for copies of the data, inside the data directory, so that leftovers of a killed server are pruned."""
    prune_inspections(paths)
    try:
        paths.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        paths.inspections.mkdir(mode=0o700, exist_ok=True)
        directory = tempfile.TemporaryDirectory(dir=paths.inspections, ignore_cleanup_errors=True)
    except OSError as error:
        raise unwritable(paths.root, error) from error
    with directory as scratch:
        yield Path(scratch)


def _preview(request: JobRequest, scratch: Path, settings: Settings) -> Preview:
    return run_json_child(
        "peft_core.planning.preview",
        PreviewRequest(
            dataset=request.dataset,
            base=request.base,
            parent=request.continued and request.continued.adapter_path,
            data_dir=settings.data_dir,
            allowed_roots=settings.allowed_roots,
        ),
        Preview,
        timeout_s=TIMEOUT_S,
        action="Previewing the examples",
        on_timeout=("Inspect a directory of it", "train_adapter itself has no such limit"),
        temporary_dir=scratch,
    )


def _report(request: JobRequest, preview: Preview, *, given: str) -> TrainingDataReport:
    dataset = preview.dataset
    step = NextStep(
        tool="train_adapter",
        missing=("project_id", "training_data", "config"),
        reason="Training with the same data and config uses this dataset.",
    )
    return TrainingDataReport(
        training_data=given,
        base_model=request.base.name,
        device=request.device,
        train_examples=dataset.train_examples,
        held_out_examples=dataset.held_out_examples,
        train_tokens=dataset.train_tokens,
        held_out_tokens=dataset.held_out_tokens,
        files=dataset.files,
        counted=_counted(request, dataset),
        records=request.found.examples,
        code_files=request.found.files if None not in (request.found.examples, request.found.units) else None,
        unread_files=preview.unread_files,
        languages=preview.languages,
        left_out=dataset.left_out,
        left_out_by_extension=dataset.left_out_by_extension,
        advice=list(request.found.advice),
        unused_keys=request.found.unused_keys,
        skipped=list(request.found.skipped),
        study=dataset.study,
        secrets_removed=dataset.secrets_removed,
        held_out_files=preview.held_out_files,
        largest_files=preview.largest_files,
        samples=[_sample(example) for example in preview.samples],
        config=request.config,
        estimate=_estimate_of(preview, request),
        next=step.sentence,
        next_step=step,
    )


def _counted(request: JobRequest, dataset: DatasetSummary) -> str:
    """Return what the counts are of, if it is not all of the data."""
    if request.continued is None:
        return ""
    replayed = dataset.replayed_examples
    return (
        f"The counts are of the training that continues from adapter {request.continued.adapter_id}: "
        f"{dataset.train_examples - replayed} training examples that are new or have changed, {replayed} known ones that it "
        "repeats, and the held-out ones that it is measured on."
    )


def _estimate_of(preview: Preview, request: JobRequest) -> Estimate:
    """Return the estimate with the steps and tokens of the dataset that was prepared, if it is the training's own."""
    dataset, estimate, config = preview.dataset, request.estimate, request.config
    if config.max_steps is not None or preview.unread_files:
        return estimate
    epochs = config.num_epochs or 1.0
    tokens = max(1, round(dataset.train_tokens * epochs))
    seconds = None if estimate.seconds is None else round(estimate.seconds * tokens / max(1, estimate.train_tokens), 1)
    steps = steps_of(dataset.train_examples, epochs, config.batch_size)
    return estimate.model_copy(update={"steps": steps, "train_tokens": tokens, "seconds": seconds})


def _sample(example: Example) -> DataSample:
    given = "".join(segment.text for segment in example.segments if not segment.learn)
    learned = "".join(segment.text for segment in example.segments if segment.learn)
    return DataSample(
        path=example.path,
        start_line=example.start_line,
        end_line=example.end_line,
        kind=example.kind,
        language=example.language,
        tokens=example.tokens,
        given=_shorten(given),
        learned=_shorten(learned),
        text=_marked(example.segments),
    )


def _marked(segments: Sequence[Segment]) -> str:
    """Return the text of an example with what is learned between marks. Long segments lose their middle."""
    shown = max(_MIN_SHOWN, _MAX_SAMPLE // max(1, len(segments)))
    pieces: list[str] = []
    learning = False
    for segment in segments:
        if segment.learn != learning:
            pieces.append(LEARNED_BEGINS if segment.learn else LEARNED_ENDS)
            learning = segment.learn
        text = segment.text
        if len(text) > shown:
            text = f"{text[: shown // 2]} […] {text[len(text) - shown // 2 :]}"
        pieces.append(text)
    return "".join([*pieces, LEARNED_ENDS if learning else ""])


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SAMPLE else f"{text[:_MAX_SAMPLE]}\n… ({len(text) - _MAX_SAMPLE} more characters)"
