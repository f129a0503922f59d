"""A training worker for many kills: everything but torch, in half a second.

The protocol, cancellation, data preparation and file formats are the product's; the numbers are made up. For the project
"real" it runs the real worker.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from pathlib import Path

from peft_core.schemas.task import TrainingTask
from peft_core.system.cancellation import CANCELLED_EXIT_CODE, Cancelled, StopFlag, stop_on_signals, stop_without_parent
from peft_core.system.child_process import PARENT_VARIABLE, json_line_writer, redirect_stdout


def main() -> int:
    if len(sys.argv) > 1 and json.loads(Path(sys.argv[1]).read_text())["project_id"] == "real":
        runpy.run_module("peft_core.worker", run_name="__main__", alter_sys=True)
        return 0  # never reached: it exits
    from tests.survival import small_job  # noqa: PLC0415 -- not for the real worker

    stop = StopFlag()
    emit = json_line_writer(redirect_stdout(), on_closed=stop.request)
    stop_on_signals(stop)
    stop_without_parent(stop, int(os.environ[PARENT_VARIABLE]))
    try:
        small_job.run(TrainingTask.model_validate_json(Path(sys.argv[1]).read_text()), emit, stop)
    except Cancelled:
        return CANCELLED_EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
