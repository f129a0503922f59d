"""Many small jobs and many status calls through one server: what grows, how slow it gets.

    python benchmarks/soak.py [--jobs 500] [--calls 1000] [--keep-runs 20]

The server, the runner, the store and the registry are the product's; the training child is the small one of
tests/survival (no torch, half a second), so that a day of jobs fits into minutes. Prints one line every so many jobs:
memory and file handles of the server, sizes of database and job directories; then the latency of status calls while a
job runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.model_files import write_model  # noqa: E402 -- the tests are no installed package
from tests.survival.wire import Server, server  # noqa: E402 -- likewise


def size_of(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file() and not file.is_symlink())


def report(left: Server, data: Path, done: int) -> None:
    process = psutil.Process(left.process.pid)
    database = sum(file.stat().st_size for file in data.glob("peft.db*"))
    jobs = list((data / "jobs").iterdir())
    print(
        f"{done:5} jobs  server {process.memory_info().rss / 1e6:6.1f} MB, {process.num_fds():3} handles, "
        f"{process.num_threads():2} threads  database {database / 1e3:8.1f} kB  {len(jobs):3} job directories, "
        f"{size_of(data / 'jobs') / 1e3:8.1f} kB",
        flush=True,
    )


def train(left: Server, number: int, source: Path, base: Path) -> str:
    config = {"base_model": str(base), "device": "cpu", "max_length": 128}
    answer = left.call("train_adapter", project_id=f"p{number % 5}", training_data=str(source), config=config)
    assert not answer.get("isError"), answer
    return str(answer["structuredContent"]["job_id"])


def wait(left: Server, number: int, job: str) -> None:
    while True:
        answer = left.call("get_training_status", project_id=f"p{number % 5}", job_id=job, wait_s=40)
        if answer["structuredContent"]["status"] not in ("queued", "in_progress"):
            assert answer["structuredContent"]["status"] == "completed", answer
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--keep-runs", type=int, default=20)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests" / "survival" / "site"), str(ROOT)])
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        base, source, data = write_model(root / "base"), root / "records.jsonl", root / "data"
        lines = [{"text": f"def add_{n}(a, b):\n    return a + {n} * b\n", "path": f"m{n}.py"} for n in range(40)]
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        with server(data, cwd=root, CODEBASE_GARDENER_KEEP_RUNS=str(options.keep_runs)) as left:
            began = time.monotonic()
            for number in range(options.jobs):
                wait(left, number, train(left, number, source, base))
                if number in (0, 4) or (number + 1) % max(1, options.jobs // 10) == 0:
                    report(left, data, number + 1)
            print(f"{options.jobs} jobs in {time.monotonic() - began:.0f} s")

            jobs = [train(left, number, source, base) for number in range(8)]
            took = []
            for number in range(options.calls):
                asked = time.perf_counter()
                left.call("get_training_status", project_id=f"p{number % 5}", wait_s=0)
                took.append(time.perf_counter() - asked)
            took.sort()
            p50, p99 = took[len(took) // 2], took[len(took) * 99 // 100]
            print(
                f"{len(took)} status calls beside running jobs: median {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, "
                f"longest {took[-1] * 1e3:.1f} ms"
            )
            for number, job in enumerate(jobs):
                wait(left, number, job)
            report(left, data, options.jobs + len(jobs))


if __name__ == "__main__":
    main()
