"""Catch up with a code base that moves: how good, and how quick, is continuing an adapter compared with training it again?

The versions of a public package in the registry stand for commits. The first version is trained on from scratch. For each
following one, the project's adapter is brought up to date as the product does it (`config.continue_from`), and compared on the
same held-out examples with

- doing nothing: the adapter as it was,
- a full retraining: from scratch, on all code of the new version that no ancestor held out,
- a training from scratch on as many examples as the update was trained on.

Held-out code comes in two parts, as in the product's report: what is new or has changed, and a sample of what was held out
before. Times are CPU seconds of the whole training process, with one thread, without completions (which no loss depends on),
so that other programs on the machine do not count. Finished runs are in the results file: an interrupted run continues.

    python benchmarks/refresh.py --results FILE [--packages NAME==V,V,V ...] [--full-steps N] [--arms ...] [--work DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from peft_core.adapters.registry import Registry
from peft_core.config import Settings
from peft_core.data.catch_up import ParentData
from peft_core.data.dataset import read_examples, write_manifest
from peft_core.data.leakage import read_fingerprint
from peft_core.data.prepare import prepare
from peft_core.data.snapshot import read_snapshot
from peft_core.planning.continuation import Adapters
from peft_core.planning.defaults import CATCH_UP_TIME
from peft_core.planning.planner import plan
from peft_core.schemas.base_model import BUNDLED
from peft_core.schemas.dataset import CatchUpSpec, DatasetSpec
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.task import JobRequest, TrainingTask
from peft_core.schemas.training import FROM_SCRATCH, TrainingConfig
from peft_core.system.child_process import child_environment

PACKAGES = (
    "pydantic-settings==2.9.1,2.11.0,2.12.0,2.14.0,2.16.0",
    "structlog==23.1.0,24.1.0,25.1.0,25.4.0,26.1.0",
    "httpx==0.24.1,0.25.2,0.26.0,0.27.2,0.28.1",
)
ARMS = ("full", "short")
MAX_LOSS_ABOVE_FULL = 0.02  # nats per token
MAX_TIME_OF_FULL = 1 / 3


class Run(FrozenModel):
    """One training, or the adapter that was left as it is: a line of the results file."""

    package: str
    version: str
    arm: str  # first, nothing, continued, full, short
    settings: str
    examples: int  # trained on, counting repeated ones
    cpu_s: float
    changed: float | None  # loss on new or changed held-out code, nats per token
    old: float | None  # loss on code that was held out before
    parts: tuple[int, int]  # number of held-out examples in each part
    adapter: str | None = None

    @property
    def key(self) -> tuple[str, ...]:
        return self.package, self.version, self.arm, self.settings


Results = dict[tuple[str, ...], Run]


class Bench:
    """The runs of one package."""

    def __init__(self, package: str, options: argparse.Namespace, results: Results) -> None:
        self.package = package
        self.options = options
        self.results = results
        self.settings = Settings(data_dir=options.work / "data")
        self.registry = Registry(self.settings.paths)
        self.label = f"full={options.full_steps or 'default'}"

    def run(self, versions: Sequence[str]) -> None:
        for number, version in enumerate(versions):
            source = download(self.package, version, self.options.work)
            if number == 0:
                self._train(version, "first", self._plan(source, FROM_SCRATCH, self.options.full_steps))
            else:
                self._update(source, version)

    def _update(self, source: Path, version: str) -> None:
        continued = self._known(version, "continued")
        if continued is None:
            request = self._plan(source, None, None)
            if request.continued is None or request.catch_up is None:
                raise SystemExit(f"{self.package} {version} is not an update: {request.estimate.chosen}")
            if self.options.full_steps:
                limit = round(CATCH_UP_TIME * self.options.full_steps * request.config.batch_size)
                catch_up = request.catch_up.model_copy(update={"max_examples": limit})
                request = request.model_copy(update={"catch_up": catch_up})
            continued = self._train(version, "continued", request)
        for arm in self.options.arms:
            if self._known(version, arm) is None:
                batch = self._plan(source, FROM_SCRATCH, None).config.batch_size
                steps = self.options.full_steps if arm == "full" else max(1, continued.examples // batch)
                self._train(version, arm, self._plan(source, FROM_SCRATCH, steps))

    def _plan(self, source: Path, continue_from: str | None, steps: int | None) -> JobRequest:
        config = TrainingConfig(
            base_model=self.options.base,
            continue_from=continue_from,
            max_steps=steps,
            allow_little_data=True,
            make_current="always",
            eval_steps=10_000,
        )
        adapters = Adapters(self.registry, self.package, lambda _adapter_id: None)
        return plan(str(source), config, self.settings, lambda *_: None, adapters)

    def _known(self, version: str, arm: str) -> Run | None:
        return self.results.get((self.package, version, arm, self.label))

    def _train(self, version: str, arm: str, request: JobRequest) -> Run:
        if (known := self._known(version, arm)) is not None:
            return known
        job_id = f"{self.package}-{version}-{arm}-{self.label}".replace("=", "")
        paths = self.settings.paths.job(job_id)
        paths.root.mkdir(parents=True, exist_ok=True)
        if arm in ("full", "short"):
            self._prepare_all(version, request.dataset, paths.dataset)
        task = TrainingTask(
            job_id=job_id,
            project_id=self.package,
            request=request,
            job_dir=paths.root,
            base_models_dir=self.settings.paths.base_models,
            data_dir=self.settings.data_dir,
        )
        paths.task.write_text(task.model_dump_json())
        cpu_s = run_child(paths.task)
        scores = json.loads((paths.root / "scores.json").read_text())
        summary = json.loads((paths.dataset / "manifest.json").read_text())["dataset"]["summary"]
        parent = self._parent_of(version)
        is_old = [
            parent is not None and parent.held_out_before(example)
            for example in read_examples(paths.dataset / "held_out.jsonl")
        ]
        steps = scores["steps"]
        outcome = Run(
            package=self.package,
            version=version,
            arm=arm,
            settings=self.label,
            examples=steps * request.config.batch_size,
            cpu_s=round(cpu_s, 1),
            changed=mean_loss(scores["adapter"], [not old for old in is_old]),
            old=mean_loss(scores["adapter"], is_old),
            parts=(is_old.count(False), is_old.count(True)),
        )
        if arm == "continued":
            before = outcome.model_copy(
                update={
                    "arm": "nothing",
                    "examples": 0,
                    "cpu_s": 0.0,
                    "changed": mean_loss(scores["parent"], [not old for old in is_old]),
                    "old": mean_loss(scores["parent"], is_old),
                }
            )
            self._keep(before)
        if arm in ("first", "continued"):
            (paths.root / "parent_id").write_text(str(self.registry.current_path(self.package) or ""))
            adapter = self.registry.publish(paths.adapter, self.package, job_id)
            outcome = outcome.model_copy(update={"adapter": str(adapter)})
        self._keep(outcome)
        print(
            f"{self.package} {version} {arm}: {outcome.model_dump_json()} train={summary['train_examples']}", flush=True
        )
        return outcome

    def _parent_of(self, version: str) -> ParentData | None:
        """Return what the adapter records that the update to this version continued from."""
        job = self.settings.paths.job(f"{self.package}-{version}-continued-{self.label}".replace("=", "")).root
        marker = job / "parent_id"
        named = marker.read_text() if marker.exists() else str(self.registry.current_path(self.package) or "")
        if not named:
            return None
        snapshot, fingerprint = read_snapshot(Path(named)), read_fingerprint(Path(named))
        return ParentData(snapshot, fingerprint) if snapshot and fingerprint else None

    def _prepare_all(self, version: str, spec: DatasetSpec, directory: Path) -> None:
        """Prepare a dataset for a training from scratch that holds out the same examples as the update."""
        from peft_core.base_models.tokenizer import load_tokenizer  # noqa: PLC0415 -- for this alone
        from peft_core.data.examples import learned_text  # noqa: PLC0415
        from peft_core.modeling.convert import ensure_hf_directory  # noqa: PLC0415

        job = self.settings.paths.job(f"{self.package}-{version}-continued-{self.label}".replace("=", "")).root
        update = TrainingTask.model_validate_json((job / "task.json").read_text())
        everything = CatchUpSpec(replay_share=1e9)
        silent: Callable[[str], None] = lambda _detail: None  # noqa: E731
        base_directory = ensure_hf_directory(update.request.base, self.settings.paths.base_models, silent)
        prepared = prepare(
            update.request.dataset.model_copy(update={"catch_up": everything}),
            directory=directory,
            token_counter=load_tokenizer(base_directory),
            report=silent,
            parent=self._parent_of(version),
        )
        held_out = (job / "dataset" / "held_out.jsonl").read_bytes()
        evaluated = {learned_text(example) for example in read_examples(job / "dataset" / "held_out.jsonl")}
        kept = [
            line
            for line, example in zip(
                (directory / "train.jsonl").read_text().splitlines(),
                read_examples(directory / "train.jsonl"),
                strict=True,
            )
            if learned_text(example) not in evaluated
        ]
        (directory / "train.jsonl").write_text("".join(f"{line}\n" for line in kept))
        (directory / "held_out.jsonl").write_bytes(held_out)
        summary = prepared.summary.model_copy(update={"train_examples": len(kept), "sha256": f"{version}-everything"})
        request = {**spec.model_dump(mode="json"), "known": None}
        write_manifest(directory, request, prepared.model_copy(update={"summary": summary}), {})

    def _keep(self, run: Run) -> None:
        self.results[run.key] = run
        with self.options.results.open("a") as file:
            file.write(run.model_dump_json() + "\n")


def download(package: str, version: str, work: Path) -> Path:
    """Return a directory with the code of a version, from its wheel."""
    directory = work / "code" / package / version
    if not directory.exists():
        wheels = work / "wheels"
        command = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(wheels)]
        subprocess.run([sys.executable, "-m", "pip", *command, f"{package}=={version}"], check=True)
        wheel = next(wheels.glob(f"{package.replace('-', '_')}-{version}-*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if ".dist-info/" not in name:
                    archive.extract(name, directory)
    return directory


def run_child(task: Path) -> float:
    """Run a training in a process of its own, with one thread; return its CPU seconds."""
    environment = {**os.environ, **child_environment(), "OMP_NUM_THREADS": "1"}
    before = os.times()
    with (task.parent / "train.log").open("wb") as log:
        command = [sys.executable, __file__, "--train", str(task)]
        subprocess.run(command, check=True, env=environment, stdout=log, stderr=log)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def train(path: Path) -> None:
    """Train as the worker does, without completions, and write the scores of each held-out example beside the task."""
    from peft_core.evaluation.summary import Scores  # noqa: PLC0415 -- torch, in the child only
    from peft_core.evaluation.worker import evaluator  # noqa: PLC0415
    from peft_core.modeling.environment import prepare_environment  # noqa: PLC0415

    prepare_environment()
    from peft_core.schemas.events import Event, StepCompleted  # noqa: PLC0415
    from peft_core.system.cancellation import StopFlag  # noqa: PLC0415
    from peft_core.training.run import run  # noqa: PLC0415

    evaluator.MAX_PROMPTS = 0
    measured: list[Scores] = []
    score = evaluator.Evaluator.score

    def remember(*arguments: object, **options: object) -> Scores:
        measured.append(score(*arguments, **options))  # type: ignore[arg-type]
        return measured[-1]

    evaluator.Evaluator.score = remember  # type: ignore[method-assign, assignment]
    steps = 0

    def emit(event: Event) -> None:
        nonlocal steps
        steps += isinstance(event, StepCompleted)

    task = TrainingTask.model_validate_json(path.read_text())
    run(task, emit, StopFlag())
    names = ("base", "parent", "adapter") if task.request.continued is not None else ("base", "adapter")
    found = {
        name: [(score.loss, score.tokens) for score in scores.held_out]
        for name, scores in zip(names, measured, strict=True)
    }
    (path.parent / "scores.json").write_text(json.dumps({**found, "steps": steps}))


def mean_loss(scores: Sequence[tuple[float, int]], selected: Sequence[bool]) -> float | None:
    kept = [score for score, is_selected in zip(scores, selected, strict=True) if is_selected]
    tokens = sum(count for _, count in kept)
    return round(sum(loss for loss, _ in kept) / tokens, 4) if tokens else None


def report(results: Results) -> None:
    """Print a table of all updates, and whether the bars are met by the median."""
    print(f"\n{'package':18} {'version':8} {'arm':10} {'changed':>8} {'old':>8} {'examples':>9} {'CPU s':>7}  held out")
    differences: dict[str, list[float]] = {"changed": [], "old": [], "time": []}
    for run in results.values():
        losses = " ".join(f"{value:8.3f}" if value is not None else f"{'-':>8}" for value in (run.changed, run.old))
        parts = f"{run.parts[0]} + {run.parts[1]}"
        print(f"{run.package:18} {run.version:8} {run.arm:10} {losses} {run.examples:9} {run.cpu_s:7.0f}  {parts}")
        full = results.get((run.package, run.version, "full", run.settings))
        if run.arm == "continued" and full is not None:
            for part in ("changed", "old"):
                mine, theirs = getattr(run, part), getattr(full, part)
                if mine is not None and theirs is not None:
                    differences[part].append(mine - theirs)
            differences["time"].append(run.cpu_s / full.cpu_s)
    for name, values in differences.items():
        if values:
            bar = MAX_TIME_OF_FULL if name == "time" else MAX_LOSS_ABOVE_FULL
            median = statistics.median(values)
            what = "CPU time / full retraining" if name == "time" else f"loss on {name} held-out code - full retraining"
            verdict = "met" if median <= bar else "missed"
            print(f"{what}: median {median:+.3f} of {len(values)} updates; the bar is {bar:.3f}: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="JSON lines; finished runs in it are not repeated")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, metavar="NAME==V,V", help="versions, oldest first")
    parser.add_argument("--base", default=BUNDLED, help="base model")
    parser.add_argument("--full-steps", type=int, help="steps of a full training; omit for the product's own choice")
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS, help="what an update is compared with")
    parser.add_argument("--work", type=Path, default=Path("refresh-work"), help="keeps code, bases and adapters")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train is not None:
        train(options.train)
        return
    if options.results is None:
        parser.error("--results is needed")
    options.work = options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    lines = options.results.read_text().splitlines() if options.results.exists() else []
    results = {run.key: run for run in map(Run.model_validate_json, lines)}
    for package in options.packages:
        name, _, versions = package.partition("==")
        Bench(name, options, results).run(versions.split(","))
        report(results)


if __name__ == "__main__":
    main()
