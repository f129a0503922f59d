"""The job of the small worker. Each step is a function, so that it can be a kill point."""

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
    emit(PhaseStarted(phase=Phase.PREPARING_DATA))
    prepare_data(task, emit, stop)
    emit(PhaseStarted(phase=Phase.LOADING_MODEL))
    load(stop)
    start = read_checkpoint(paths.checkpoint)
    emit(RunPlanned(device="cpu", total_steps=STEPS, start_step=start))
    emit(PhaseStarted(phase=Phase.EVALUATING_BASE))
    evaluate(emit, step=0)
    emit(PhaseStarted(phase=Phase.TRAINING))
    for step in range(start + 1, STEPS + 1):
        train_step(step, emit)
        if step % 2 == 0 or stop.requested:
            save_checkpoint(paths.checkpoint, step)
            emit(CheckpointSaved(step=step))
        stop.check()
    emit(PhaseStarted(phase=Phase.EVALUATING_ADAPTER))
    evaluate(emit, step=STEPS)
    stop.check()
    emit(PhaseStarted(phase=Phase.SAVING))
    save_adapter(task, paths.adapter)
    emit(AdapterWritten(metrics=METRICS))
    leave()


def prepare_data(task: TrainingTask, emit: Emit, stop: StopFlag) -> None:
    prepared = prepare(
        task.request.dataset,
        directory=JobPaths(task.job_dir).dataset,
        token_counter=EstimatedTokenCounter(),
        report=lambda _: stop.check(),
    )
    emit(DatasetPrepared(dataset=prepared.summary))
    stop.check()


def load(stop: StopFlag) -> None:
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
    replace(draft, directory / "state.json")


def replace(draft: Path, path: Path) -> None:
    draft.replace(path)


def evaluate(emit: Emit, step: int) -> None:
    emit(HeldOutMeasured(step=step, loss=2.0 - step / STEPS, whole_set=True))


def train_step(step: int, emit: Emit) -> None:
    emit(
        StepCompleted(
            step=step,
            loss=2.0,
            learning_rate=1e-3,
            tokens=step,
            tokens_per_second=1.0,
            eta_s=1.0,
            memory_bytes=1,
        ),
    )


def save_adapter(task: TrainingTask, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    write_adapter(directory)
    files = {name: sha256_of(directory / name) for name in (CONFIG, WEIGHTS)}
    manifest = make_manifest(task.job_id, task.project_id, base=task.request.base, files=files)
    finish(directory, manifest.model_copy(update={"created_at": "2026-01-01T00:00:00Z", "metrics": METRICS}))


finish = write_manifest


def leave() -> None:
    """Do nothing: a kill point after the last event, before the process ends."""
