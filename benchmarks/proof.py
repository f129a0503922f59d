"""Does the adapter help? Compare base and adapter on three real code bases, with another code base's adapter as control.

Each code base is trained on with the product's defaults, through the manager; its own report is the first row. Then its
adapter and that of another code base are evaluated on the same held-out files: the control's gain is what any Python code
teaches; the rest is knowledge of the project. Trainings and evaluations that are in `--work` are not repeated.

    python benchmarks/proof.py --work DIR [--steps N] [--code-bases PATH ...] [--base BASE]
"""

from __future__ import annotations

import argparse
import json
import sysconfig
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import anyio

from peft_core import PEFTManager, Settings, TrainingStatus
from peft_core.schemas.evaluation import Comparison, Evaluation
from peft_core.schemas.results import Status

# Packages whose current form dates from 2026, judging by their versions; the base was trained on code of 2024 and before.
CODE_BASES = ("mcp/server", "huggingface_hub/cli", "httpx2")
TARGET_S = 15 * 60


@dataclass
class Row:
    """The evaluation of one adapter on one code base."""

    code_base: str
    adapter: str
    evaluation: Evaluation
    seconds: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="data directory; finished runs in it are not repeated")
    parser.add_argument(
        "--steps", type=int, default=None, help="optimiser steps per training; default: one pass over the code"
    )
    parser.add_argument(
        "--code-bases", nargs="+", default=CODE_BASES, metavar="PATH", help="relative to site-packages, or absolute"
    )
    parser.add_argument("--base", default=None, help="base model; default: the bundled one")
    anyio.run(prove, parser.parse_args())


async def prove(options: argparse.Namespace) -> None:
    work = options.work.resolve()
    rows: list[Row] = []
    async with PEFTManager(Settings(data_dir=work)) as manager:
        trained = {code_base: await train(manager, code_base, options) for code_base in options.code_bases}
        for number, code_base in enumerate(options.code_bases):
            status = trained[code_base]
            assert status.evaluation is not None
            assert status.metrics is not None
            rows.append(Row(code_base, "own, as trained", status.evaluation, status.metrics.wall_s))
            data = held_out_of(work, status, source_of(code_base))
            other = options.code_bases[number - 1]
            for name in dict.fromkeys([code_base, other]):
                path = trained[name].adapter_path
                evaluation = await evaluated(manager, work, path, data, options.base)
                rows.append(Row(code_base, "own" if name == code_base else f"control: {name}", evaluation, None))
    show(rows, options.code_bases)


def source_of(code_base: str) -> Path:
    return Path(sysconfig.get_paths()["purelib"]) / code_base  # an absolute path replaces the first part


def project_of(code_base: str, steps: int | None) -> str:
    return f"{code_base.strip('/').replace('/', '-')}-{steps or 'epoch'}"[-60:].strip("-")


async def train(manager: PEFTManager, code_base: str, options: argparse.Namespace) -> TrainingStatus:
    """Return the finished training of a code base, from an earlier run if there is one."""
    project = project_of(code_base, options.steps)
    for adapter in (await manager.list_adapters(project)).adapters:
        return await manager.get_training_status(project, adapter.adapter_id)
    config = {"max_steps": options.steps, "base_model": options.base, "make_current": "always"}
    status = await manager.get_training_status(project)
    if status.status in (Status.NOT_STARTED, Status.FAILED):
        status = await manager.train_adapter(project, str(source_of(code_base)), config)
    elif status.status in (Status.CANCELLED, Status.INTERRUPTED):
        status = await manager.resume_training(str(status.job_id))
    return await ended(manager, status)


async def evaluated(manager: PEFTManager, work: Path, adapter: str | None, data: Path, base: str | None) -> Evaluation:
    """Return the evaluation of an adapter, from an earlier run if there is one."""
    assert adapter is not None
    saved = work / "evaluations" / f"{Path(adapter).name}-on-{data.stem}.json"
    if not saved.exists():
        status = await ended(manager, await manager.evaluate_adapter(adapter, str(data), base))
        assert status.evaluation is not None
        saved.parent.mkdir(exist_ok=True)
        saved.write_text(status.evaluation.model_dump_json(), encoding="utf-8")
    return Evaluation.model_validate_json(saved.read_bytes())


