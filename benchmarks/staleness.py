"""How much of an adapter's gain is left on code that has changed since it was trained?

Versions of public packages are replayed as if they were commits. An adapter is trained on the oldest version, with the
bundled base. For each later version: the share of its units that have changed, as the product reports it, and the loss of
base and adapter on examples that overlap a changed or new unit. The first row of a package is its held-out files: what the
adapter gains on unseen code of the version that it was trained on. The difference to that gain, times the share of the units
that have changed, is what is lost over all code, if a new adapter would gain as much on it. Finished trainings and measurements
are not repeated.

    pip download --no-deps --only-binary=:all: -d WHEELS mcp==1.9.0 mcp==1.9.4 ...  # every version below
    python benchmarks/staleness.py --wheels WHEELS --work DIR [--steps 12] [--examples 24] [--packages mcp ...]
"""

from __future__ import annotations

import argparse
import json
import random
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anyio
import torch
from accelerate import Accelerator

from peft_core import PEFTManager, Settings, TrainingStatus
from peft_core.adapters.files import read_adapter
from peft_core.base_models.resolve import resolve
from peft_core.base_models.tokenizer import BaseTokenizer, load_tokenizer
from peft_core.data.dataset import read_examples
from peft_core.data.examples import examples_from_file
from peft_core.data.secrets import redact_secrets
from peft_core.data.snapshot import Snapshot, read_snapshot
from peft_core.data.units import units_of_file
from peft_core.data.walk import walk
from peft_core.evaluation.worker.scoring import make_held_out_examples, score_examples
from peft_core.modeling.adapter_model import ResidentModel
from peft_core.modeling.convert import ensure_hf_directory
from peft_core.modeling.device import choose, describe
from peft_core.modeling.objective import Objective, probe_fast_paths
from peft_core.schemas.base_model import BUNDLED
from peft_core.schemas.dataset import Example
from peft_core.schemas.results import Status
from peft_core.system.cancellation import StopFlag

# The oldest version is trained on.
VERSIONS = {
    "openai_agents": ("0.2.0", "0.2.3", "0.2.7", "0.4.0", "0.8.0"),
    "starlette": ("0.38.0", "0.39.0", "0.45.0", "0.47.0", "1.3.0"),
    "mcp": ("1.9.0", "1.9.4", "1.12.0", "1.23.0", "2.0.0"),
}
MAX_LENGTH = 256


@dataclass
class Row:
    """Base and adapter on one set of examples."""

    package: str
    version: str
    share: float | None  # of the units, changed since the training; None: the held-out files of the training
    examples: int
    base_loss: float
    adapter_loss: float

    @property
    def gain(self) -> float:
        return self.base_loss - self.adapter_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, required=True, help="directory with a wheel of every version")
    parser.add_argument("--work", type=Path, required=True, help="data directory; finished runs in it are not repeated")
    parser.add_argument("--packages", nargs="+", default=list(VERSIONS), choices=list(VERSIONS))
    parser.add_argument("--steps", type=int, default=12, help="optimiser steps per training")
    parser.add_argument("--examples", type=int, default=24, help="examples per version")
    anyio.run(replay, parser.parse_args())


