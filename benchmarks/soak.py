"""Run many small jobs and many status calls through one server, to see what grows and how slow it gets.

    python benchmarks/soak.py [--jobs 500] [--calls 1000] [--keep-runs 20] [--steps 20]

The server, the runner, the store and the registry are the product's; the training worker is the small one of
tests/survival (no torch, half a second), so that a day of jobs fits into minutes. It regularly prints the server's memory and
file handles, and the sizes of database and job directories. Then the bundled base is trained: during every second step many
status calls are made, and these steps are compared with the others.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import sysconfig
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import mean, quantiles

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from peft_core.jobs.store import Store  # noqa: E402 -- this tree's modules, whatever is installed
from peft_core.schemas.events import StepCompleted  # noqa: E402 -- the same
from tests.model_files import write_model  # noqa: E402 -- the tests are not installed as a package
from tests.survival.wire import Server, server  # noqa: E402 -- the same


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file() and not file.is_symlink())


def report(running: Server, data: Path, done: int) -> None:
    process = psutil.Process(running.process.pid)
    database = sum(file.stat().st_size for file in data.glob("peft.db*"))
    jobs = list((data / "jobs").iterdir())
    print(
        f"{done:5} jobs  server {process.memory_info().rss / 1e6:6.1f} MB, {process.num_fds():3} handles, "
        f"{process.num_threads():2} threads  database {database / 1e3:8.1f} kB  {len(jobs):3} job directories, "
        f"{size_of(data / 'jobs') / 1e3:8.1f} kB",
        flush=True,
    )


def train(running: Server, number: int, source: Path, base: Path) -> str:
    config = {"base_model": str(base), "device": "cpu", "max_length": 128, "continue_from": "none"}
    answer = running.call("train_adapter", project_id=f"p{number % 5}", training_data=str(source), config=config)
    assert not answer.get("isError"), answer
    return str(answer["structuredContent"]["job_id"])


def wait(running: Server, number: int, job: str) -> None:
    while True:
        answer = running.call("get_training_status", project_id=f"p{number % 5}", job_id=job, wait_s=40)
        if answer["structuredContent"]["status"] not in ("queued", "in_progress"):
            assert answer["structuredContent"]["status"] == "completed", answer
            return


def many_jobs(root: Path, jobs: int, keep_runs: int) -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "survival" / "site"), str(ROOT)])
    base, source, data = write_model(root / "base"), root / "records.jsonl", root / "data"
    lines = [{"text": f"def add_{n}(a, b):\n    return a + {n} * b\n", "path": f"m{n}.py"} for n in range(60)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with server(data, cwd=root, CODEBASE_GARDENER_KEEP_RUNS=str(keep_runs)) as running:
        began = time.monotonic()
        for number in range(jobs):
            wait(running, number, train(running, number, source, base))
            if number in (0, 4) or (number + 1) % max(1, jobs // 10) == 0:
                report(running, data, number + 1)
        print(f"{jobs} jobs in {time.monotonic() - began:.0f} s", flush=True)


def many_calls(root: Path, calls: int, steps: int) -> None:
    """Make status calls during the even steps of a real training."""
    os.environ["PYTHONPATH"] = str(ROOT)
    config = {"max_steps": steps, "batch_size": 4, "eval_steps": steps, "held_out_fraction": 0.02}
    source, data = Path(sysconfig.get_paths()["purelib"]) / "mcp" / "server", root / "real"
    with server(data, cwd=root) as running:
        answer = running.call("train_adapter", project_id="real", training_data=str(source), config=config)
        job = str(answer["structuredContent"]["job_id"])
        store = Store(data / "peft.db", time.time)
        durations: list[float] = []
        calls_per_step = -(-calls // (steps // 2))

        def done() -> list[StepCompleted]:
            return [event for event in store.events(job) if isinstance(event, StepCompleted)]

        last_step = 0  # the last step during which calls were made
        while len(completed := done()) < steps:
            assert not store.get(job).status.is_final, store.get(job)
            step = len(completed) + 1
            if completed and step % 2 == 0 and step != last_step:
                last_step = step
                for _ in range(calls_per_step):
                    before = time.perf_counter()
                    running.call("get_training_status", project_id="real", wait_s=0)
                    durations.append(time.perf_counter() - before)
            time.sleep(0.1)
        seconds = [
            later.tokens / later.tokens_per_second - earlier.tokens / earlier.tokens_per_second
            for earlier, later in pairwise(done())
        ]
        tokens = [later.tokens - earlier.tokens for earlier, later in pairwise(done())]  # from step 2 on
        with_calls, without = (mean(seconds[first::2]) / mean(tokens[first::2]) for first in (0, 1))
        p50, p99 = (quantiles(durations, n=100)[rank] * 1e3 for rank in (49, 98))
        print(
            f"{len(durations)} status calls during a training: median {p50:.1f} ms, p99 {p99:.1f} ms, "
            f"longest {max(durations) * 1e3:.1f} ms; time per token in steps with {calls_per_step} calls each: "
            f"{with_calls / without - 1:+.1%} ({mean(seconds[::2]):.1f} s against {mean(seconds[1::2]):.1f} s)"
        )
        running.call("cancel_training", project_id="real")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--keep-runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="steps of the real training")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        if options.jobs:
            many_jobs(Path(place), options.jobs, options.keep_runs)
        if options.calls:
            many_calls(Path(place), options.calls, options.steps)


if __name__ == "__main__":
    main()
