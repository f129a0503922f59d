"""The job of the small worker: every step of a training in half a second, with a kill point at each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from peft_core.adapters.manifest import CONFIG, WEIGHTS, sha256_of, write_manifest
from peft_core.data.prepare import prepare
from peft_core.data.token_counter import EstimatedTokenCounter
from peft_core.paths import JobPaths
from peft_core.schemas.events import (
    AdapterWritten,
    CheckpointSaved,
    DatasetPrepared,
    Emit,
    HeldOutMeasured,
    PhaseStarted,
    RunPlanned,
    StepCompleted,
)
from peft_core.schemas.results import Metrics, Phase
from peft_core.schemas.task import TrainingTask
from peft_core.system.cancellation import StopFlag
from tests.factories import make_manifest
from tests.model_files import write_adapter

STEPS = 6
METRICS = Metrics(base_loss=2.0, adapter_loss=1.0, base_perplexity=7.4, adapter_perplexity=2.7)


def run(task: TrainingTask, emit: Emit, stop: StopFlag) -> None:
    paths = JobPaths(task.job_dir)
    # kill-point: worker: the process has started
    emit(PhaseStarted(phase=Phase.PREPARING_DATA))
    # kill-point: worker: the data are about to be prepared
    prepare_data(task, emit, stop)
    # kill-point: worker: the data are prepared
    emit(PhaseStarted(phase=Phase.LOADING_MODEL))
    # kill-point: worker: the base model is about to be loaded
    stop.check()
    start = read_checkpoint(paths.checkpoint)
    emit(RunPlanned(device="cpu", total_steps=STEPS, start_step=start))
    emit(PhaseStarted(phase=Phase.EVALUATING_BASE))
    # kill-point: worker: the base model is about to be evaluated
    evaluate(emit, step=0)
    emit(PhaseStarted(phase=Phase.TRAINING))
    for step in range(start + 1, STEPS + 1):
        # kill-point: worker: the first step is about to start
        # kill-point: worker: the second step is about to start (pass 2)
        train_step(step, emit)
        if step % 2 == 0 or stop.requested:
            # kill-point: worker: a checkpoint is about to be written
            save_checkpoint(paths.checkpoint, step)
            # kill-point: worker: a checkpoint is in its place
            emit(CheckpointSaved(step=step))
        stop.check()
    emit(PhaseStarted(phase=Phase.EVALUATING_ADAPTER))
    # kill-point: worker: the adapter is about to be evaluated
    evaluate(emit, step=STEPS)
    stop.check()
    emit(PhaseStarted(phase=Phase.SAVING))
    # kill-point: worker: the adapter is about to be written
    save_adapter(task, paths.adapter)
    # kill-point: worker: the adapter is complete but not reported
    emit(AdapterWritten(metrics=METRICS))
    # kill-point: worker: the last event is emitted, the process still lives


def prepare_data(task: TrainingTask, emit: Emit, stop: StopFlag) -> None:
    prepared = prepare(
        task.request.dataset,
        directory=JobPaths(task.job_dir).dataset,
        token_counter=EstimatedTokenCounter(),
        report=lambda _: stop.check(),
    )
    emit(DatasetPrepared(dataset=prepared.summary))
    stop.check()


def read_checkpoint(directory: Path) -> int:
    try:
        return int(json.loads((directory / "state.json").read_text())["step"])
    except FileNotFoundError:
        return 0


def save_checkpoint(directory: Path, step: int) -> None:
    directory.mkdir(exist_ok=True)
    draft = directory / ".state.json.tmp"
    draft.write_text(json.dumps({"step": step}))
    # kill-point: worker: a checkpoint is written but not in its place
    draft.replace(directory / "state.json")


def evaluate(emit: Emit, step: int) -> None:
    emit(HeldOutMeasured(step=step, loss=2.0 - step / STEPS, whole_set=True))


def train_step(step: int, emit: Emit) -> None:
    emit(
        StepCompleted(
            step=step, loss=2.0, learning_rate=1e-3, tokens=step, tokens_per_second=1.0, eta_s=1.0, memory_bytes=1
        )
    )


def save_adapter(task: TrainingTask, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    write_adapter(directory)
    # kill-point: worker: the adapter is written, without a manifest
    files = {name: sha256_of(directory / name) for name in (CONFIG, WEIGHTS)}
    manifest = make_manifest(task.job_id, task.project_id, base=task.request.base, files=files)
    write_manifest(directory, manifest.model_copy(update={"created_at": "2026-01-01T00:00:00Z", "metrics": METRICS}))
