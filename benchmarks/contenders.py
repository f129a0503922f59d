"""Code that the training benchmarks share: the data set, our training run as a user's job, and the peers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import psutil
from peers import Figures, PeerTask

from peft_core.config import Settings
from peft_core.errors import InvalidArgument
from peft_core.jobs.running_job import WORKER
from peft_core.paths import DataPaths
from peft_core.planning.planner import plan
from peft_core.schemas.base_model import Base, ModelShape
from peft_core.schemas.dataset import DatasetSpec, SourceKind
from peft_core.schemas.events import (
    EVENT,
    AdapterWritten,
    CheckpointSaved,
    Event,
    HeldOutMeasured,
    JobFailed,
    StepCompleted,
)
from peft_core.schemas.results import Metrics
from peft_core.schemas.task import JobRequest, TrainingTask
from peft_core.schemas.training import TrainingConfig
from peft_core.system.child_process import child_environment

ROOT = Path(__file__).parent.parent
PACKAGES = ("uvicorn", "structlog", "pathspec", "httpcore2")  # in site-packages: about 1170 functions and classes
RANK = 16  # of every contender
PEER_BATCH = 8
PEER_RATE = 2e-4  # usual for LoRA; Trainer's own default, 5e-5, would learn less
TRL_PYTHON = ROOT / ".venv-peers" / "bin" / "python"


@dataclass(frozen=True)
class Workplace:
    """The inputs of all contenders."""

    root: Path
    source: Path  # repository
    base: Base
    base_directory: Path  # the same base in Hugging Face's format, for the peers
    examples: Path  # the examples that our training prepares from the repository, tokenised for the peers
    lengths: list[int]  # of the training examples, in tokens


@dataclass(frozen=True)
class TimedEvent:
    event: Event
    at_s: float  # since the process was started
    cpu_s: float  # CPU time of the process so far


def pin(threads: int) -> None:
    """Restrict this process and its children to as many cores as threads."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    else:
        os.environ["OMP_NUM_THREADS"] = str(threads)


@contextmanager
def workplace(held_out_fraction: float) -> Iterator[Workplace]:
    """Copy the code, convert the base, prepare and tokenise the examples."""
    # Imported here, so that --help does not import torch.
    from peft_core.base_models.tokenizer import load_tokenizer  # noqa: PLC0415
    from peft_core.data.dataset import read_examples  # noqa: PLC0415
    from peft_core.data.prepare import prepare  # noqa: PLC0415
    from peft_core.modeling.batches import tokenise  # noqa: PLC0415
    from peft_core.modeling.convert import ensure_hf_directory  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="peft-mcp-benchmark-") as temporary:
        root = Path(temporary)
        source = root / "source"
        for package in PACKAGES:
            for file in (Path(sysconfig.get_paths()["purelib"]) / package).rglob("*.py"):
                copy = source / file.relative_to(sysconfig.get_paths()["purelib"])
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        config = TrainingConfig(rank=RANK, held_out_fraction=held_out_fraction)
        base = planned(config, source, root).base
        directory = ensure_hf_directory(base, root / "base_models", lambda _detail: None)
        tokenizer = load_tokenizer(directory)
        prepare(
            DatasetSpec(
                source=source,
                source_kind=SourceKind.REPOSITORY,
                max_length=config.max_length,
                held_out_fraction=config.held_out_fraction,
                seed=config.seed,
            ),
            directory=root / "dataset",
            token_counter=tokenizer,
            report=lambda _detail: None,
        )
        examples: dict[str, list[dict[str, list[int]]]] = {"train": [], "held_out": []}
        for part, into in examples.items():
            for example in read_examples(root / "dataset" / f"{part}.jsonl"):
                document = tokenise(example, tokenizer, config.max_length)
                pairs = zip(document.ids_T.tolist(), document.learn_T.tolist(), strict=True)
                labels = [token if learned else -100 for token, learned in pairs]
                into.append({"input_ids": document.ids_T.tolist(), "labels": labels})
        (root / "examples.json").write_text(json.dumps(examples), encoding="utf-8")
        lengths = [len(example["input_ids"]) for example in examples["train"]]
        print(f"# {len(lengths)} training examples, {sum(lengths)} tokens; {len(examples['held_out'])} held out")
        yield Workplace(root, source, base, directory, root / "examples.json", lengths)


def planned(config: TrainingConfig, source: Path, root: Path) -> JobRequest:
    """Plan a job as the manager does, ignoring the settings of the user who runs the benchmark."""
    settings = Settings(data_dir=root / "data", default_base_model=None, max_memory_mb=None)
    return plan(str(source), config, settings, lambda _base, _device: None)


