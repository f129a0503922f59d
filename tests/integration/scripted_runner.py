"""The real runner with scripted workers: `python -m tests.integration.scripted_runner DATA_DIR`."""

from __future__ import annotations

import sys
from pathlib import Path

from peft_core.config import Settings
from peft_core.jobs import runner

if __name__ == "__main__":
    runner.WORKER = ["-m", "tests.integration.scripted_worker"]
    runner.GRACE_S = 0.5
    runner.POLL_INTERVAL_S = 0.05
    runner.run(Settings(data_dir=Path(sys.argv[1])))