async def ended(manager: PEFTManager, status: TrainingStatus) -> TrainingStatus:
    printed = ""
    latest = status
    async for latest in manager.watch_training(status.project_id, status.job_id):
        if latest.phase and latest.phase != printed:
            printed = latest.phase
            print(f"# {latest.project_id}: {latest.kind}, {printed}", flush=True)
    assert latest.status is Status.COMPLETED, latest.error
    return latest


def held_out_of(work: Path, status: TrainingStatus, source: Path) -> Path:
    """Write the held-out files of a training as records, so that both adapters are evaluated on the same text."""
    assert status.job_id is not None
    manifest: dict[str, Any] = json.loads((work / "jobs" / status.job_id / "dataset" / "manifest.json").read_bytes())
    data = work.with_name(f"{work.name}-held-out") / f"{status.project_id}.jsonl"
    data.parent.mkdir(exist_ok=True)
    with data.open("w", encoding="utf-8") as lines:
        for name in manifest["held_out_files"]:
            text = (source / name).read_text(encoding="utf-8")
            lines.write(json.dumps({"content": text, "language": "python", "file_path": name}) + "\n")
    return data


def show(rows: list[Row], code_bases: list[str]) -> None:
    distributions = packages_distributions()
    for code_base in code_bases:
        for name in distributions.get(code_base.split("/")[0], [])[:1]:
            print(f"{code_base}: {name} {version(name)}")
    print("\n| code base | adapter | verdict | loss | change | next line | edit similarity | general code | time |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        evaluation = row.evaluation
        loss = evaluation.loss
        time = "" if row.seconds is None else f"{row.seconds:.0f} s"
        figures = [percent(evaluation.next_line), percent(evaluation.edit_similarity), nats(evaluation.general_loss)]
        losses = f"{loss.base:.3f} -> {loss.adapter:.3f}"
        cells = [f"`{row.code_base}`", row.adapter, evaluation.verdict, losses, nats(loss)]
        print(f"| {' | '.join([*cells, *figures, time])} |")
    show_columns(rows)
    print()
    for code_base in code_bases:
        own, control = (
            [row for row in rows if row.code_base == code_base and row.adapter.startswith(kind)][-1]
            for kind in ("own", "control")
        )
        gain = own.evaluation.loss.change
        share = control.evaluation.loss.change / gain if gain else float("nan")
        seconds = max(row.seconds or 0 for row in rows if row.code_base == code_base)
        within = "met" if seconds < TARGET_S else "MISSED"
        print(f"{code_base}: the control has {share:.0%} of the gain (target: under half); 15 minutes: {within}")


def show_columns(rows: list[Row]) -> None:
    """Print base model and adapter with and without retrieved code, where that was measured."""
    print("\n| code base | column | loss | change | exact lines | change | lines |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        columns = row.evaluation.columns
        for column in () if columns is None else columns.columns:
            change, lines = column.loss_change, column.lines_change
            cells = [
                f"`{row.code_base}`",
                f"{column.name.in_words}{' (best)' if columns and column.name is columns.best else ''}",
                f"{column.loss:.3f}",
                "" if change is None else f"{change.change:+.3f}{span(change.low, change.high, 1, 3)}",
                f"{100 * column.exact_lines:.1f} %",
                "" if lines is None else f"{100 * lines.change:+.1f}{span(lines.low, lines.high, 100, 1)}",
                str(columns.lines if columns else 0),
            ]
            print(f"| {' | '.join(cells)} |")
        if columns is not None and not columns.columns:
            print(f"# {row.code_base}: {columns.text}")


def nats(compared: Comparison | None) -> str:
    return "" if compared is None else f"{compared.change:+.3f}{span(compared.low, compared.high, 1, 3)}"


def percent(compared: Comparison | None) -> str:
    if compared is None:
        return ""
    return f"{100 * compared.change:+.1f} %{span(compared.low, compared.high, 100, 1)}"


def span(low: float | None, high: float | None, factor: int, digits: int) -> str:
    return "" if low is None or high is None else f" ({factor * low:+.{digits}f} to {factor * high:+.{digits}f})"


if __name__ == "__main__":
    main()