def smallest_limit_mb(config: TrainingConfig, place: Workplace) -> int:
    """Find the smallest `max_memory_mb` that the planner accepts, without training."""
    request = planned(config, place.source, place.root)
    refused, accepted = 255, max(256, -(-request.estimate.memory_bytes // 1_000_000) + 1)
    while accepted - refused > 1:
        limit_mb = (refused + accepted) // 2
        try:
            planned(config.model_copy(update={"max_memory_mb": limit_mb}), place.source, place.root)
        except InvalidArgument:
            refused = limit_mb
        else:
            accepted = limit_mb
    return accepted


def train(config: TrainingConfig, place: Workplace) -> list[TimedEvent]:
    """Plan a job and run it in the training worker, in a new data directory as a user's first job is."""
    request = planned(config, place.source, place.root)
    with tempfile.TemporaryDirectory(dir=place.root) as data_dir:
        paths = DataPaths(Path(data_dir))
        job = paths.job("benchmark")
        job.root.mkdir(parents=True)
        task = TrainingTask(
            job_id="benchmark",
            project_id="benchmark",
            request=request,
            job_dir=job.root,
            base_models_dir=paths.base_models,
        )
        job.task.write_text(task.model_dump_json(), encoding="utf-8")
        began, seen = time.perf_counter(), list[TimedEvent]()
        with (
            job.log.open("wb") as log,
            subprocess.Popen(
                [sys.executable, *WORKER, str(job.task)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=job.root,
                env=child_environment(),
            ) as process,
        ):
            watched = psutil.Process(process.pid)
            assert process.stdout is not None
            for line in process.stdout:
                at_s = time.perf_counter() - began
                try:
                    times = watched.cpu_times()
                    cpu_s = times.user + times.system
                except psutil.NoSuchProcess:  # this was its last event
                    cpu_s = seen[-1].cpu_s
                seen.append(TimedEvent(EVENT.validate_json(line), at_s, cpu_s))
        last = seen[-1].event if seen else None
        if isinstance(last, JobFailed):
            raise SystemExit(f"peft-mcp failed: {last.error.message}")
        if not isinstance(last, AdapterWritten):
            raise SystemExit(f"peft-mcp ended with {process.returncode}:\n{job.log.read_text()[-2000:]}")
    return seen


def tokens_per_cpu_s(seen: Sequence[TimedEvent]) -> float:
    """Return the speed of optimiser steps, excluding the first one, held-out evaluations and checkpoints."""
    steps = [number for number, s in enumerate(seen) if isinstance(s.event, StepCompleted)]
    first, last = steps[0], steps[-1]
    seconds = sum(
        seen[number].cpu_s - seen[number - 1].cpu_s
        for number in range(first + 1, last + 1)
        if not isinstance(seen[number].event, HeldOutMeasured | CheckpointSaved)
    )
    done = [s.event.tokens for s in (seen[first], seen[last]) if isinstance(s.event, StepCompleted)]
    return (done[1] - done[0]) / seconds


def metrics(seen: Sequence[TimedEvent]) -> Metrics:
    last = seen[-1].event
    assert isinstance(last, AdapterWritten)
    return last.metrics


def run_peer(peer: str, place: Workplace, *, steps: int | None, seed: int = 0) -> Figures:
    """Run a peer in a process of its own.

    Raises:
        SystemExit: the peer failed.
    """
    config = TrainingConfig(rank=RANK)
    task = PeerTask(
        peer=peer,
        base=str(place.base_directory),
        examples=str(place.examples),
        output=str(place.root / "peer"),
        linears=linears(place.base.shape),
        steps=steps,
        batch_size=PEER_BATCH,
        learning_rate=PEER_RATE,
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        seed=seed,
    )
    file = place.root / "peer.json"
    file.write_text(json.dumps(asdict(task)), encoding="utf-8")
    python = str(TRL_PYTHON) if peer.startswith("TRL") else sys.executable
    done = subprocess.run(
        [python, str(Path(__file__).with_name("peers.py")), str(file)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        raise SystemExit(f"{peer} failed:\n{done.stderr[-3000:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def linears(shape: ModelShape) -> list[tuple[int, int, int]]:
    """Return (count, inputs, outputs) of the matrices of a Llama-like model, LM head included."""
    hidden, kv_size = shape.hidden_size, shape.hidden_size // shape.heads * shape.kv_heads
    return [
        (2 * shape.layers, hidden, hidden),  # query, output
        (2 * shape.layers, hidden, kv_size),  # key, value
        (2 * shape.layers, hidden, shape.intermediate_size),  # gate, up
        (shape.layers, shape.intermediate_size, hidden),  # down
        (1, hidden, shape.vocab_size),
    ]


def spread_of(values: Sequence[float], form: str) -> str:
    """Format as `median (minimum-maximum)`."""
    return f"{median(values):{form}} ({min(values):{form}}-{max(values):{form}})"
