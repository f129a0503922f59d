"""The real runner, with the small worker: `python -P -m tests.survival.runner ...`."""

from __future__ import annotations

import sys

from peft_core.jobs import runner, running_job

WORKER = ["-m", "tests.survival.small_worker"]

if __name__ == "__main__":
    running_job.WORKER = WORKER
    runner.POLL_INTERVAL_S = running_job.POLL_INTERVAL_S = 0.05
    runner.main(sys.argv[1:])
