"""Does the adapter help? Compare base and adapter on several code bases, with another code base's adapter as control.

Each code base is trained on with the product's defaults, through the manager; its own report is the first row of each table.
Then its adapter and that of another code base are compared on the text that neither was trained on: the control's gain is what
any code teaches; the rest is knowledge of the project. What is in `--work` is not repeated.

    python benchmarks/proof.py --work DIR [--steps N] [--code-bases PATH ...] [--base BASE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sysconfig
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from pathlib import Path

import anyio

from peft_core import PEFTManager, Settings, TrainingStatus
from peft_core.errors import JobNotFound
from peft_core.schemas.evaluation import AdapterComparison, Comparison, Evaluation, InFileMetric
from peft_core.schemas.results import Status
from peft_core.schemas.training import project_id_from

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
        "--steps", type=int, default=None, help="most optimiser steps of a training; default: what the product chooses"
    )
    parser.add_argument(
        "--code-bases", nargs="+", default=CODE_BASES, metavar="PATH", help="relative to site-packages, or absolute"
    )
    parser.add_argument("--base", default=None, help="base model; default: the bundled one")
    anyio.run(prove, parser.parse_args())


async def prove(options: argparse.Namespace) -> None:
    work = options.work.resolve()
    rows: list[Row] = []
    async with PEFTManager(Settings(data_dir=work, max_training_steps=options.steps)) as manager:
        trained = {code_base: await train(manager, code_base, options) for code_base in options.code_bases}
        for number, code_base in enumerate(options.code_bases):
            status = trained[code_base]
            assert status.evaluation is not None
            assert status.metrics is not None
            rows.append(Row(code_base, "own, as trained", status.evaluation, status.metrics.wall_s))
            other = options.code_bases[number - 1]
            if other != code_base:
                own, control = await compared(manager, work, trained[code_base], trained[other], source_of(code_base))
                rows += [Row(code_base, "own", own, None), Row(code_base, f"control: {other}", control, None)]
    show(rows, options.code_bases)


def source_of(code_base: str) -> Path:
    return Path(sysconfig.get_paths()["purelib"]) / code_base  # an absolute path replaces the first part


def project_of(code_base: str, steps: int | None, base: str | None) -> str:
    """Return the project of a training: the end of the path, which can be read, and a hash of all that distinguishes it."""
    identity = json.dumps([str(source_of(code_base).resolve()), steps, base])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:10]
    return project_id_from(f"{code_base[-50:]}-{digest}")


async def train(manager: PEFTManager, code_base: str, options: argparse.Namespace) -> TrainingStatus:
    """Return the finished training of a code base, from an earlier run if there is one."""
    project = project_of(code_base, options.steps, options.base)
    for adapter in (await manager.list_adapters(project)).adapters:
        return await manager.get_training_status(project, adapter.adapter_id)
    config = {"base_model": options.base, "make_current": "always"}
    try:
        status = await manager.get_training_status(project)
    except JobNotFound:
        status = None
    if status is None or status.status in (Status.NOT_STARTED, Status.FAILED):
        status = await manager.train_adapter(project, str(source_of(code_base)), config)
    elif status.status in (Status.CANCELLED, Status.INTERRUPTED):
        status = await manager.resume_training(str(status.job_id))
    return await ended(manager, status)


async def compared(
    manager: PEFTManager, work: Path, own: TrainingStatus, control: TrainingStatus, source: Path
) -> tuple[Evaluation, Evaluation]:
    """Return the evaluations of two adapters on one code base, from an earlier run if there is one."""
    assert own.adapter_path is not None
    assert control.adapter_path is not None
    saved = work / "comparisons" / f"{own.project_id}-and-{control.project_id}.json"
    if not saved.exists():
        status = await ended(
            manager, await manager.compare_adapters(own.adapter_path, control.adapter_path, str(source))
        )
        assert status.comparison is not None
        saved.parent.mkdir(exist_ok=True)
        saved.write_text(status.comparison.model_dump_json(), encoding="utf-8")
    comparison = AdapterComparison.model_validate_json(saved.read_bytes())
    return comparison.adapter_a.evaluation, comparison.adapter_b.evaluation


async def ended(manager: PEFTManager, status: TrainingStatus) -> TrainingStatus:
    printed = ""
    latest = status
    async for latest in manager.watch_training(status.project_id, status.job_id):
        if latest.phase and latest.phase != printed:
            printed = latest.phase
            print(f"# {latest.project_id}: {latest.kind}, {printed}", flush=True)
    assert latest.status is Status.COMPLETED, latest.error
    return latest


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
    show_in_file(rows)
    show_columns(rows)
    print()
    for code_base in code_bases if len(code_bases) > 1 else ():
        own, control = (
            [row for row in rows if row.code_base == code_base and row.adapter.startswith(kind)][-1]
            for kind in ("own", "control")
        )
        gain = own.evaluation.loss.change
        share = control.evaluation.loss.change / gain if gain else float("nan")
        seconds = max(row.seconds or 0 for row in rows if row.code_base == code_base)
        within = "met" if seconds < TARGET_S else "MISSED"
        print(f"{code_base}: the control has {share:.0%} of the gain (target: under half); 15 minutes: {within}")


def show_in_file(rows: list[Row]) -> None:
    """Print what an editor would see, where whole held-out files were read."""
    metrics = list(InFileMetric)
    print(f"\n| code base | adapter | {' | '.join(metric.in_words for metric in metrics)} |")
    print(f"|---|---|{'---|' * len(metrics)}")
    for row in rows:
        cells = [
            f"{percent(share)} of {share.positions}" if (share := row.evaluation.in_file.get(metric)) else ""
            for metric in metrics
        ]
        print(f"| `{row.code_base}` | {row.adapter} | {' | '.join(cells)} |")


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
