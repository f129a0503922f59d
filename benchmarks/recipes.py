"""Compare training recipes with the current defaults: which one learns most from the same tokens, by held-out loss?

Each run is a training worker as the product starts it, with one thread. A recipe is compared with the defaults on the same
code base and seed. The seed chooses the held-out files, the order and the initial weights, so all recipes with one seed
see exactly the same examples (`--examples` of them, whatever the batch size) and are evaluated on the same files. A round is
one seed of one code base with all recipes; the table is fair after each round. Finished runs are in the results file: an
interrupted sweep continues, and new seeds, recipes or code bases extend it.

    python benchmarks/recipes.py --results FILE [--seeds 0 1 2] [--jobs 1] [--recipes NAME ...] [--code-bases PATH ...]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from peft_core.config import Settings
from peft_core.planning.defaults import MEASURED_RATE
from peft_core.planning.planner import plan
from peft_core.schemas.base_model import BUNDLED
from peft_core.schemas.events import EVENT, AdapterWritten, DatasetPrepared, Evaluated, JobFailed, RateLowered
from peft_core.schemas.frozen import FrozenModel
from peft_core.schemas.task import TrainingTask
from peft_core.schemas.training import TaskMixture, TrainingConfig
from peft_core.system.child_process import child_environment

NOW = TrainingConfig(rank=16, learning_rate=MEASURED_RATE)
DEFAULTS = "defaults"
RECIPES: dict[str, dict[str, Any]] = {  # what differs from the defaults
    DEFAULTS: {},
    "rate x0.25": {"learning_rate": 0.25 * MEASURED_RATE},
    "rate x0.5": {"learning_rate": 0.5 * MEASURED_RATE},
    "rate x1.5": {"learning_rate": 1.5 * MEASURED_RATE},
    "rate x2": {"learning_rate": 2 * MEASURED_RATE},
    "plain LoRA, rate x2": {"lora_plus_ratio": 1.0, "learning_rate": 2 * MEASURED_RATE},
    "LoRA+ 2, rate x2": {"lora_plus_ratio": 2.0, "learning_rate": 2 * MEASURED_RATE},
    "LoRA+ 4": {"lora_plus_ratio": 4.0},
    "LoRA+ 16": {"lora_plus_ratio": 16.0},
    "LoRA+ 16, rate x0.5": {"lora_plus_ratio": 16.0, "learning_rate": 0.5 * MEASURED_RATE},
    "batch 2": {"batch_size": 2},
    "batch 2, rate x0.5": {"batch_size": 2, "learning_rate": 0.5 * MEASURED_RATE},
    "batch 2, rate x0.7": {"batch_size": 2, "learning_rate": 0.5**0.5 * MEASURED_RATE},
    "batch 8": {"batch_size": 8},
    "batch 8, rate x1.4": {"batch_size": 8, "learning_rate": 2**0.5 * MEASURED_RATE},
    "warm-up 0": {"warmup_ratio": 0.0},
    "warm-up 0.1": {"warmup_ratio": 0.1},
    "cosine": {"lr_scheduler": "cosine"},
    "constant": {"lr_scheduler": "constant"},
    "rank 8": {"rank": 8},
    "rank 8, rate x0.5": {"rank": 8, "learning_rate": 0.5 * MEASURED_RATE},
    "rank 32": {"rank": 32},
    "rank 32, rate x0.5": {"rank": 32, "learning_rate": 0.5 * MEASURED_RATE},
    "rsLoRA": {"use_rslora": True},
    "clip 0.3": {"max_grad_norm": 0.3},
    "instructions 0.2": {"mixture": TaskMixture(instructions=0.2)},
    "instructions 0.5": {"mixture": TaskMixture(instructions=0.5)},
    "usual": {"batch_size": 8, "learning_rate": 2e-4, "lora_plus_ratio": 1.0},
}
# Recent or rarely copied, so that the bundled base hardly knows them; 300 to 650 units each.
CODE_BASES = ("mcp/server", "pydantic_settings", "huggingface_hub/cli")
EXAMPLES = 88  # about 21k tokens; a multiple of every batch size
# About as many as the product evaluates during training; more would cost more than the training itself.
HELD_OUT_TOKENS = 8000


class Outcome(FrozenModel):
    """One finished run: a line of the results file."""

    code_base: str
    config: TrainingConfig  # complete, so that it keeps its meaning when the defaults change
    dataset: str  # sha256 of training and held-out set
    base_loss: float  # nats per target token on the held-out examples
    adapter_loss: float  # the same with the adapter
    general_change: float  # of the loss on general code: how much is forgotten
    tokens: int  # seen in training
    tokens_per_second: float
    wall_s: float
    rates_lowered: int  # rollbacks after a divergence

    @property
    def key(self) -> str:
        return key_of(self.code_base, self.config)


Results = dict[str, Outcome]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines; finished runs in it are not repeated")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument(
        "--code-bases", nargs="+", default=CODE_BASES, metavar="PATH", help="relative to site-packages, or absolute"
    )
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="training examples per run")
    parser.add_argument(
        "--held-out-tokens", type=int, default=HELD_OUT_TOKENS, help="approximate size of the held-out set"
    )
    parser.add_argument("--base", default=BUNDLED, help="base model")
    parser.add_argument("--jobs", type=int, default=1, help="parallel runs, one thread each")
    parser.add_argument("--work", type=Path, default=None, help="directory that retains the converted base")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        sweep(options, (options.work or Path(temporary)).resolve())


def sweep(options: argparse.Namespace, work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    results = read(options.results)
    recipes: list[str] = list(dict.fromkeys([DEFAULTS, *options.recipes]))
    fractions = {code_base: held_out_fraction(code_base, options) for code_base in options.code_bases}
    rounds = {
        (code_base, seed): {recipe: configure(recipe, seed, fractions[code_base], options) for recipe in recipes}
        for seed, code_base in product(options.seeds, options.code_bases)
    }
    failed = ran = 0
    with ThreadPoolExecutor(options.jobs) as pool:
        for (code_base, seed), configs in rounds.items():
            # By key, because two recipes may be the same run once the defaults have changed.
            missing = {key: config for config in configs.values() if (key := key_of(code_base, config)) not in results}
            if not missing:
                continue
            log(f"# {code_base}, seed {seed}: {len(missing)} runs")
            outcomes = list(pool.map(partial(train, code_base, work=work, results=options.results), missing.values()))
            results |= {outcome.key: outcome for outcome in outcomes if outcome is not None}
            ran += len(outcomes)
            failed += outcomes.count(None)
            report(results, rounds, recipes)
    if not ran:
        report(results, rounds, recipes)
    if failed:
        raise SystemExit(f"{failed} runs failed, see above; the same command runs them again")


def source_of(code_base: str) -> Path:
    return Path(sysconfig.get_paths()["purelib"]) / code_base


def key_of(code_base: str, config: TrainingConfig) -> str:
    return f"{code_base} {config.model_dump_json()}"


def read(path: Path) -> Results:
    if not path.exists():
        return {}
    outcomes = [Outcome.model_validate_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {outcome.key: outcome for outcome in outcomes}


def held_out_fraction(code_base: str, options: argparse.Namespace) -> float:
    """Return the fraction that gives about the same number of held-out tokens in each code base."""
    draft = plan(str(source_of(code_base)), TrainingConfig(base_model=options.base), Settings(), lambda *_: None)
    tokens: int = options.held_out_tokens
    return round(min(0.5, max(0.02, tokens / draft.found.estimated_tokens)), 3)


def configure(recipe: str, seed: int, fraction: float, options: argparse.Namespace) -> TrainingConfig:
    given = {"base_model": options.base, "seed": seed, "held_out_fraction": fraction, **RECIPES[recipe]}
    steps, rest = divmod(options.examples, given.get("batch_size", NOW.batch_size))
    if rest or not steps:
        raise SystemExit(f"--examples {options.examples} must be a multiple of the batch size of '{recipe}'")
    # Evaluate at the end only: early stopping is off, so evaluations during training decide nothing.
    return TrainingConfig.model_validate(NOW.model_dump() | given | {"max_steps": steps, "eval_steps": steps})


def train(code_base: str, config: TrainingConfig, *, work: Path, results: Path) -> Outcome | None:
    """Run one training, append its outcome to the file and return it; None, after logging the reason, if it failed."""
    request = plan(str(source_of(code_base)), config, Settings(data_dir=work), lambda *_: None)
    with tempfile.TemporaryDirectory(dir=work, prefix="job-") as directory:
        task = TrainingTask(
            job_id=Path(directory).name,
            project_id="recipes",
            request=request,
            job_dir=Path(directory),
            base_models_dir=work / "base_models",
        )
        task_file = Path(directory) / "task.json"
        task_file.write_text(task.model_dump_json(), encoding="utf-8")
        child = {**child_environment(), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", "peft_core.worker", str(task_file)],
            capture_output=True,
            text=True,
            check=False,
            env=child,
        )
    events = [EVENT.validate_json(line) for line in done.stdout.splitlines()]
    metrics = next((event.metrics for event in events if isinstance(event, AdapterWritten)), None)
    if metrics is None or done.returncode != 0:
        why = next((event.error.message for event in events if isinstance(event, JobFailed)), done.stderr[-2000:])
        log(f"# failed with exit code {done.returncode}: {config}\n{why}")
        return None
    outcome = Outcome.model_validate(
        metrics.model_dump(include=set(Outcome.model_fields))
        | {
            "code_base": code_base,
            "config": config,
            "dataset": next(event.dataset.sha256 for event in events if isinstance(event, DatasetPrepared)),
            "general_change": next(
                event.evaluation.general_loss.change
                for event in events
                if isinstance(event, Evaluated) and event.evaluation.general_loss is not None
            ),
            "rates_lowered": sum(isinstance(event, RateLowered) for event in events),
        }
    )
    with results.open("a", encoding="utf-8") as stream:
        stream.write(outcome.model_dump_json() + "\n")  # a single write, because other threads append too
    return outcome


def report(results: Results, rounds: dict[tuple[str, int], dict[str, TrainingConfig]], recipes: Sequence[str]) -> None:
    """Print differences of held-out loss to the defaults, best first; negative is better. General code: against the base."""
    outcomes = {
        (*place, recipe): outcome
        for place, configs in rounds.items()
        for recipe in recipes
        if (outcome := results.get(key_of(place[0], configs[recipe]))) is not None
    }
    code_bases = list(dict.fromkeys(code_base for code_base, _ in rounds))
    print(f"\n{'held-out loss':22} {'base':>8} {DEFAULTS:>9}   runs  general code")
    for code_base in code_bases:
        if own := [run for (name, _, recipe), run in outcomes.items() if (name, recipe) == (code_base, DEFAULTS)]:
            base, adapter = mean([run.base_loss for run in own]), mean([run.adapter_loss for run in own])
            general = mean([run.general_change for run in own])
            print(f"{code_base:22} {base:8.3f} {adapter:9.3f} {len(own):6} {general:+13.3f}")

    rows: list[tuple[float, str]] = []
    for recipe in recipes:
        differences: dict[str, list[float]] = {code_base: [] for code_base in code_bases}
        forgotten = []
        lowered = 0
        for code_base, seed in rounds:
            run, default = outcomes.get((code_base, seed, recipe)), outcomes.get((code_base, seed, DEFAULTS))
            if run and default and same_held_out_set(run, default) and recipe != DEFAULTS:
                differences[code_base].append(run.adapter_loss - default.adapter_loss)
                forgotten.append(run.general_change)
                lowered += run.rates_lowered
        if all_runs := [value for values in differences.values() for value in values]:
            error = f"{statistics.stdev(all_runs) / len(all_runs) ** 0.5:8.4f}" if len(all_runs) > 1 else f"{'':8}"
            means = " ".join(f"{mean(values):+20.4f}" if values else f"{'':20}" for values in differences.values())
            note = f"   {lowered} rollbacks" if lowered else ""
            row = f"{recipe:22} {mean(all_runs):+8.4f} {error} {len(all_runs):6} {means} {mean(forgotten):+8.3f}{note}"
            rows.append((mean(all_runs), row))
    columns = " ".join(f"{code_base:>20}" for code_base in code_bases)
    print(f"\n{'against the defaults':22} {'mean':>8} {'s.e.':>8} {'pairs':>6} {columns}  general code")
    print("\n".join(row for _, row in sorted(rows)), flush=True)


def same_held_out_set(run: Outcome, other: Outcome) -> bool:
    """Compare the base's loss, since the training examples of the two runs may be formatted differently."""
    return abs(run.base_loss - other.base_loss) < 1e-5


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def log(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