async def replay(options: argparse.Namespace) -> None:
    rows: list[Row] = []
    torch.set_num_threads(1)
    async with PEFTManager(Settings(data_dir=options.work.resolve())) as manager:
        for package in options.packages:
            saved = options.work / f"{package}.json"
            if not saved.exists():
                status = await train(manager, package, options)
                measured = measure(package, status, options)
                saved.write_text(json.dumps([row.__dict__ for row in measured]), encoding="utf-8")
            rows += [Row(**row) for row in json.loads(saved.read_text(encoding="utf-8"))]
    print("| trained on | measured on | units changed | examples | base | adapter | gain | lost over all code |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        first = next(other for other in rows if other.package == row.package)
        share = "held-out files" if row.share is None else f"{row.share:.0%}"
        lost = "" if row.share is None else f"{row.share * (first.gain - row.gain):.3f}"
        print(
            f"| {row.package} {first.version} | {row.version} | {share} | {row.examples} | {row.base_loss:.3f} | "
            f"{row.adapter_loss:.3f} | {row.gain:.3f} | {lost} |"
        )


async def train(manager: PEFTManager, package: str, options: argparse.Namespace) -> TrainingStatus:
    """Return the finished training on the oldest version, from an earlier run if there is one."""
    project = package
    config = {"max_steps": options.steps, "max_length": MAX_LENGTH, "held_out_fraction": 0.05, "make_current": "always"}
    status = await manager.get_training_status(project)
    if status.status is Status.NOT_STARTED:
        source = unpacked(package, VERSIONS[package][0], options)
        status = await manager.train_adapter(project, str(source), config)
    elif status.status in (Status.INTERRUPTED, Status.FAILED, Status.CANCELLED):
        status = await manager.resume_training(str(status.job_id))
    async for latest in manager.watch_training(project, status.job_id):
        status = latest
    assert status.status is Status.COMPLETED, status.error
    return status


def unpacked(package: str, version: str, options: argparse.Namespace) -> Path:
    directory: Path = options.wheels.resolve() / "unpacked" / f"{package}-{version}"
    if not directory.exists():
        (wheel,) = options.wheels.glob(f"{package}-{version}-*.whl")
        zipfile.ZipFile(wheel).extractall(directory)
    return directory


def measure(package: str, status: TrainingStatus, options: argparse.Namespace) -> list[Row]:
    adapter = Path(str(status.adapter_path))
    snapshot = read_snapshot(adapter)
    assert snapshot is not None
    base = resolve(BUNDLED, Settings(data_dir=options.work.resolve()))
    directory = ensure_hf_directory(base, options.work / "base-models", lambda _: None)
    tokenizer = load_tokenizer(directory)
    model = ResidentModel.load(base, directory, choose("cpu", describe(), "auto"))
    name, _ = model.add(read_adapter(adapter, weights="keep"))
    objective = probe_fast_paths(model.causal, MAX_LENGTH)
    accelerator = Accelerator(cpu=True)

    def row_of(version: str, share: float | None, examples: list[Example]) -> Row:
        losses = {}
        for which in (None, name):
            model.select(which)
            losses[which] = mean_loss(objective, examples, tokenizer, accelerator)
        row = Row(package, version, share, len(examples), losses[None], losses[name])
        print(f"# {row}", flush=True)
        return row

    oldest, *later = VERSIONS[package]
    held_out = read_examples(options.work / "jobs" / str(status.job_id) / "dataset" / "held_out.jsonl")
    rows = [row_of(oldest, None, sampled(held_out, oldest, options))]
    for version in later:
        share, changed = changes_since(snapshot, unpacked(package, version, options), tokenizer)
        rows.append(row_of(version, share, sampled(changed, version, options)))
    return rows


def sampled(examples: list[Example], seed: str, options: argparse.Namespace) -> list[Example]:
    return random.Random(seed).sample(examples, min(options.examples, len(examples)))  # noqa: S311 -- no secret


def changes_since(snapshot: Snapshot, source: Path, tokenizer: BaseTokenizer) -> tuple[float, list[Example]]:
    """Return the share of the units that have changed, and the examples that overlap one of them."""
    units = new = 0
    changed: list[Example] = []
    for file in walk(source).files:
        rows: set[int] = set()
        for unit in units_of_file(file):
            units += 1
            if unit.digest not in snapshot.units:
                new += 1
                rows.update(range(unit.start_line, unit.end_line + 1))
        result = examples_from_file(file, token_counter=tokenizer, max_length=MAX_LENGTH, redact=redact_secrets)
        changed += [example for example in result.examples if rows & set(lines_of(example))]
    return new / units, changed


def lines_of(example: Example) -> Iterator[int]:
    yield from range(example.start_line, example.end_line + 1)


def mean_loss(
    objective: Objective, examples: list[Example], tokenizer: BaseTokenizer, accelerator: Accelerator
) -> float:
    """Return the mean of -log p over all learned tokens, in nats."""
    held_out = make_held_out_examples(examples, tokenizer, MAX_LENGTH)
    scores = score_examples(objective, held_out, tokenizer, accelerator, StopFlag())
    return sum(score.loss for score in scores) / sum(score.tokens for score in scores)


if __name__ == "__main__":
    main()
