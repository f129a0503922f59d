"""The real runner with scripted workers: `python -m tests.integration.scripted_runner DATA_DIR`.

How much others use the machine is read from the file `machine.json` in the data directory; without one the machine is free.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peft_core.config import Settings
from peft_core.jobs import cluster_job, free_machine, runner, running_job
from peft_core.system.files import atomic_write
from peft_core.system.machine_use import MachineUse

MACHINE = "machine.json"


def describe_machine(data_dir: Path, use: MachineUse) -> None:
    """Let the runner of a data directory find the machine in this state."""
    atomic_write(data_dir / MACHINE, use.model_dump_json())


def measure(data_dir: Path) -> MachineUse:
    try:
        return MachineUse.model_validate_json((data_dir / MACHINE).read_text())
    except FileNotFoundError:
        return MachineUse(load=0.0)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    running_job.WORKER = ["-m", "tests.integration.scripted_worker"]
    cluster_job.BRIDGE = ["-m", "tests.integration.scripted_bridge"]
    running_job.GRACE_S = 0.5
    runner.POLL_INTERVAL_S = running_job.POLL_INTERVAL_S = running_job.MEASURE_INTERVAL_S = 0.05
    free_machine.BUSY_S = 0.0
    runner.run(Settings(data_dir=root, refresh_quiet_s=0.0), lambda: measure(root))
