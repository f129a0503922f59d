"""Makes the workers on a test cluster controllable. Python imports this module when its directory is in PYTHONPATH.

Every worker writes a checkpoint after each step, and waits after the step that the file `hold` in its node's data directory
names, for as long as that file exists. A job of the project "small" runs `tests/cluster/small_worker.py` instead of the real
worker.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from typing import Any

HOLD = Path(os.environ.get("CODEBASE_GARDENER_DATA_DIR", "/nonexistent")) / "hold"
POLL_S = 0.05


def hold(step: int, stop: Any) -> None:
    """Wait while the test holds workers at this step, unless they are to stop."""
    while not stop.requested and HOLD.exists() and HOLD.read_text() == str(step):
        time.sleep(POLL_S)


class ControlledLoop(MetaPathFinder):
    """Changes the real training loop when it is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "peft_core.training.loop":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            module._CHECKPOINT_INTERVAL_S = -1.0
            save = module.TrainingLoop.save_checkpoint

            def save_and_hold(loop: Any) -> None:
                save(loop)
                hold(loop.progress.step, loop.stop)

            module.TrainingLoop.save_checkpoint = save_and_hold

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class SmallWorker(MetaPathFinder):
    """Puts the small worker in the place of the real one."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "peft_core.worker.__main__":
            return None
        return spec_from_file_location(name, Path(__file__).parents[1] / "small_worker.py")


if "peft_core.worker" in sys.orig_argv:
    task = json.loads(Path(sys.orig_argv[-1]).read_text())
    sys.meta_path.insert(0, SmallWorker() if task["project_id"] == "small" else ControlledLoop())
